"""Small parts of the agent: the stderr ring, what engines see of the environment."""

from __future__ import annotations

import os
from types import SimpleNamespace

import aiohttp
import pytest

from potluck_node.child_process import STDERR_LINE_BYTES_MAX, STDERR_LINES_MAX, ChildProcess, StderrTail
from potluck_node.engines import process
from potluck_node.engines.base import FAILURE_CHARACTERS_MAX, EngineLaunch
from potluck_node.engines.process import EngineFailedError, EngineProcess, engine_environment
from potluck_node.engines.registry import available_engines
from potluck_node.model_store.sources import client_environment
from potluck_node.report import ENGINES_MAX, NodeReport
from potluck_node.settings import Settings
from potluck_protocol.clock import SystemClock
from potluck_protocol.values import EngineState, EngineStatus, FailureKind, Inventory, ModelId, ReplicaId, SessionId


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
    seen = engine_environment({"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", "HF_TOKEN": "s", "POTLUCK_API_KEY": "s", "AWS_SECRET": "s"})
    assert seen == {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "0",
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
    shouting = SimpleNamespace(kind="shouting", arguments=lambda _: SHOUTING)
    async with aiohttp.ClientSession() as session:
        with pytest.raises(EngineFailedError) as failure:
            await EngineProcess.start(shouting, launch, os.environ, session)
    assert str(failure.value).startswith("the engine did not start: exit status 1\n")
    assert str(failure.value).endswith("the reason: bad_alloc")
    assert len(str(failure.value)) == FAILURE_CHARACTERS_MAX


async def test_an_engine_that_the_kernel_killed_for_want_of_memory_says_so_although_it_could_not(tmp_path, monkeypatch):
    counts = tmp_path / "vmstat"
    counts.write_text("pgfault 7\noom_kill 1\n")
    monkeypatch.setattr(process, "_KERNEL_COUNTS", counts)
    for count, kind in ((1, FailureKind.KILLED), (2, FailureKind.OUT_OF_MEMORY)):
        code = f"import os; open({str(counts)!r}, 'w').write('pgfault 9\\noom_kill {count}\\n'); os.kill(os.getpid(), 9)"
        engine = EngineProcess(await ChildProcess.spawn(("-c", code), os.environ))
        assert (await engine.wait()).kind is kind
        await engine.stop()
    monkeypatch.setattr(process, "_KERNEL_COUNTS", tmp_path / "not" / "there")
    engine = EngineProcess(await ChildProcess.spawn(("-c", "import os; os.kill(os.getpid(), 9)"), os.environ))
    assert (await engine.wait()).kind is FailureKind.KILLED
    await engine.stop()


async def test_of_an_engine_that_ended_only_known_causes_are_told():
    engine = EngineProcess(await ChildProcess.spawn(SHOUTING, os.environ))
    failure = await engine.wait()
    await engine.stop()
    assert str(failure) == "the engine ended: exit status 1; its last lines speak of bad_alloc"
    assert failure.kind is FailureKind.OUT_OF_MEMORY


def test_a_node_says_a_bounded_amount_of_itself(tmp_path):
    def status(number: int) -> EngineStatus:
        return EngineStatus(ReplicaId(f"r{number}"), ModelId("tiny"), EngineState.BACKING_OFF, "scripted", failure="x" * 9_999 + "end")

    report = NodeReport(
        credentials=SimpleNamespace(identity=SimpleNamespace(node_id="n")),
        session_id=SessionId("s"),
        inventory=Inventory(),
        replicas=SimpleNamespace(statuses=lambda: tuple(status(number) for number in range(100))),
        cache_dir=tmp_path,
        slot_count_max=None,
        clock=SystemClock(),
    )
    for engines in (report.hello(()).engines, report.heartbeat().engines):
        assert [engine.replica_id for engine in engines] == [f"r{number}" for number in range(ENGINES_MAX)]
        assert {(len(engine.failure), engine.failure[-3:]) for engine in engines} == {(FAILURE_CHARACTERS_MAX, "end")}
    assert (ENGINES_MAX, FAILURE_CHARACTERS_MAX) == (64, 2_000)
