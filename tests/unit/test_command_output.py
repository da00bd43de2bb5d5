"""Where a command's result goes, and how the command ends where it cannot go anywhere."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import typer
from rich.console import Console

from potluck.commands import terminal
from potluck.commands.progress import LiveLine
from potluck.commands.root import run
from potluck_coordinator import command as coordinator_command
from potluck_coordinator.settings import Settings
from potluck_node.control import AgentStatus
from potluck_node.progress import ProgressLine

CLOSED = "error: standard output is closed, so nothing can be shown; what was done before stays done.\n"
PHASES = ["connecting", "serving", "fenced"]
FULL = "error: standard output: No space left on device\n"


@contextmanager
def closed() -> Iterator[None]:
    yield None


@contextmanager
def nobody_reads() -> Iterator[io.TextIOWrapper]:
    reading, writing = os.pipe()
    os.close(reading)
    yield from _written_to(writing)


@contextmanager
def full() -> Iterator[io.TextIOWrapper]:
    yield from _written_to(os.open("/dev/full", os.O_WRONLY))


def _written_to(descriptor: int) -> Iterator[io.TextIOWrapper]:
    with open(descriptor, "w", encoding="utf-8") as stream:
        yield stream


Output = Callable[[], AbstractContextManager[io.TextIOWrapper | None]]


def ended(typed: list[str], show: Callable[[], None], output: Output, monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of a command that shows something."""
    app = typer.Typer()
    app.command()(lambda: show())  # noqa: PLW0108 - typer reads a lambda of its own
    monkeypatch.setattr(sys, "argv", ["potluck", *typed])
    with output() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "__stdout__", stream)
        with pytest.raises(SystemExit) as caught:
            run(app)
        # As the interpreter does at its end.
        sys.stdout.flush()
    return caught.value.code


def serve(shown: list[str]) -> None:
    """An agent as far as it is seen; collects what it got through."""
    with ProgressLine(Console()) as line:
        for phase in PHASES:
            line.show(AgentStatus(1, "n", phase, "serving", 1, 1.0, 0, 0, 0, 0, "", ()))
            shown.append(phase)


outputs = pytest.mark.parametrize(("output", "code", "words"), [(closed, 1, CLOSED), (full, 1, FULL), (nobody_reads, 141, "")])


@outputs
@pytest.mark.parametrize(
    "show",
    [
        lambda: terminal.show("a line"),
        lambda: terminal.show_json({"a": 1}),
        lambda: terminal.show_table(["A"], [[1]]),
        lambda: terminal.show_part("a part"),
        lambda: typer.echo("a line"),
        lambda: Console().print("a line"),
        lambda: print("x" * 100_000),
    ],
)
def test_a_result_that_cannot_be_shown_ends_every_command_alike_and_not_well(
    show: Callable[[], None], output: Output, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended([], show, output, monkeypatch) == code
    assert capsys.readouterr().err == words


@outputs
def test_help_is_a_result_too(
    output: Output, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(["--help"], lambda: None, output, monkeypatch) == code
    assert capsys.readouterr().err == words


def test_a_command_that_shows_nothing_needs_no_output(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [ended([], lambda: None, output, monkeypatch) for output in (closed, full, nobody_reads)] == [0, 0, 0]


@outputs
def test_an_agent_goes_on_when_nobody_reads_how_it_is_doing(
    output: Output, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del code
    shown: list[str] = []
    assert ended([], lambda: serve(shown), output, monkeypatch) == 0
    assert shown == PHASES
    assert capsys.readouterr().err == words


def test_a_full_log_of_both_outputs_ends_commands_alike_and_no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `>log 2>&1`."""
    shown: list[str] = []
    # Without a buffer, which would be full to its end.
    with io.FileIO("/dev/full", "w") as log:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(log, write_through=True))  # type: ignore[arg-type]
        assert ended([], lambda: terminal.show("a line"), full, monkeypatch) == 1
        assert ended([], lambda: serve(shown), full, monkeypatch) == 0
    assert shown == PHASES


@outputs
def test_a_coordinator_goes_on_when_nobody_reads_that_it_is_ready(
    output: Output, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    del code
    settings = Settings(data_dir=tmp_path)
    settings.certificate_authority_dir.mkdir()
    (settings.certificate_authority_dir / "ca.pem").write_text("")
    # 141 and 1 are of those that end.
    assert ended([], lambda: coordinator_command._say_ready(settings), output, monkeypatch) == 0
    assert capsys.readouterr().err == words


@pytest.mark.parametrize(("closed_ones", "count"), [("0<&- 1>&- 2>&-", 3), ("1>&-", 1), ("", 0)])
def test_no_file_comes_where_a_standard_stream_is_closed(closed_ones: str, count: int) -> None:
    nothing = "[os.fstat(number).st_rdev for number in range(3)].count(os.makedev(1, 3))"
    code = f"import os, potluck.command as c; c._keep_standard_places(); os._exit({nothing})"
    typed = f'exec "$0" -c "$1" {closed_ones}'
    done = subprocess.run(["sh", "-c", typed, sys.executable, code], input=b"", capture_output=True, check=False)
    assert done.returncode == count, done.stderr


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_or_a_share_of_it_that_is_full_is_told_in_a_line(
    reason: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write() -> None:
        raise OSError(reason, os.strerror(reason))

    assert ended([], write, full, monkeypatch) == 1
    assert capsys.readouterr().err == f"error: {os.strerror(reason)}\n"


def test_what_is_said_beside_a_result_may_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert ended([], lambda: LiveLine().update("Starting"), full, monkeypatch) == 0


def test_a_closed_input_is_an_empty_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "argv", ["potluck"])
    app = typer.Typer()
    app.command()(lambda: print(sys.stdin.isatty(), repr(sys.stdin.read())))
    with pytest.raises(SystemExit):
        run(app)
    assert capsys.readouterr().out == "False ''\n"


def test_what_is_shown_arrives_at_once_in_letters_that_its_reader_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str] = []

    @contextmanager
    def ascii_file() -> Iterator[io.TextIOWrapper]:
        with (tmp_path / "shown").open("w", encoding="ascii") as stream:
            yield stream

    def show() -> None:
        terminal.show_part("é")
        seen.append((tmp_path / "shown").read_text())

    assert ended([], show, ascii_file, monkeypatch) == 0
    assert seen == ["\\xe9"]


def test_a_result_is_whole_lines_and_parts_as_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_part("a")
    terminal.show("b")
    terminal.show_json({"letter": "é"})
    assert capsys.readouterr().out == 'ab\n{\n  "letter": "é"\n}\n'
