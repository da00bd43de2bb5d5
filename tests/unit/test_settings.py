"""Which source of a setting wins, and what an operator is told about a wrong one."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from potluck_coordinator.command import public_url
from potluck_coordinator.settings import Settings, default_data_dir, load_settings
from potluck_protocol.errors import ErrorCode, PotluckError


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("HTTP_PORT", "GRPC_PORT", "LINK_PORT", "DATA_DIR"):
        monkeypatch.delenv(f"POTLUCK_COORDINATOR_{name}", raising=False)


def test_a_flag_beats_the_environment_and_that_beats_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('http_port = 1\ngrpc_port = 1001\nlink_port = 1002\ndata_dir = "/from/file"\n')
    monkeypatch.setenv("POTLUCK_COORDINATOR_HTTP_PORT", "2")
    monkeypatch.setenv("POTLUCK_COORDINATOR_GRPC_PORT", "2001")

    settings = load_settings({"http_port": 3, "data_dir": None}, file)

    assert (settings.http_port, settings.grpc_port, settings.link_port) == (3, 2001, 1002)
    assert settings.data_dir == Path("/from/file")


def test_defaults_are_loopback_the_three_ports_and_the_xdg_folder(tmp_path: Path) -> None:
    settings = load_settings({})

    assert (settings.host, settings.http_port, settings.grpc_port, settings.link_port) == ("127.0.0.1", 8600, 8601, 8602)
    assert settings.data_dir == tmp_path / "state/potluck/coordinator"
    assert settings.database_url == f"sqlite:///{tmp_path}/state/potluck/coordinator/potluck.db"
    assert settings.grant_micro_credits == 1_000_000_000


def test_a_relative_xdg_folder_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "relative")

    assert default_data_dir() == tmp_path / ".local/state/potluck/coordinator"


def test_settings_built_directly_read_no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POTLUCK_COORDINATOR_HTTP_PORT", "9")

    assert Settings(data_dir=tmp_path).http_port == 8600


def test_settings_are_frozen_and_travel_between_processes(tmp_path: Path) -> None:
    settings = load_settings({"data_dir": tmp_path})

    assert type(settings) is Settings
    assert pickle.loads(pickle.dumps(settings)) == settings
    with pytest.raises(ValidationError):
        settings.http_port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"http_port": 70_000}, "http_port"),
        ({"http_port": "abc"}, "http_port"),
        ({"http_port": 8601}, "must differ"),
        ({"fee_basis_points": 10_001}, "fee_basis_points"),
        ({"http_tls_key": Path("key.pem")}, "go together"),
        ({"lease_ttl_ms": 5_000}, "lease_ttl_ms"),
        ({"log_format": "xml"}, "log_format"),
        ({"no_such_setting": 1}, "no_such_setting"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(flags: dict[str, object], named: str) -> None:
    with pytest.raises(PotluckError, match=named) as caught:
        load_settings(flags)
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_a_wrong_value_is_not_repeated_to_the_log() -> None:
    with pytest.raises(PotluckError) as caught:
        load_settings({"grant_credits": "postgresql://ann:hunter2@db/potluck"})
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(("text", "says"), [(None, "there is no settings file"), ("= = =", "cannot read the settings")])
def test_a_missing_or_broken_file_is_said_to_be_so(tmp_path: Path, text: str | None, says: str) -> None:
    file = tmp_path / "settings.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(PotluckError, match=says):
        load_settings({}, file)


@pytest.mark.parametrize(
    ("host", "public_host", "tls", "expected"),
    [
        ("127.0.0.1", None, False, "http://127.0.0.1:8600"),
        ("192.0.2.7", None, False, "http://192.0.2.7:8600#PIN"),
        ("0.0.0.0", "pool.example", False, "http://pool.example:8600#PIN"),
        ("0.0.0.0", "pool.example", True, "https://pool.example:8600"),
        ("::1", None, False, "http://[::1]:8600"),
    ],
)
def test_the_url_carries_the_pin_where_nothing_else_vouches_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str, public_host: str | None, tls: bool, expected: str
) -> None:
    monkeypatch.setattr("potluck_coordinator.command.certificate_hash", lambda _: "PIN")
    files = {"http_tls_certificate": tmp_path / "c", "http_tls_key": tmp_path / "k"} if tls else {}
    settings = Settings(data_dir=tmp_path, host=host, public_host=public_host, **files)

    assert public_url(settings, "pem") == expected
