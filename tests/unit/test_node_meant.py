"""Which node the owner's commands speak to where nobody names one, and what they say of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from potluck_node.command import app
from potluck_node.control import read_control
from potluck_node.domain.rest import Posture
from potluck_node.identity_store import NodeIdentity, StateFolder
from potluck_node.node_meant import Place, meant
from potluck_protocol.connection import ConnectionDocument
from potluck_protocol.values import AccountId, NodeId

USUAL, OF_UP = "a" * 26, "b" * 26


class Machine:
    """Folders as `join` and `potluck up` make them; an agent that runs is its lock."""

    def __init__(self, state: Path, stack: ExitStack) -> None:
        self.usual = StateFolder(state / "potluck" / "node")
        self.of_up = StateFolder(state / "potluck" / "up" / "node")
        self._stack = stack

    def joins(self, folder: StateFolder, node_id: str) -> None:
        folder.create()
        document = ConnectionDocument(1, "pool", 8601, 8602, "localhost", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        folder.write_identity(NodeIdentity(NodeId(node_id), AccountId("account"), "box", "https://localhost", document))

    def runs(self, folder: StateFolder) -> None:
        self._stack.enter_context(folder.lock())


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.delenv("POTLUCK_NODE_STATE_DIR", raising=False)
    for name in ("CONFIG", "STATE", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    with ExitStack() as stack:
        yield Machine(tmp_path / "state", stack)


def typed(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def flag(folder: StateFolder) -> str:
    return f"--state-dir {shlex.quote(str(folder.path))}"


@pytest.mark.parametrize(
    ("usual", "of_up", "is_of_up", "words"),
    [
        ((False, False), (False, False), False, ""),
        ((True, True), (False, False), False, ""),
        ((True, True), (True, False), False, ""),
        ((True, False), (True, False), False, ""),
        ((False, False), (True, True), True, "This is the node of `potluck up`, in /up."),
        ((True, False), (True, True), True, "/up. The one in /usual does not run; it is meant with --state-dir /usual."),
        ((True, True), (True, True), False, "node in /usual. That of `potluck up` runs, too; it is meant with --state-dir /up."),
    ],
)
def test_the_one_that_runs_is_meant_and_whoever_could_mean_another_is_told(usual, of_up, is_of_up, words):
    places = Place(Path("/usual"), *usual), Place(Path("/up"), *of_up)
    place, said = meant(*places)
    assert (place, words in said, bool(said)) == (places[is_of_up], True, bool(words))


def test_the_node_of_up_is_found_and_named(machine: Machine):
    machine.joins(machine.of_up, OF_UP)
    machine.runs(machine.of_up)
    shown = typed("status", "--json")
    assert (shown.exit_code, json.loads(shown.stdout)["node_id"]) == (0, OF_UP), shown.output
    assert shown.stderr == f"This is the node of `potluck up`, in {machine.of_up.path}.\n"


def test_a_folder_that_was_named_is_taken_without_a_word(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    machine.joins(machine.usual, USUAL)
    machine.joins(machine.of_up, OF_UP)
    machine.runs(machine.of_up)
    named = typed("status", "--json", *shlex.split(flag(machine.usual)))
    assert (json.loads(named.stdout)["node_id"], named.stderr) == (USUAL, "")
    monkeypatch.setenv("POTLUCK_NODE_STATE_DIR", str(machine.usual.path))
    assert json.loads(typed("status", "--json").stdout)["node_id"] == USUAL
    monkeypatch.delenv("POTLUCK_NODE_STATE_DIR")
    (tmp_path / "config" / "potluck").mkdir(parents=True)
    (tmp_path / "config" / "potluck" / "node.toml").write_text(f'state_dir = "{machine.usual.path}"')
    assert json.loads(typed("status", "--json").stdout)["node_id"] == USUAL


@pytest.mark.parametrize("command", ["status", "pause", "finish", "resume"])
def test_of_an_up_that_does_not_run_it_is_said_how_to_reach_its_node(machine: Machine, command: str):
    machine.joins(machine.of_up, OF_UP)
    refused = typed(command)
    assert refused.exit_code == 1
    assert f"start it so, or name it with {flag(machine.of_up)}" in refused.stderr
    assert read_control(machine.of_up.path).word.posture is Posture.SERVE
    assert typed(command, *shlex.split(flag(machine.of_up))).exit_code == 0


@pytest.mark.parametrize("text", ["temprature_celsius_max = 60", "hours = 5", "drain_seconds = inf", "[node"])
@pytest.mark.parametrize("command", ["pause", "finish", "resume", "status"])
def test_a_slip_in_the_settings_is_told_of_and_keeps_nobody_from_their_machine(machine: Machine, tmp_path: Path, command: str, text: str):
    machine.joins(machine.usual, USUAL)
    file = tmp_path / "config" / "potluck" / "node.toml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    answered = typed(command)
    assert (answered.exit_code, "warning: " in answered.stderr, str(file) in answered.stderr) == (0, True, True), answered.output
    assert read_control(machine.usual.path).word.posture.value == {"pause": "hand_over", "finish": "finish"}.get(command, "serve")
    named = typed(command, *shlex.split(flag(machine.usual)))
    assert named.exit_code == 0


def test_a_folder_that_the_file_names_counts_whatever_else_is_wrong_there(machine: Machine, tmp_path: Path):
    machine.joins(machine.usual, USUAL)
    elsewhere = StateFolder(tmp_path / "elsewhere")
    machine.joins(elsewhere, OF_UP)
    file = tmp_path / "config" / "potluck" / "node.toml"
    file.parent.mkdir(parents=True)
    file.write_text(f"state_dir = '{elsewhere.path}'\ntemprature_celsius_max = 60")
    assert typed("pause").exit_code == 0
    assert read_control(elsewhere.path).word.posture is Posture.HAND_OVER
    assert read_control(machine.usual.path).word.posture is Posture.SERVE
    typed("resume")
    for text in ("state_dir = 5", f"state_dir = '{elsewhere.path}'\nhours = ['22:00-07:00'"):
        file.write_text(text)
        refused = typed("pause")
        assert (refused.exit_code, "--state-dir" in refused.stderr) == (1, True)
        assert {read_control(folder.path).word.posture for folder in (elsewhere, machine.usual)} == {Posture.SERVE}, "nobody else's"
        assert typed("pause", *shlex.split(flag(elsewhere))).exit_code == 0
        typed("resume", *shlex.split(flag(elsewhere)))


def test_a_machine_without_any_node_is_told_to_join(machine: Machine):
    refused = typed("pause")
    assert (refused.exit_code, "run `potluck node join INVITE` first" in refused.stderr) == (1, True)


def test_the_node_of_up_leaves_only_where_it_is_named(machine: Machine):
    machine.joins(machine.of_up, OF_UP)
    machine.runs(machine.of_up)
    refused = typed("leave", "--force")
    assert (refused.exit_code, flag(machine.of_up) in refused.stderr) == (1, True)
    assert machine.of_up.joined


def test_a_folder_of_somebody_else_is_no_node_of_ones_own(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    machine.joins(machine.usual, USUAL)
    real = StateFolder.locked.fget

    def locked(folder: StateFolder) -> bool:
        if folder.path == machine.of_up.path:
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(StateFolder, "locked", property(locked))
    shown = typed("status", "--json")
    assert (shown.exit_code, json.loads(shown.stdout)["node_id"], shown.stderr) == (0, USUAL, "")
