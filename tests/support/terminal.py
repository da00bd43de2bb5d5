"""The `potluck` command, typed in this process."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from potluck import command


class Keyboard(io.StringIO):
    """Standard input with a person behind it."""

    def isatty(self) -> bool:
        return True


class Terminal:
    """Runs commands in this process and keeps what they print."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        self.out = self.err = ""

    def run(self, *arguments: str, stdin: str | Keyboard = "") -> int:
        self._monkeypatch.setattr(sys, "argv", ["potluck", *arguments])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        with pytest.raises(SystemExit) as ended:
            command.main()
        self.out, self.err = self._capsys.readouterr()
        return int(ended.value.code or 0)


def lonely_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> Terminal:
    """One on a machine without a pool."""
    for name in ("POTLUCK_URL", "POTLUCK_API_KEY", "POTLUCK_COORDINATOR_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    return Terminal(monkeypatch, capsys)
