"""The volunteer's settings and files: what wins, what is refused, what survives damage."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from potluck_node import control
from potluck_node.command import app
from potluck_node.control import Control, read_control, read_status, write_control
from potluck_node.identity_store import NodeIdentity, StateFolder
from potluck_node.settings import load_settings
from potluck_protocol.connection import ConnectionDocument
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, NodeId


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
    write_control(tmp_path, paused=True)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(control, "write_private", full)
    assert write_control(tmp_path, leaving=False) == Control(paused=True)
    with pytest.raises(OSError, match="No space"):
        write_control(tmp_path, leaving=True)


def test_control_keeps_what_is_not_named_and_survives_damage(tmp_path: Path) -> None:
    assert read_control(tmp_path) == Control()
    write_control(tmp_path, paused=True)
    assert write_control(tmp_path, leaving=True) == read_control(tmp_path) == Control(paused=True, leaving=True)
    (tmp_path / "control.json").write_text("[1]")
    assert read_control(tmp_path) == Control()
    assert read_status(tmp_path) is None
    (tmp_path / "status.json").write_text('{"pid": 1, "engines": [{}]}')
    assert read_status(tmp_path) is None


@pytest.mark.parametrize(("command", "paused"), [("pause", True), ("resume", False)])
def test_what_was_asked_of_the_agent_as_json(config: Path, tmp_path: Path, command: str, paused: bool) -> None:
    folder = StateFolder(tmp_path / "node")
    folder.create()
    certificate = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    connection = ConnectionDocument(1, "pool", 8601, 8602, "localhost", certificate)
    folder.write_identity(NodeIdentity(NodeId("n"), AccountId("acct_a"), "attic", "http://localhost", connection))
    told = CliRunner().invoke(app, [command, "--json", "--state-dir", str(folder.path)])
    assert (told.exit_code, json.loads(told.stdout)) == (0, {"paused": paused, "running": False})
    assert read_control(folder.path).paused is paused
