"""The overload benchmark judges rightly: what is good, what is refused, when a bound is broken, and what exits non-zero."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from potluck_node.engines.batch_model import CostModel
from potluck_node.engines.script import Script
from potluck_node.engines.scripted_server import ScriptedServer, serving
from tests.benchmarks.arithmetic import percentile
from tests.benchmarks.open_client import run_load, tokens_in
from tests.benchmarks.open_load import (
    ANSWER_TOKENS,
    Asked,
    OpenLoad,
    OpenResult,
    OpenTarget,
    decode_command,
    decode_result,
    encode_command,
    encode_result,
    mean_tokens,
    prompt_of,
    trace,
)
from tests.benchmarks.overload import burst_load, moderate_loads
from tests.benchmarks.overload_contenders import CONTEXT_LENGTH_TOKENS, COST, SLOT_COUNT, fleet_requests_per_second, is_engine
from tests.benchmarks.overload_figures import (
    OVERLOAD_FACTOR,
    WARM_UP_SECONDS,
    Outcome,
    Spell,
    document,
    doubts,
    exit_status,
    figures_of,
    is_good,
    is_refused,
    table,
    verdicts,
)

GOOD = Asked(
    at_seconds=6.0,
    late_seconds=0.0,
    account=0,
    answer_tokens=40,
    status=200,
    first_token_seconds=0.5,
    over_seconds=3.0,
    token_seconds=0.06,
    failure="",
)
REFUSED = replace(GOOD, status=429, first_token_seconds=None, over_seconds=0.004, token_seconds=None, failure="HTTP 429")
SECONDS = WARM_UP_SECONDS + 10.0


def spell(*asked: Asked, deaths: int = 0, busy: float = 0.3) -> Spell:
    return Spell(10.0, SECONDS, asked, busy, deaths)


def outcome(*asked: Asked, peak: int = 10, deaths: int = 0) -> Outcome:
    return Outcome((figures_of(spell(*[GOOD] * peak)),), figures_of(spell(*asked, deaths=deaths)))


KEPT = outcome(*[GOOD] * 9, *[REFUSED] * 200)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"first_token_seconds": 2.1}, False),
        ({"token_seconds": 0.11}, False),
        ({"token_seconds": None}, True),
        ({"failure": "broke off"}, False),
        ({"first_token_seconds": None}, False),
    ],
)
def test_an_answer_is_good_when_it_is_whole_in_time_and_readable(changes, expected) -> None:
    assert is_good(replace(GOOD, **changes)) is expected


def test_refusals_are_what_servers_say_and_not_what_breaks() -> None:
    assert is_refused(REFUSED)
    assert is_refused(replace(REFUSED, status=503, over_seconds=30.0)), "late, and a refusal all the same"
    assert not is_refused(replace(REFUSED, status=500))
    assert not is_refused(replace(REFUSED, status=0))
    assert not is_refused(GOOD)


def test_every_request_is_counted_once() -> None:
    late, slow = replace(GOOD, at_seconds=SECONDS - 1), replace(GOOD, first_token_seconds=2.5)
    broken = replace(GOOD, failure="broke off")
    unfinished = replace(GOOD, over_seconds=None, failure="unfinished")
    early = replace(GOOD, at_seconds=0.0)
    found = figures_of(spell(GOOD, GOOD, late, early, slow, REFUSED, broken, unfinished))
    assert (found.asked_count, found.good_count, found.slow_count, found.refused_count, found.broken_count, found.unfinished_count) == (
        (8, 4, 1, 1, 1, 1)
    )
    assert found.goodput == pytest.approx(2 / 10), "only of answers that were over while the load lasted, and after its beginning"
    assert (found.over_seconds, found.failures) == (None, {"HTTP 429": 1, "broke off": 1, "unfinished": 1})
    assert found.empty_seconds == pytest.approx(0.0)


def test_queues_are_empty_when_the_last_one_knows() -> None:
    waits = replace(GOOD, at_seconds=SECONDS - 1, first_token_seconds=8.0, over_seconds=20.0)
    assert figures_of(spell(GOOD, waits)).empty_seconds == pytest.approx(7.0)
    assert figures_of(spell(GOOD, waits)).over_seconds == pytest.approx(19.0)
    never = replace(GOOD, first_token_seconds=None, over_seconds=None, failure="unfinished")
    assert figures_of(spell(GOOD, never)).empty_seconds is None


def test_a_run_that_keeps_every_bound_exits_well() -> None:
    assert all(verdict.kept for verdict in verdicts(KEPT))
    assert exit_status({"Potluck": KEPT}) == 0


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (outcome(*[GOOD] * 7, REFUSED), "goodput"),
        (outcome(*[GOOD] * 9, *[REFUSED] * 98, *[replace(REFUSED, over_seconds=0.06)] * 2), "refusals"),
        (outcome(*[GOOD] * 9), "refusals"),
        (outcome(*[GOOD] * 9, REFUSED, deaths=1), "death"),
        (outcome(*[GOOD] * 9, REFUSED, replace(GOOD, at_seconds=SECONDS, first_token_seconds=10.5, over_seconds=11.0)), "queues"),
        (outcome(*[GOOD] * 9, REFUSED, replace(GOOD, first_token_seconds=None, over_seconds=None, failure="unfinished")), "queues"),
        (outcome(*[GOOD] * 9, REFUSED, replace(GOOD, failure="broke off")), "breaks off"),
        (outcome(*[GOOD] * 9, REFUSED, peak=0), "goodput"),
    ],
)
def test_each_bound_can_be_broken_by_itself(broken, name) -> None:
    assert [verdict.name for verdict in verdicts(broken) if not verdict.kept and name not in verdict.name] == []
    assert any(name in verdict.name and not verdict.kept for verdict in verdicts(broken))
    assert exit_status({"Potluck": broken}) == 1


def test_a_run_without_potluck_shows_nothing_and_peers_break_nothing() -> None:
    assert exit_status({}) == 1
    assert exit_status({"LiteLLM": KEPT}) == 1
    assert exit_status({"Potluck": KEPT, "LiteLLM": outcome(REFUSED, deaths=3)}) == 0


def test_a_busy_machine_or_a_late_client_is_told() -> None:
    assert doubts(KEPT) == ()
    busy = Outcome(KEPT.moderate, figures_of(spell(GOOD, busy=0.95)))
    late = Outcome(KEPT.moderate, figures_of(spell(replace(GOOD, late_seconds=0.03))))
    assert "95% busy" in doubts(busy)[0]
    assert "30 ms late" in doubts(late)[0]
    assert "PROVISIONAL: Potluck" in table({"Potluck": busy}, {})


def test_the_page_and_the_document_tell_the_same() -> None:
    printed = table({"Potluck": KEPT}, {"LiteLLM": "cannot be installed"})
    written = json.loads(json.dumps(document({"Potluck": KEPT}, {"LiteLLM": "cannot be installed"})))
    assert "KEPT   goodput at least 80% of peak: 90%" in printed
    assert "LiteLLM: cannot be installed" in printed
    assert written["contenders"]["Potluck"]["goodput_share_of_peak"] == pytest.approx(0.9)
    assert written["contenders"]["Potluck"]["overload"]["refused_count"] == 200


def test_percentiles_are_values_that_were_there() -> None:
    assert percentile([], 99) is None
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([float(number) for number in range(1, 101)], 99) == 99.0
    assert percentile([1.0, 2.0], 99) == 2.0


def test_the_trace_is_the_same_for_everybody_and_as_dense_as_asked() -> None:
    load = OpenLoad(seed=7, requests_per_second=20.0, seconds=60.0, drain_seconds_max=1.0)
    arrivals = trace(load, 4)
    assert arrivals == trace(load, 4)
    assert arrivals != trace(replace(load, seed=8), 4)
    assert 1000 < len(arrivals) < 1400
    assert {arrival.account for arrival in arrivals} == {0, 1, 2, 3}
    prompt_tokens, answer_tokens = mean_tokens()
    assert sum(arrival.prompt_tokens for arrival in arrivals) / len(arrivals) == pytest.approx(prompt_tokens, rel=0.15)
    assert sum(arrival.answer_tokens for arrival in arrivals) / len(arrivals) == pytest.approx(answer_tokens, rel=0.15)
    words = prompt_of(arrivals[0], random.Random(1)).split()
    assert (len(words), words[-1]) == (arrivals[0].prompt_tokens, str(arrivals[0].answer_tokens))


def test_the_burst_is_five_times_the_peak_and_nothing_good_is_no_peak() -> None:
    assert burst_load(4.0, 60.0).requests_per_second == 4.0 * OVERLOAD_FACTOR
    with pytest.raises(RuntimeError, match="no answer was good"):
        burst_load(0.0, 60.0)
    rates = [load.requests_per_second for load in moderate_loads(60.0)]
    assert rates == sorted(rates)
    assert rates[0] < fleet_requests_per_second() < rates[-1]


def test_slots_alone_would_over_admit_the_engines() -> None:
    prompt_tokens, answer_tokens = mean_tokens()
    assert SLOT_COUNT * (prompt_tokens + answer_tokens) > COST.kv_overcommit_max * COST.kv_capacity_tokens
    assert COST.kv_capacity_tokens > CONTEXT_LENGTH_TOKENS


def test_commands_and_results_survive_the_pipe() -> None:
    load, target = OpenLoad(1, 2.0, 3.0, 4.0), OpenTarget("127.0.0.1", 80, "bench", ("Bearer a", "Bearer b"))
    assert decode_command(encode_command(load, target)) == (load, target)
    result = OpenResult((GOOD, REFUSED), 0.5, 0.01)
    assert decode_result(encode_result(result)) == result


def test_an_engine_is_told_from_who_keeps_it() -> None:
    assert is_engine("python -m potluck_node.engines.scripted_server --model x")
    assert not is_engine("python -m tests.benchmarks.kept_engine -m potluck_node.engines.scripted_server --model x")
    assert not is_engine("python -m potluck node run")


def test_tokens_are_counted_by_their_events() -> None:
    assert tokens_in(b'data: {"choices": [{"delta": {"content": " a"}}]}\n\ndata: {"choices":[{"delta":{"content":" b"}}]}\n\n') == 2
    assert tokens_in(b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n{"content": null}') == 0


async def _asked_of(script: Script, load: OpenLoad) -> OpenResult:
    async with serving(ScriptedServer(script, "bench", 1500, 8)) as url:
        return await run_load(load, OpenTarget("127.0.0.1", int(url.rsplit(":", 1)[1]), "bench", ("Bearer a", "Bearer b")))


FAST = CostModel(prefill_tokens_per_second=100_000, step_ms=1, step_ms_per_request=0, kv_capacity_tokens=20_000)
SCRIPT = Script(tokens=ANSWER_TOKENS, token_count=400, count_in_prompt=True, cost=FAST)


async def test_the_client_asks_on_time_and_checks_every_answer() -> None:
    result = await _asked_of(SCRIPT, OpenLoad(3, 20.0, 1.0, 10.0))
    assert len(result.asked) == len(trace(OpenLoad(3, 20.0, 1.0, 10.0), 2)) > 10
    assert [asked.failure for asked in result.asked] == [""] * len(result.asked)
    assert all(asked.first_token_seconds is not None and asked.token_seconds is not None for asked in result.asked)
    assert {asked.account for asked in result.asked} == {0, 1}


async def test_the_client_sees_refusals_breaks_and_answers_without_end() -> None:
    refused = await _asked_of(replace(SCRIPT, fail_status=503), OpenLoad(3, 20.0, 0.5, 10.0))
    assert {(asked.status, asked.failure) for asked in refused.asked} == {(503, "HTTP 503")}
    assert all(is_refused(asked) for asked in refused.asked)
    broken = await _asked_of(replace(SCRIPT, break_after_tokens=3), OpenLoad(3, 20.0, 0.5, 10.0))
    assert {asked.failure for asked in broken.asked} == {"the connection broke"}
    short = await _asked_of(replace(SCRIPT, token_count=5), OpenLoad(3, 20.0, 0.5, 10.0))
    assert {asked.failure for asked in short.asked} == {"wrong text"}
    endless = await _asked_of(replace(SCRIPT, hang_after_tokens=3), OpenLoad(3, 20.0, 0.5, 0.5))
    assert {(asked.failure, asked.over_seconds) for asked in endless.asked} == {("unfinished", None)}
