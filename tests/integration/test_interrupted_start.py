"""Ctrl-C while a command is still being imported: no traceback, nothing left, and the exit status that shells expect."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

INTERRUPTING_IMPORT = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED_MODULE"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""
"""Presses Ctrl-C when a module begins to be imported, whatever the speed of the machine."""
ENTRIES = {"installed": [str(Path(sys.executable).parent / "potluck")], "module": [sys.executable, "-m", "potluck"]}


def interrupting_import(folder: Path, module: str) -> dict[str, str]:
    """The environment of a Python that gets Ctrl-C at the first import of the module."""
    (folder / "sitecustomize.py").write_text(INTERRUPTING_IMPORT)
    search_path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))
    return {"PYTHONPATH": search_path, "INTERRUPTED_MODULE": module}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("up", "typer"),
        ("up", "grpc"),
        ("demo", "potluck.commands.local_pool"),
        ("chat", "google.protobuf"),
        ("node run", "potluck_node.command"),
        ("node run", "potluck_node.agent"),
        ("coordinator serve", "potluck_coordinator.settings"),
        ("coordinator serve", "potluck_coordinator.serve"),
    ],
)
def test_ctrl_c_during_imports_ends_a_command_quietly(entry: str, command: str, module: str, tmp_path: Path):
    done = subprocess.run(
        [*ENTRIES[entry], *command.split()],
        env={**os.environ, **interrupting_import(tmp_path, module), "XDG_STATE_HOME": str(tmp_path / "state")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_command_started_with_ctrl_c_ignored_goes_on_ignoring_it(tmp_path: Path):
    done = subprocess.run(
        [*ENTRIES["module"], "--version"],
        env={**os.environ, **interrupting_import(tmp_path, "typer")},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("potluck ")
