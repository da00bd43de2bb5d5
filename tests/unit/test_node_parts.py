"""Small parts of the agent: the stderr ring, what engines see of the environment."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import aiohttp
import pytest
from typer.testing import CliRunner

from potluck_node import command
from potluck_node.child_process import STDERR_LINE_BYTES_MAX, STDERR_LINES_MAX, ChildProcess, StderrTail
from potluck_node.command import app
from potluck_node.control import AgentStatus, EngineLine, write_status
from potluck_node.domain.rest import NO_WORD
from potluck_node.domain.session import Session
from potluck_node.domain.solo_rates import SoloRates
from potluck_node.engines import last_lines
from potluck_node.engines.base import FAILURE_CHARACTERS_MAX, EngineLaunch
from potluck_node.engines.metrics_words import EngineLoad
from potluck_node.engines.process import EngineFailedError, EngineProcess, engine_environment
from potluck_node.engines.registry import available_engines
from potluck_node.identity_store import NodeIdentity, StateFolder
from potluck_node.model_store.sources import client_environment
from potluck_node.probe import kernel_kills
from potluck_node.replicas import Residence
from potluck_node.report import ENGINES_MAX, NodeReport
from potluck_node.settings import Settings
from potluck_protocol.clock import SystemClock
from potluck_protocol.connection import ConnectionDocument
from potluck_protocol.values import (
    AccountId,
    EngineState,
    EngineStatus,
    FailureKind,
    Inventory,
    ModelId,
    NodeId,
    ReplicaId,
    SessionId,
)
from tests.support.kernel_counts import count_kills


def test_stderr_tail_keeps_the_last_lines_however_they_are_cut():
    tail = StderrTail()
    text = "".join(f"line {index}\n" for index in range(500)).encode()
    for start in range(0, len(text), 7):
        tail.add(text[start : start + 7])
    assert tail.text().splitlines() == [f"line {index}" for index in range(500 - STDERR_LINES_MAX, 500)]
    assert tail.text(2) == "line 498\nline 499"


def test_stderr_tail_is_bounded_whatever_comes():
    tail = StderrTail()
    tail.add(b"x" * 1_000_000)
    tail.add(b"\xff\n\n" + b"y" * 1_000_000 + b"\n")
    assert len(tail.text()) <= 2 * STDERR_LINE_BYTES_MAX + 1
    assert tail.text().startswith("xxx")


def test_engines_see_no_secret_and_may_fetch_nothing():
    kept = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", "TORCHINDUCTOR_CACHE_DIR": "/fast/disk"}
    seen = engine_environment({"HF_TOKEN": "s", "POTLUCK_API_KEY": "s", "AWS_SECRET": "s", **kept})
    assert seen == {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def test_package_clients_keep_their_own_settings_and_see_none_of_ours():
    assert client_environment({"HF_TOKEN": "t", "PIP_INDEX_URL": "u", "POTLUCK_NODE_X": "s"}) == {"HF_TOKEN": "t", "PIP_INDEX_URL": "u"}


def test_every_engine_tells_what_the_plan_and_the_link_need():
    for kind, engine in available_engines(Settings(scripted_engine=True)).items():
        assert engine.kind == kind
        assert engine.version
        assert engine.endpoints


def test_the_engine_that_makes_its_answers_up_is_offered_only_where_the_owner_says_so():
    assert "scripted" not in available_engines(Settings())
    assert set(available_engines(Settings(scripted_engine=True))) - set(available_engines(Settings())) == {"scripted"}
    assert not Settings().scripted_engine


SHOUTING = ("-c", "import sys; [print(str(n) * 290, file=sys.stderr) for n in range(10, 60)]; raise SystemExit('the reason: bad_alloc')")


async def test_the_last_words_of_an_engine_that_did_not_start_are_bounded_and_keep_what_happened(tmp_path):
    launch = EngineLaunch(ModelId("tiny"), tmp_path, slot_count=1, context_length_tokens=64)
    shouting = SimpleNamespace(kind="shouting", variables={}, arguments=lambda _: SHOUTING)
    async with aiohttp.ClientSession() as session:
        with pytest.raises(EngineFailedError) as failure:
            await EngineProcess.start(shouting, launch, os.environ, session)
    assert str(failure.value).startswith("the engine did not start: exit status 1\n")
    assert str(failure.value).endswith("the reason: bad_alloc")
    assert len(str(failure.value)) == FAILURE_CHARACTERS_MAX


async def test_an_engine_that_the_kernel_killed_for_want_of_memory_says_so_although_it_could_not(tmp_path, monkeypatch):
    counts = tmp_path / "vmstat"
    counts.write_text("pgfault 7\noom_kill 1\n")
    count_kills(monkeypatch, counts)
    for count, kind in ((1, FailureKind.KILLED), (2, FailureKind.OUT_OF_MEMORY)):
        engine = EngineProcess(ChildProcess.spawn(("-c", "import time; time.sleep(60)"), os.environ))
        counts.write_text(f"pgfault 9\noom_kill {count}\n")
        os.kill(engine.pid, signal.SIGKILL)
        assert (await engine.wait()).kind is kind
        await engine.stop()
    count_kills(monkeypatch, tmp_path / "not" / "there")
    engine = EngineProcess(ChildProcess.spawn(("-c", "import os; os.kill(os.getpid(), 9)"), os.environ))
    assert (await engine.wait()).kind is FailureKind.KILLED
    await engine.stop()


async def test_what_the_kernel_killed_long_before_is_no_engines_end(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_kills, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(kernel_kills, "MACHINE_SECONDS_MAX", 0.1)
    counts = tmp_path / "vmstat"
    counts.write_text("oom_kill 1\n")
    count_kills(monkeypatch, counts)
    engine = EngineProcess(ChildProcess.spawn(("-c", "import time; time.sleep(60)"), os.environ))
    counts.write_text("oom_kill 2\n")
    await asyncio.sleep(0.5)
    os.kill(engine.pid, signal.SIGKILL)
    assert (await engine.wait()).kind is FailureKind.KILLED
    await engine.stop()


async def test_of_an_engine_that_ended_only_known_causes_are_told():
    engine = EngineProcess(ChildProcess.spawn(SHOUTING, os.environ))
    failure = await engine.wait()
    await engine.stop()
    assert str(failure) == "the engine ended: exit status 1; its last lines speak of bad_alloc"
    assert failure.kind is FailureKind.OUT_OF_MEMORY


@pytest.mark.parametrize("condemned", [False, True])
async def test_the_last_lines_of_an_engine_that_had_served_are_kept_for_the_owner_alone_and_only_if_he_wants_them(
    tmp_path, capfd, condemned
):
    state = tmp_path / "state"
    state.mkdir()
    for folder, expected in ((None, []), (state / last_lines.FOLDER_NAME, [state / last_lines.FOLDER_NAME / "shouting.txt"])):
        engine = EngineProcess(ChildProcess.spawn(SHOUTING, os.environ), "shouting", folder)
        await engine._child.wait()
        if condemned:
            engine.condemn("the engine hung: it said nothing")
        failure = await engine.wait()
        await engine.stop()
        assert last_lines.kept(state) == expected
        assert "the reason" not in str(failure)
        assert str(tmp_path) not in str(failure)
    (path,) = last_lines.kept(state)
    lines = path.read_text().splitlines()
    assert (len(lines), lines[-1]) == (51, "the reason: bad_alloc")
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    output = "".join(capfd.readouterr())
    assert "engine_lines_kept" in output
    assert "the reason" not in output
    last_lines.forget(state)
    assert list(state.iterdir()) == []


async def test_lines_that_cannot_be_kept_harm_nothing(tmp_path):
    (tmp_path / "file").touch()
    engine = EngineProcess(ChildProcess.spawn(SHOUTING, os.environ), "shouting", tmp_path / "file")
    assert (await engine.wait()).kind is FailureKind.OUT_OF_MEMORY
    await engine.stop()


def test_the_status_names_the_kept_lines_or_says_how_to_have_them_kept(tmp_path, monkeypatch):
    folder = StateFolder(tmp_path / "node")
    connection = ConnectionDocument(1, "pool", 1, 2, "x.invalid", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    folder.create()
    folder.write_identity(NodeIdentity(NodeId("n"), AccountId("o"), "attic", "https://x.invalid", connection))
    line = EngineLine("r", "m", "backing_off", "vllm", 1, 0, 1, 1, "the engine ended: exit status 1")
    status = AgentStatus(1, "n", "serving", "serving", 1, 1.0, 0, 0, 0, time.time_ns() // 1_000_000, "", (line,))
    arguments = ["status", "--state-dir", str(folder.path)]
    with folder.lock():
        write_status(folder.path, status)
        assert "POTLUCK_NODE_KEEP_ENGINE_LINES=true" in CliRunner().invoke(app, arguments).stdout
        # The agent's setting counts, not that of the shell where `status` is typed.
        monkeypatch.setenv("POTLUCK_NODE_KEEP_ENGINE_LINES", "true")
        assert "POTLUCK_NODE_KEEP_ENGINE_LINES=true" in CliRunner().invoke(app, arguments).stdout
        monkeypatch.delenv("POTLUCK_NODE_KEEP_ENGINE_LINES")
        write_status(folder.path, replace(status, engine_lines_are_kept=True))
        last_lines.keep(folder.path / last_lines.FOLDER_NAME, "vllm", "what it said")
        shown = CliRunner().invoke(app, arguments).stdout
    kept = folder.path / last_lines.FOLDER_NAME / "vllm.txt"
    assert f"last lines   {kept}; they may quote prompts and answers" in shown
    assert "POTLUCK_NODE_KEEP_ENGINE_LINES" not in shown
    assert "what it said" not in shown
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["engine_lines"] == [str(kept)]


@pytest.mark.parametrize(
    ("state", "kind", "failure", "failure_kind", "below"),
    [
        (
            "starting",
            "attach",
            "the engine ended: exit status 1; its last lines speak of X",
            "killed",
            ["the engine ended: exit status 1; its last lines speak of X"],
        ),
        ("backing_off", "attach", "the engine ended: exit status 1", "crashed", []),
        ("starting", "vllm", "the engine ended: SIGKILL", "killed", ["the engine ended: SIGKILL"]),
        ("starting", "vllm", "the engine ended: SIGSEGV", "crashed", ["the engine ended: SIGSEGV", "hint"]),
        ("backing_off", "vllm", "the engine ended: SIGSEGV", "crashed", ["hint"]),
        (
            "backing_off",
            "vllm",
            "the engine did not start: exit status 1\nno such file",
            "not_started",
            ["the engine did not start: exit status 1", "no such file"],
        ),
        ("ready", "vllm", "", "", []),
    ],
)
def test_what_an_engine_failed_of_is_told_once_and_the_hint_only_where_there_may_be_lines(state, kind, failure, failure_kind, below):
    line = EngineLine("r", "m", state, kind, 1, 0, 1, 1, failure, failure_kind)
    status = AgentStatus(1, "n", "serving", "serving", 1, 1.0, 0, 0, 0, time.time_ns() // 1_000_000, "", (line,))
    facts = dict.fromkeys(("node_id", "display_name", "owner_account_id", "coordinator"), "x") | {"engine_lines": []}
    shown = command._status_words(facts, NO_WORD, status).splitlines()
    first = next(number for number, words in enumerate(shown) if words.startswith("engine "))
    told = [words.removeprefix("             | ") for words in shown[first + 1 :]]
    assert ["hint" if "KEEP_ENGINE_LINES" in words else words for words in told] == below


def test_of_an_engine_that_said_nothing_nothing_is_kept(tmp_path):
    last_lines.keep(tmp_path / "lines", "vllm", "of the failure before")
    for nothing in ("", "\n", " \n\n"):
        last_lines.keep(tmp_path / "lines", "vllm", nothing)
        assert list((tmp_path / "lines").iterdir()) == []


def test_a_node_says_a_bounded_amount_of_itself(tmp_path):
    def status(number: int) -> EngineStatus:
        return EngineStatus(
            ReplicaId(f"r{number}"),
            ModelId("tiny"),
            EngineState.BACKING_OFF,
            "scripted",
            failure="x" * 9_999 + "end",
            failure_kind=FailureKind.CRASHED,
        )

    report = NodeReport(
        credentials=SimpleNamespace(identity=SimpleNamespace(node_id="n"), valid_until_unix_ms=0),
        session_id=SessionId("s"),
        inventory=Inventory(),
        replicas=SimpleNamespace(
            statuses=lambda: tuple(status(number) for number in range(100)),
            cards_given=lambda: frozenset({"GPU-1", "GPU-2"}),
            residence=lambda replica_id: Residence(7, ("GPU-2",)) if replica_id == "r1" else None,
        ),
        attempts=SimpleNamespace(
            progress_count=0, running_count=lambda _: 0, watches=SimpleNamespace(solo=SimpleNamespace(rates=lambda _: SoloRates()))
        ),
        readings=SimpleNamespace(load=lambda _: EngineLoad(), memory_bytes=lambda _: None),
        heat=SimpleNamespace(cards=tuple, lines=tuple, cap_refusal="", slots=lambda _, slot_count: slot_count),
        peers=SimpleNamespace(measurements=tuple),
        line=SimpleNamespace(found=None),
        attached=SimpleNamespace(model_names=(), lines=()),
        cache_dir=tmp_path,
        slot_count_max=None,
        clock=SystemClock(),
    )
    for engines in (report.hello(()).engines, report.heartbeat().engines):
        assert [engine.replica_id for engine in engines] == [f"r{number}" for number in range(ENGINES_MAX)]
        assert {(len(engine.failure), engine.failure[-3:]) for engine in engines} == {(FAILURE_CHARACTERS_MAX, "end")}
    assert (ENGINES_MAX, FAILURE_CHARACTERS_MAX) == (64, 2_000)
    told = report.status(Session(), "")
    assert (told.card_uuids, told.serving_card_uuids) == (("GPU-1", "GPU-2"), ("GPU-2",))
    assert {engine.failure_kind for engine in told.engines} == {"crashed"}
