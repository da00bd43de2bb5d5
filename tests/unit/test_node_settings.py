"""The volunteer's settings and files: what wins, what is refused, what survives damage."""

from __future__ import annotations

import errno
import json
import re
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from potluck_node import control
from potluck_node.command import app
from potluck_node.control import Control, read_control, read_status, write_control
from potluck_node.domain.rest import FIRST_WORD, NO_WORD, Posture, Word
from potluck_node.identity_store import NodeIdentity, StateFolder
from potluck_node.rest_words import date_words
from potluck_node.settings import load_settings
from potluck_protocol.connection import ConnectionDocument
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, NodeId

PAUSE = Word(Posture.HAND_OVER)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where node.toml would lie, in a clean environment."""
    for name in ("STATE_DIR", "CACHE_DIR", "MODELS_ALLOWED", "SLOT_COUNT_MAX"):
        monkeypatch.delenv(f"POTLUCK_NODE_{name}", raising=False)
    for name in ("CONFIG", "STATE", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    (tmp_path / "config" / "potluck").mkdir(parents=True)
    return tmp_path / "config" / "potluck" / "node.toml"


def test_places_follow_the_desktop_standard(config: Path, tmp_path: Path) -> None:
    settings = load_settings()
    assert settings.state_dir == tmp_path / "state" / "potluck" / "node"
    assert settings.cache_dir == tmp_path / "cache" / "potluck"
    assert (settings.models_allowed, settings.slot_count_max, settings.disk_budget_bytes) == ((), None, None)


def test_a_flag_wins_over_the_environment_and_that_over_the_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text('slot_count_max = 1\ndisk_budget_bytes = 10\nmodels_allowed = ["a", "b"]\ndrain_seconds = 3')
    monkeypatch.setenv("POTLUCK_NODE_SLOT_COUNT_MAX", "2")
    monkeypatch.setenv("POTLUCK_NODE_DISK_BUDGET_BYTES", "20")
    settings = load_settings(slot_count_max=3)
    assert (settings.slot_count_max, settings.disk_budget_bytes, settings.drain_seconds) == (3, 20, 3)
    assert settings.models_allowed == ("a", "b")
    monkeypatch.setenv("POTLUCK_NODE_MODELS_ALLOWED", "c, d")
    assert load_settings().models_allowed == ("c", "d")
    with pytest.raises(ValidationError):
        settings.slot_count_max = 9


@pytest.mark.parametrize(
    "text", ["slot_count_max = 0", "slots = 3", "slot_count_max = ", 'log_format = "xml"', "disk_budget_bytes = -1", "x = " + "[" * 5000]
)
def test_a_wrong_setting_is_named_with_the_places_it_may_come_from(config: Path, text: str) -> None:
    config.write_text(text)
    with pytest.raises(PotluckError, match=r"node\.toml") as raised:
        load_settings()
    assert raised.value.code is ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("temperature_celsius_max = 40", True),
        ("temperature_celsius_max = 95", True),
        ("temperature_celsius_max = 39", False),
        ("temperature_celsius_max = 96", False),
        ("power_limit_watts = 50", True),
        ("power_limit_watts = 1000", True),
        ("power_limit_watts = 49", False),
        ("power_limit_watts = 1001", False),
    ],
)
def test_degrees_and_watts_have_bounds(config: Path, text: str, fine: bool) -> None:
    config.write_text(text)
    if fine:
        assert {load_settings().temperature_celsius_max, load_settings().power_limit_watts} == {None, int(text.rsplit(maxsplit=1)[-1])}
    else:
        with pytest.raises(PotluckError, match=text.split(maxsplit=1)[0]):
            load_settings()


def test_paths_of_a_file_may_begin_at_home(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/ana")
    config.write_text('cache_dir = "~/models"\nvllm_python = "~/vllm/bin/python"')
    settings = load_settings()
    assert (settings.cache_dir, settings.vllm_python) == (Path("/srv/ana/models"), Path("/srv/ana/vllm/bin/python"))
    config.write_text('cache_dir = "~no-such-user-here/models"')
    with pytest.raises(PotluckError, match=r"cache_dir: .*home directory"):
        load_settings()


def test_one_folder_has_one_agent(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "node")
    assert not folder.locked
    with folder.lock():
        assert folder.locked
        with pytest.raises(PotluckError, match="Another agent"), StateFolder(folder.path).lock():
            pass
    assert not folder.locked


def test_a_folder_that_has_not_joined_or_is_damaged_says_what_to_do(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "node")
    with pytest.raises(PotluckError, match="potluck node join") as raised:
        folder.identity()
    assert raised.value.code is ErrorCode.NOT_FOUND
    folder.create()
    (folder.path / "node.json").write_text("{")
    with pytest.raises(PotluckError, match="damaged"):
        folder.identity()


def test_a_key_is_made_once(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "node")
    with pytest.raises(PotluckError):
        folder.private_key()
    key = folder.made_private_key()
    assert folder.made_private_key() == folder.private_key() == key
    assert (folder.path / "node.key").stat().st_mode & 0o777 == 0o600


def test_a_full_disk_keeps_no_agent_from_a_start_that_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = write_control(tmp_path, word=PAUSE, said_at_unix_ms=5)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(control, "write_private", full)
    assert write_control(tmp_path, leaving=False) == said == Control(PAUSE, 5)
    with pytest.raises(OSError, match="No space"):
        write_control(tmp_path, leaving=True)


def test_control_keeps_what_is_not_named_and_a_damaged_status_is_none(tmp_path: Path) -> None:
    assert read_control(tmp_path) == Control()
    write_control(tmp_path, word=PAUSE, said_at_unix_ms=5)
    assert write_control(tmp_path, leaving=True) == read_control(tmp_path) == Control(PAUSE, 5, leaving=True)
    assert read_status(tmp_path) is None
    (tmp_path / "status.json").write_text('{"pid": 1, "engines": [{}]}')
    assert read_status(tmp_path) is None


def test_a_later_word_looks_new_to_the_agent_even_where_the_clock_was_set_back(tmp_path: Path) -> None:
    for said_at_unix_ms, kept_unix_ms in ((1_000, 1_000), (1_000, 1_001), (900, 1_002), (5_000, 5_000)):
        assert write_control(tmp_path, word=NO_WORD, said_at_unix_ms=said_at_unix_ms).said_at_unix_ms == kept_unix_ms


@pytest.mark.parametrize(
    ("arguments", "posture", "told"),
    [
        (["pause"], Posture.HAND_OVER, {"word": "pause", "until_unix_ms": None, "running": False, "memory_free": True, "seconds": 0}),
        (["finish"], Posture.FINISH, {"word": "finish", "until_unix_ms": None, "running": False, "memory_free": True, "seconds": 0}),
        (["resume"], Posture.SERVE, {"word": "resume", "running": False, "resting_because": []}),
    ],
)
def test_what_was_asked_of_the_agent_as_json(
    config: Path, tmp_path: Path, arguments: list[str], posture: Posture, told: dict[str, object]
) -> None:
    folder = joined_folder(tmp_path)
    write_control(folder.path, word=FIRST_WORD)
    answered = CliRunner().invoke(app, [*arguments, "--json", "--state-dir", str(folder.path)])
    assert (answered.exit_code, json.loads(answered.stdout)) == (0, {**told, "state_dir": str(folder.path)})
    assert read_control(folder.path).word == Word(posture)


@pytest.mark.parametrize(
    ("words", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1d", 86_400), ("1h30m", 5400), ("365d", 31_536_000)]
)
def test_a_pause_may_have_an_end_which_is_kept_as_a_date(config: Path, tmp_path: Path, words: str, seconds: int) -> None:
    folder = joined_folder(tmp_path)
    before = time.time_ns() // 1_000_000
    paused = CliRunner().invoke(app, ["pause", "--for", words, "--state-dir", str(folder.path)])
    assert paused.exit_code == 0, paused.output
    until_unix_ms = read_control(folder.path).word.until_unix_ms
    assert until_unix_ms is not None
    assert 0 <= until_unix_ms - before - seconds * 1000 < 30_000
    assert date_words(until_unix_ms) in paused.stdout


@pytest.mark.parametrize("words", ["", "2", "h", f"{'9' * 4400}s", "2 h", "-2h", "0s", "2w", "366d", "1h x", "1.5h"])
def test_what_is_no_time_to_pause_for_is_refused_and_changes_nothing(config: Path, tmp_path: Path, words: str) -> None:
    folder = joined_folder(tmp_path)
    refused = CliRunner().invoke(app, ["pause", f"--for={words}", "--state-dir", str(folder.path)])
    assert (refused.exit_code, "2h" in refused.stderr) == (2, True)
    assert read_control(folder.path) == Control()


@pytest.mark.parametrize(
    ("text", "setting", "why"),
    [
        ('hours = ["mon-fri 25:00-07:00"]', "hours", "25:00"),
        ('hours = ["noon"]', "hours", "mon-fri 22:00-07:00"),
        ('hours = ["22:00-22:00"]', "hours", "empty"),
        ('hours = ["abc 22:00-23:00"]', "hours", "abc"),
        (f"hours = {['22:00-23:00'] * 33}", "hours", "32"),
        ("hours = 5", "hours", "a list"),
        ("temprature_celsius_max = 60", "temprature_celsius_max", "is temperature_celsius_max meant?"),
        ("colour = 1", "colour", "no such setting"),
        ("drain_seconds = inf", "drain_seconds", "finite"),
        ("drain_seconds = 1e9", "drain_seconds", "86400"),
        ("idle_minutes = 0", "idle_minutes", "greater than 0"),
        ("card_memory_bytes_max = -1", "card_memory_bytes_max", "greater than 0"),
        ("upload_bytes_per_second_max = 10", "upload_bytes_per_second_max", "1000"),
    ],
)
def test_a_wrong_limit_is_named_with_its_file_and_what_is_wrong(config: Path, text: str, setting: str, why: str) -> None:
    config.write_text(text)
    with pytest.raises(PotluckError) as raised:
        load_settings()
    assert raised.value.code is ErrorCode.INVALID_REQUEST
    for words in (str(config), setting, why):
        assert words in raised.value.message


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("POTLUCK_NODE_TEMPERATURE_MAX", "60", "is temperature_celsius_max meant?"),
        ("potluck_node_hour", "22:00-07:00", "is hours meant?"),
        ("POTLUCK_NODE_COLOUR", "red", "no such setting"),
        ("POTLUCK_NODE_MODELS_ALLOWED", " , ", "names nothing"),
        ("POTLUCK_NODE_HOURS", ";", "names nothing"),
    ],
)
def test_a_limit_that_was_written_wrong_in_a_variable_is_told(
    config: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(PotluckError, match=re.escape(words)):
        load_settings()


def test_a_file_that_is_a_folder_or_anothers_is_told(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.mkdir()
    with pytest.raises(PotluckError, match=r"node\.toml cannot be read: it is a folder"):
        load_settings()
    config.rmdir()
    config.write_text("hours = []")
    monkeypatch.setattr(Path, "open", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(PotluckError, match=r"node\.toml cannot be read: Permission denied"):
        load_settings()


def test_hours_come_from_the_file_as_a_list_and_from_the_environment_with_semicolons(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text('hours = ["mon-fri 22:00-07:00", "sat,sun 00:00-24:00"]')
    assert load_settings().hours == ("mon-fri 22:00-07:00", "sat,sun 00:00-24:00")
    monkeypatch.setenv("POTLUCK_NODE_HOURS", "sat,sun 08:00-12:00; 22:00-23:00")
    assert load_settings().hours == ("sat,sun 08:00-12:00", "22:00-23:00")


def joined_folder(tmp_path: Path) -> StateFolder:
    """Of a node whose agent is not running."""
    folder = StateFolder(tmp_path / "node")
    folder.create()
    certificate = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    connection = ConnectionDocument(1, "pool", 8601, 8602, "localhost", certificate)
    folder.write_identity(NodeIdentity(NodeId("n"), AccountId("acct_a"), "attic", "http://localhost", connection))
    return folder
