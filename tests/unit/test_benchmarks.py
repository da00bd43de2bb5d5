"""The benchmark's arithmetic, its verdicts, and its load client against a real engine."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from potluck_node.engines.script import Script
from potluck_node.engines.scripted_server import ScriptedServer, serve
from tests.benchmarks.arithmetic import (
    Estimate,
    Figures,
    Mark,
    differences,
    estimate,
    micros_per_unit,
    order_of_round,
    ratios,
    total,
    weighted_mean,
)
from tests.benchmarks.contenders import Contender
from tests.benchmarks.load import (
    ANSWER_TOKENS,
    Load,
    LoadFailedError,
    LoadResult,
    Target,
    decode_command,
    decode_result,
    encode_command,
    encode_failure,
    encode_result,
    expected_text,
)
from tests.benchmarks.load_client import check_answer, run_load, streamed_text
from tests.benchmarks.processes import Child, CpuReading, cpu_seconds, descendants, resident_bytes, title
from tests.benchmarks.relay import STUMBLES_MAX, Benchmark
from tests.benchmarks.report import Outcome, Standing, document, marks, table

SMALL = Load(streamed=True, connection_count=3, requests_per_connection=1, token_count=30, limit_seconds=10)


def test_every_other_round_runs_backwards() -> None:
    assert [order_of_round(("a", "b", "c"), index) for index in range(3)] == [("a", "b", "c"), ("c", "b", "a"), ("a", "b", "c")]


def test_an_estimate_is_the_median_between_bounds_that_the_samples_span() -> None:
    found = estimate([5.0, 1.0, 3.0, 2.0, 100.0])
    assert found.median == 3.0
    assert 1.0 <= found.low <= found.median <= found.high <= 100.0
    assert estimate([5.0, 1.0, 3.0, 2.0, 100.0]) == found
    assert estimate([7.0]) == Estimate(7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no rounds"):
        estimate([])


def test_ratios_are_taken_within_one_round() -> None:
    # The machine was twice as slow in the second round; the ratio does not see it.
    assert ratios([2.0, 4.0], [10.0, 20.0]) == [0.2, 0.2]
    assert differences([2.0, 4.0], [1.0, 3.5]) == [1.0, 0.5]
    with pytest.raises(ValueError, match="2 rounds cannot be compared with 1"):
        ratios([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="without any cost"):
        ratios([1.0], [0.0])


def test_costs_per_unit_and_sums() -> None:
    costs = micros_per_unit({"gateway": 0.02, "agent": 0.05}, 1000)
    assert costs == pytest.approx({"gateway": 20.0, "agent": 50.0})
    assert total(costs, ("gateway",)) == pytest.approx(20.0)
    assert weighted_mean([(0.0, 3.0), (1.0, 1.0)]) == 0.25
    with pytest.raises(ValueError, match="nothing was counted"):
        micros_per_unit({"gateway": 1.0}, 0)


@pytest.mark.parametrize(
    ("found", "met"),
    [(Estimate(1.0, 0.9, 2.0), True), (Estimate(1.0, 0.9, 2.1), False), (Estimate(3.0, 2.9, 3.1), False), (None, None)],
)
def test_a_mark_is_met_by_the_worse_end_of_its_interval(found: Estimate | None, met: bool | None) -> None:
    assert Mark("a cost", 2.0, "x", found).met is met


def _figures(cost: float, first_token_ms: float, groups: tuple[str, ...]) -> Figures:
    costs = dict.fromkeys(groups, cost / len(groups))
    return Figures(costs, costs, costs, first_token_ms, first_token_ms, 1.0, 100.0, 5000.0, 0.01)


_POTLUCK_GROUPS = ("gateway", "directory", "driver", "ray", "agent", "engine")
_GROUPS = {
    "direct": (),
    "Potluck": ("gateway", "directory", "driver"),
    "LiteLLM": ("relay",),
    "sglang-router": ("relay",),
}


def _outcome() -> Outcome:
    seen = {"direct": ("engine",), "Potluck": _POTLUCK_GROUPS, "LiteLLM": ("relay",), "sglang-router": ("relay",)}
    # Potluck's relay is half of its groups: 30 of 60.
    costs = {"direct": (20.0, 1.0), "Potluck": (60.0, 3.0), "LiteLLM": (500.0, 9.0), "sglang-router": (15.0, 45.0)}
    return Outcome(
        rounds={name: [_figures(*costs[name], seen[name])] * 3 for name in seen},
        relay_groups=_GROUPS,
        standings={name: Standing(dict.fromkeys(seen[name], 2**20), dict.fromkeys(seen[name], 1.0)) for name in seen},
        absent={},
        stumbles={},
        pinned=True,
        seconds=60.0,
    )


def test_the_marks_compare_the_coordinator_alone() -> None:
    to_litellm, to_router, first_token = marks(_outcome())
    assert to_litellm.estimate is not None
    assert to_litellm.estimate.median == pytest.approx(0.06)
    assert to_router.estimate is not None
    assert to_router.estimate.median == pytest.approx(2.0)
    assert first_token.estimate == Estimate(2.0, 2.0, 2.0)
    assert [mark.met for mark in (to_litellm, to_router, first_token)] == [True, True, True]


def test_a_peer_that_could_not_run_costs_only_its_own_row() -> None:
    outcome = _outcome()
    del outcome.rounds["LiteLLM"]  # type: ignore[attr-defined]
    outcome = replace(outcome, absent={"LiteLLM": "cannot be installed: no network"})
    assert [mark.met for mark in marks(outcome)] == [None, True, True]
    printed = table(outcome)
    assert "LiteLLM: not measured: cannot be installed: no network" in printed
    assert "PROVISIONAL" not in printed


_PORTS = {"Potluck": 1, "LiteLLM": 2}
"""Nobody listens there: what tells one contender from another."""


class Stumbling:
    """A load client whose answers to one contender break off so many times."""

    def __init__(self, name: str, failure_count: int) -> None:
        self.port, self.failures_left = _PORTS[name], failure_count

    def run(self, _load: Load, target: Target) -> LoadResult:
        if target.port == self.port and self.failures_left:
            self.failures_left -= 1
            raise LoadFailedError("an answer is short")
        return LoadResult((1.0,), (1.0,), 1.0, 100, 10, {"relay": 0.1}, 0.0)


def _contender(name: str) -> Contender:
    return Contender(name, f"http://127.0.0.1:{_PORTS[name]}", lambda: {"relay": ()}, ("relay",))


@pytest.mark.parametrize(("failure_count", "round_count"), [(0, 2), (STUMBLES_MAX, 2), (STUMBLES_MAX + 1, None)])
def test_a_peer_that_breaks_an_answer_off_has_its_turn_again(monkeypatch, failure_count: int, round_count: int | None) -> None:
    monkeypatch.setattr("tests.benchmarks.relay.SETTLE_SECONDS", 0.0)
    benchmark = Benchmark(Stumbling("LiteLLM", failure_count))
    for name in ("Potluck", "LiteLLM"):
        benchmark.add(name, lambda name=name: _contender(name))
    benchmark.run_rounds(2)
    assert len(benchmark.rounds["Potluck"]) == 2
    assert (len(benchmark.rounds["LiteLLM"]) if "LiteLLM" in benchmark.rounds else None) == round_count
    assert ("LiteLLM" in benchmark.absent) is (round_count is None)
    assert benchmark.stumbles["LiteLLM"] == failure_count


def test_potluck_may_break_no_answer_off(monkeypatch) -> None:
    monkeypatch.setattr("tests.benchmarks.relay.SETTLE_SECONDS", 0.0)
    benchmark = Benchmark(Stumbling("Potluck", 1))
    benchmark.add("Potluck", lambda: _contender("Potluck"))
    with pytest.raises(LoadFailedError):
        benchmark.run_rounds(1)


def test_the_table_and_the_document_tell_the_same() -> None:
    printed, written = table(_outcome()), document(_outcome())
    assert "MET  coordinator CPU per token, 64 paced streams, to LiteLLM: 0.060 x" in printed
    assert "agent (at the node)" in printed
    assert [mark["met"] for mark in written["marks"]] == [True, True, True]
    assert written["provisional"] is False


def test_a_busy_neighbour_makes_the_figures_provisional() -> None:
    outcome = _outcome()
    busy = {name: [replace(figures, foreign_cpu_share=0.4) for figures in rounds] for name, rounds in outcome.rounds.items()}
    assert "PROVISIONAL: others used 40%" in table(replace(outcome, rounds=busy))


def test_commands_and_results_survive_the_pipe() -> None:
    target = Target("127.0.0.1", 80, "bench", "Bearer x", {"gateway": (1, 2)})
    assert decode_command(encode_command(SMALL, target)) == (SMALL, target)
    result = LoadResult((1.0, 2.0), (3.0,), 1.0, 10, 0, {"gateway": 0.5}, 0.1)
    assert decode_result(encode_result(result)) == result
    with pytest.raises(LoadFailedError, match="too late"):
        decode_result(encode_failure("too late"))


@pytest.mark.parametrize("fault", [lambda text: text[:-2], lambda text: text[:2] + text, lambda text: text[2:4] + text[:2] + text[4:]])
def test_a_token_lost_doubled_or_swapped_is_noticed(fault) -> None:
    event = 'data: {"choices": [{"delta": {"content": "%s"}}]}\n\n'
    body = (event % fault(expected_text(30))).encode() + b"data: [DONE]\n\n"
    with pytest.raises(LoadFailedError, match="an answer of 30 tokens"):
        check_answer(SMALL, body)
    check_answer(SMALL, (event % expected_text(30)).encode() + b"data: [DONE]\n\n")


def test_a_stream_without_its_end_is_noticed() -> None:
    with pytest.raises(LoadFailedError, match="without"):
        streamed_text(b'data: {"choices": [{"delta": {"content": " a"}}]}\n\n')


@asynccontextmanager
async def engine(script: Script) -> AsyncIterator[Target]:
    runner, url = await serve(ScriptedServer(script, "bench", 4096, 8))
    try:
        yield Target("127.0.0.1", int(url.rsplit(":", 1)[1]), "bench", "Bearer none", {"engine": (os.getpid(),)})
    finally:
        await runner.cleanup()


@pytest.fixture
async def target() -> AsyncIterator[Target]:
    async with engine(Script(tokens=ANSWER_TOKENS, token_count=40, inter_token_ms=1)) as found:
        yield found


async def test_the_client_measures_streams_of_a_real_engine(target: Target) -> None:
    result = await run_load(SMALL, target)
    assert len(result.first_token_ms) == 3
    assert all(0 < first < whole for first, whole in zip(result.first_token_ms, result.request_ms, strict=True))
    # The middle three fifths of 90 tokens, give or take the events that arrived together.
    assert 45 <= result.window_token_count <= 63
    assert result.cpu_seconds["engine"] > 0


async def test_the_client_measures_whole_answers(target: Target) -> None:
    load = replace(SMALL, streamed=False, connection_count=2, requests_per_connection=5, token_count=1)
    result = await run_load(load, target)
    assert result.window_request_count == len(result.request_ms) == 10
    assert result.first_token_ms == ()


async def test_the_client_refuses_what_is_short_or_late(target: Target) -> None:
    with pytest.raises(LoadFailedError, match="an answer of 41 tokens"):
        await run_load(replace(SMALL, token_count=41), target)
    with pytest.raises(LoadFailedError, match="not over after"):
        await run_load(replace(SMALL, stagger_ms=9000, limit_seconds=0.1), target)


async def test_the_client_refuses_an_error_and_a_broken_connection() -> None:
    async with engine(Script(fail_status=503)) as failing:
        with pytest.raises(LoadFailedError, match="HTTP 503"):
            await run_load(SMALL, failing)
    async with engine(Script(tokens=ANSWER_TOKENS, token_count=40, break_after_tokens=7)) as breaking:
        with pytest.raises(LoadFailedError, match="broke in the middle"):
            await run_load(SMALL, breaking)


def test_cpu_time_counts_all_threads_of_another_process(tmp_path: Path) -> None:
    # Enough memory to be seen: the kernel counts small amounts only now and then.
    burn = (
        "import threading as t; kept = b'x' * (50 << 20); "
        "x = t.Thread(target=lambda: sum(range(10**7))); x.start(); x.join(); print(flush=True); input()"
    )
    child = Child([sys.executable, "-c", burn], tmp_path / "log", pipe=True)
    try:
        assert child.process.stdout is not None
        child.process.stdout.readline()
        spent = cpu_seconds(child.process_id)
        own_ticks = Path(f"/proc/{child.process_id}/stat").read_text().rsplit(")", 1)[1].split()
        assert spent is not None
        assert spent == pytest.approx((int(own_ticks[11]) + int(own_ticks[12])) / os.sysconf("SC_CLK_TCK"), abs=0.05)
        assert resident_bytes(child.process_id) > 2**20
        before, again = CpuReading.take([child.process_id]), CpuReading.take([child.process_id])
        assert again.spent_since(before, [child.process_id]) == pytest.approx(0, abs=0.01)
    finally:
        child.stop()
    assert cpu_seconds(child.process_id) is None


def test_stopping_a_child_stops_what_it_started(tmp_path: Path) -> None:
    spawn = "import subprocess, sys; subprocess.Popen(['sleep', '60'], start_new_session=True); print(flush=True); input()"
    child = Child([sys.executable, "-c", spawn], tmp_path / "log", pipe=True)
    assert child.process.stdout is not None
    child.process.stdout.readline()
    (sleeper,) = descendants(child.process_id)
    child.stop()
    deadline = time.monotonic() + 5
    while title(sleeper):  # what has ended shows no command line, even before it is reaped
        assert time.monotonic() < deadline
        time.sleep(0.01)
