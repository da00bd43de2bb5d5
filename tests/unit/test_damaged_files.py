"""The small files that both sides keep may be damaged, or an old version's: each reader says so in a line, or begins anew; none breaks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from potluck.commands import local_pool, session
from potluck_coordinator.catalogue_file import read_catalogue
from potluck_coordinator.directory.operator_file import known_operator_key
from potluck_coordinator.settings import load_settings as load_coordinator_settings
from potluck_node import ceilings, control, line_watch, rest_command
from potluck_node import settings as node_settings
from potluck_node.command import app
from potluck_node.domain.rest import NO_WORD, UNREADABLE_WORD, Posture, Word
from potluck_node.engines.environments import MARKER, environments
from potluck_node.identity_store import StateFolder
from potluck_node.model_store.verification import Stamps
from potluck_protocol.errors import ErrorCode, PotluckError

DEEP = b"[" * 100_000 + b"]" * 100_000
DEEP_IN_A_FIELD = (
    b'{"node_id": "n", "owner_account_id": "a", "display_name": "d", "url": "u", "connection": ' + b"[" * 900 + b"]" * 900 + b"}"
)
WRONG_WORDS = b"""{"url": 1, "api_key": [], "pid": 1e999, "size_bytes": 1e999, "node_id": [], "owner_account_id": 0, "display_name": {},
  "connection": 7, "word": {"posture": "sing", "until_unix_ms": []}, "said_at_unix_ms": {}, "engines": 5,
  "measured_at_unix_ms": NaN, "model.gguf": 3, "model_id": null}"""
DAMAGED = {
    "empty": b"",
    "half of it": b'{"node_id": "abc',
    "no text": b"\xff\xfe\x00",
    "nested": DEEP,
    "nested in a field": DEEP_IN_A_FIELD,
    "a list": b"[1, [2], {}]",
    "a word": b'"x"',
    "no fields": b"{}",
    "wrong words": WRONG_WORDS,
    "a number of many digits": b'{"pid": ' + b"9" * 5000 + b"}",
}
PAUSE = Word(Posture.HAND_OVER)
damages = pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)


def kept(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@damages
def test_files_that_are_made_anew_count_as_none(tmp_path: Path, content: bytes) -> None:
    assert local_pool._announced_pid(kept(tmp_path / "endpoints.json", content).parent) is None
    assert known_operator_key(kept(tmp_path / "operator.json", content)) is None
    assert line_watch.kept_measurement(kept(tmp_path / line_watch._FILE, content).parent) is None
    assert not any("subject" in entry for entry in ceilings._read(kept(tmp_path / ceilings.FILE_NAME, content)))
    assert control.read_status(kept(tmp_path / control._STATUS, content).parent) is None
    assert Stamps(tmp_path)._read(kept(tmp_path / "aa.json", content).stem) == {}
    kept(tmp_path / "engines/vllm-0.32.0-processors-1" / MARKER, content)
    assert environments(tmp_path / "engines") == []


@damages
def test_a_word_that_cannot_be_read_may_have_been_a_pause(tmp_path: Path, content: bytes) -> None:
    folder = kept(tmp_path / control._CONTROL, content).parent
    assert control.read_control(folder).word == UNREADABLE_WORD
    # A start that changes nothing leaves it as it is; the next word counts.
    assert control.write_control(folder, leaving=False).word == UNREADABLE_WORD
    assert (folder / control._CONTROL).read_bytes() == content
    assert control.write_control(folder, word=NO_WORD, said_at_unix_ms=5) == control.read_control(folder) == control.Control(NO_WORD, 5)


def test_a_wish_to_leave_stands_beside_a_word_that_cannot_be_read(tmp_path: Path) -> None:
    kept(tmp_path / control._CONTROL, b'{"word": null, "leaving": true}')
    assert control.read_control(tmp_path) == control.Control(UNREADABLE_WORD, leaving=True)


@damages
def test_a_node_that_runs_hears_its_owner_whatever_has_become_of_its_files(tmp_path: Path, content: bytes) -> None:
    kept(tmp_path / "node.json", content)
    folder = StateFolder(tmp_path)
    with folder.lock():
        assert rest_command._say(folder, PAUSE).word == control.read_control(tmp_path).word == PAUSE


@damages
def test_a_damaged_node_is_told_with_what_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(node_settings, "config_path", lambda: tmp_path / "node.toml")
    kept(tmp_path / "state/node.json", content)
    with pytest.raises(PotluckError, match=f"rm -r {tmp_path / 'state'}; potluck node join") as raised:
        StateFolder(tmp_path / "state").identity()
    assert raised.value.code is ErrorCode.INVALID_REQUEST
    for command in ("status", "pause", "finish", "resume", "leave"):
        answered = CliRunner().invoke(app, [command, "--state-dir", str(tmp_path / "state")])
        assert (answered.exit_code, answered.stderr.count("\n"), answered.stderr[:7]) == (1, 1, "error: "), command


@damages
def test_a_damaged_operators_file_is_told_with_what_mends_it(tmp_path: Path, content: bytes) -> None:
    kept(tmp_path / "operator.json", content)
    if content == WRONG_WORDS:
        assert not session.read_operator(tmp_path).url.startswith("http")
        return
    with pytest.raises(PotluckError, match="The coordinator writes it anew when it starts"):
        session.read_operator(tmp_path)


TOML: dict[str, bytes] = {
    "half of it": b"[node",
    "no text": b"a = '\xff'",
    "nested": b"a = " + b"[" * 100_000,
    "a number of many digits": b"http_port = " + b"9" * 5000,
    "another's": b"colour = 'red'",
}


@pytest.mark.parametrize("content", TOML.values(), ids=TOML)
@pytest.mark.parametrize("read", [lambda path: load_coordinator_settings({}, path), read_catalogue], ids=["settings", "catalogue"])
def test_a_damaged_toml_file_of_the_operator_is_told(tmp_path: Path, content: bytes, read: Callable[[Path], object]) -> None:
    with pytest.raises(PotluckError) as raised:
        read(kept(tmp_path / "own.toml", content))
    assert raised.value.code is ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize("content", TOML.values(), ids=TOML)
def test_a_damaged_node_toml_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    path = kept(tmp_path / "node.toml", content)
    monkeypatch.setattr(node_settings, "config_path", lambda: path)
    answered = CliRunner().invoke(app, ["run"])
    assert (answered.exit_code, str(path) in answered.stderr, answered.stderr.count("\n")) == (1, True, 1)


def test_nothing_parses_a_kept_file_by_itself() -> None:
    root = Path(__file__).resolve().parents[2]
    own = re.compile(r"json\.loads\(.*\.read_(?:bytes|text)\(\)")
    sources = [path for folder in ("client", "coordinator", "node_agent", "protos") for path in (root / folder).rglob("*.py")]
    found = {path.name for path in sources if own.search(path.read_text())}
    # `fit` is given a model's own configuration, which it reads once and calls bad in its own words.
    assert "private_files.py" in found
    assert found <= {"private_files.py", "fit_command.py"}
