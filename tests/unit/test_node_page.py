"""docs/node.md against the code: every setting stands there once, with its own default, and every command and example works."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from potluck_node import command, settings
from potluck_node.domain.rest import EDGE_BYTES, GIB, LEFT_BYTES, LEFT_SECONDS, TAKEN_BYTES
from potluck_node.rest_command import parse_duration
from potluck_node.settings import Settings, load_settings

PAGE = (Path(__file__).parents[2] / "docs/node.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", re.MULTILINE)
OF_HOME = {"state_dir", "cache_dir"}


def rows() -> dict[str, str]:
    """What stands for the default of each setting."""
    table = PAGE[PAGE.index("| Setting |") :]
    found = ROW.findall(table)
    assert len({name for name, _, _ in found}) == len(found), "a setting stands there twice"
    return {name: default for name, default, _ in found}


def test_every_setting_stands_there_and_no_other():
    assert set(rows()) == set(Settings.model_fields)


@pytest.mark.parametrize("name", sorted(set(Settings.model_fields) - OF_HOME))
def test_the_default_that_stands_there_is_the_settings_own(name):
    default, told = Settings.model_fields[name].default, rows()[name]
    if default in {None, "", ()}:
        assert "`" not in told.replace("`engines install`", ""), "it is said in words what no value means"
    else:
        assert told == f"`{str(default).lower()}`"


@pytest.mark.parametrize("name", sorted(OF_HOME))
def test_the_folders_that_stand_there_are_those_of_a_machine_without_settings(name, tmp_path, monkeypatch):
    for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", f"POTLUCK_NODE_{name.upper()}"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rows()[name] == f"`{str(getattr(Settings(), name)).replace(str(tmp_path), '~')}`"


def test_the_example_can_be_read(tmp_path, monkeypatch):
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    file = tmp_path / "node.toml"
    file.write_text(example)
    monkeypatch.setattr(settings, "config_path", lambda: file)
    read = load_settings()
    for name, value in tomllib.loads(example).items():
        assert getattr(read, name) == (tuple(value) if isinstance(value, list) else value)


def test_every_command_that_stands_there_is_one():
    group = typer.main.get_command(command.app)
    for line in re.findall(r"`potluck node (.+?)`", PAGE):
        name, *flags = line.split()
        assert name in group.commands, line
        for flag in flags:
            if flag.startswith("--"):
                assert any(flag in option.opts for option in group.commands[name].params), line
    for words in re.findall(r"`(\d+[smhd](?:\d+[smhd])?)`", PAGE):
        assert parse_duration(words) > 0
    assert CliRunner().invoke(command.app, ["pause", "--help"]).exit_code == 0


def test_the_figures_that_stand_there_are_the_codes_own():
    assert f"hold {TAKEN_BYTES // GIB} GiB or more of a card" in PAGE
    assert f"less than {LEFT_BYTES // GIB} GiB for a minute" in PAGE
    edge, most = EDGE_BYTES / GIB, (TAKEN_BYTES - EDGE_BYTES) / GIB
    assert f"{LEFT_BYTES / GIB - edge} GiB before" in PAGE
    assert f"{edge} GiB more than that, up to {most} GiB" in PAGE
    assert LEFT_SECONDS == 60
    assert "up to 1440" in PAGE
    assert max(part.le for part in Settings.model_fields["idle_minutes"].metadata if hasattr(part, "le")) == 1440
    assert min(part.ge for part in Settings.model_fields["upload_bytes_per_second_max"].metadata if hasattr(part, "ge")) == 1000
