"""The scripted engine's cost model: what a step takes, who is put out, and what kills the engine."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_node.engines.batch_model import Batch, CostModel, EngineDiedError
from potluck_node.engines.script import Script, read_script

COST = CostModel(prefill_tokens_per_second=1000, step_ms=40, step_ms_per_request=2, kv_capacity_tokens=1000, step_tokens_max=100)


def _run(batch: Batch, steps_max: int = 10_000) -> list:
    steps = []
    while (step := batch.step()) is not None:
        steps.append(step)
        assert len(steps) < steps_max, "it never ends"
    return steps


def test_a_lone_request_takes_its_prompt_and_one_step_a_token() -> None:
    batch = Batch(COST)
    batch.add(prompt_tokens=250, answer_tokens=3)
    steps = _run(batch)
    # Three chunks of the prompt, the last of which brings the first token, then two more.
    assert [len(step.told) for step in steps] == [0, 0, 1, 1, 1]
    assert [round(step.seconds, 4) for step in steps] == [0.14, 0.14, 0.09, 0.042, 0.042]
    assert (batch.running_count, batch.waiting_count, batch.kv_used_tokens, batch.generated_tokens) == (0, 0, 0, 3)


def test_a_step_is_as_long_as_its_batch_is_large() -> None:
    batch = Batch(COST)
    for _ in range(10):
        batch.add(prompt_tokens=1, answer_tokens=3)
    assert [round(step.seconds, 4) for step in _run(batch)] == [0.05, 0.06, 0.06]
    assert COST.step_seconds(10) == pytest.approx(0.06)


def test_what_does_not_fit_the_cache_waits_in_order() -> None:
    batch = Batch(COST)
    first, second, third = (batch.add(prompt_tokens=tokens, answer_tokens=2) for tokens in (600, 500, 10))
    for _ in range(6):
        step = batch.step()
    assert step is not None
    assert step.told == (first,)
    assert (batch.running_count, batch.waiting_count) == (1, 2), "the third would fit, and does not overtake"
    order = [number for step in _run(batch) for number in step.told]
    assert order == [first, second, second, third, third]


def test_a_full_cache_puts_the_newest_out_and_computes_it_again() -> None:
    batch = Batch(COST)
    old, new = batch.add(prompt_tokens=450, answer_tokens=100), batch.add(prompt_tokens=450, answer_tokens=100)
    steps = _run(batch)
    told = Counter(number for step in steps for number in step.told)
    assert told == {old: 100, new: 100}, "every token once, whatever was computed again"
    assert batch.preempted_count == 1
    alone = Batch(COST)
    alone.add(prompt_tokens=450, answer_tokens=100)
    # The put out one's prompt and first tokens cost a second time.
    assert sum(step.seconds for step in steps) > sum(step.seconds for step in _run(alone)) + 0.9


def test_begun_work_over_the_bound_kills_by_the_cards_memory() -> None:
    batch = Batch(COST)
    for _ in range(60):
        batch.add(prompt_tokens=10, answer_tokens=500)
    with pytest.raises(EngineDiedError, match="the cache holds 1000") as death:
        _run(batch)
    assert not death.value.of_host_memory
    assert batch.preempted_count > 0, "it put out what it could before"


def test_too_many_waiting_prompts_kill_by_the_machines_memory() -> None:
    batch = Batch(CostModel(1000, 40, 2, kv_capacity_tokens=1000, waiting_tokens_max=2000))
    for _ in range(4):
        batch.add(prompt_tokens=500, answer_tokens=1)
    with pytest.raises(EngineDiedError) as death:
        batch.add(prompt_tokens=1, answer_tokens=1)
    assert death.value.of_host_memory


def test_a_request_taken_back_frees_what_it_held() -> None:
    batch = Batch(COST)
    running, waiting = batch.add(900, 10), batch.add(900, 10)
    batch.step()
    assert (batch.running_count, batch.waiting_count) == (1, 1)
    for _ in range(2):
        batch.remove(waiting)
        batch.remove(running)
    assert (batch.running_count, batch.waiting_count, batch.kv_used_tokens, batch.step()) == (0, 0, 0, None)


_REQUESTS = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 200)), min_size=1, max_size=30)


@given(requests=_REQUESTS, dropped=st.sets(st.integers(1, 30)), after=st.integers(0, 40))
def test_every_token_comes_once_and_the_cache_is_never_overfull(requests, dropped, after) -> None:
    batch = Batch(CostModel(1000, 40, 2, kv_capacity_tokens=1000, kv_overcommit_max=1000, waiting_tokens_max=10**9))
    wanted = {batch.add(prompt, answer): answer for prompt, answer in requests}
    told: Counter[int] = Counter()
    steps = 0
    while (step := batch.step()) is not None:
        assert len(set(step.told)) == len(step.told)
        assert step.seconds > 0
        assert batch.kv_used_tokens <= 1000 + batch.running_count
        told.update(step.told)
        steps += 1
        if steps == after:
            for number in dropped:
                batch.remove(number)
    for number, answer in wanted.items():
        assert told[number] == answer or (number in dropped and told[number] <= answer)
    assert (batch.running_count, batch.waiting_count, batch.kv_used_tokens, batch._waiting_tokens) == (0, 0, 0, 0)


@given(requests=_REQUESTS)
def test_the_same_requests_give_the_same_steps(requests) -> None:
    def steps() -> list:
        batch = Batch(CostModel(1000, 40, 2, kv_capacity_tokens=1000, kv_overcommit_max=1000))
        for prompt, answer in requests:
            batch.add(prompt, answer)
        return _run(batch)

    assert steps() == steps()


def test_a_scripts_cost_is_read_and_checked(tmp_path) -> None:
    path = tmp_path / "script.json"
    values = {"prefill_tokens_per_second": 1000, "step_ms": 40, "step_ms_per_request": 2.5, "kv_capacity_tokens": 1000}
    path.write_text(json.dumps({"cost": values}))
    assert read_script(path).cost == CostModel(1000, 40, 2.5, 1000)
    for wrong in ({**values, "step_ms": -1}, {**values, "kv_capacity_tokens": 0}, {**values, "kv_capacity_tokens": 1.5}, {"step_ms": 1}, 3):
        path.write_text(json.dumps({"cost": wrong}))
        with pytest.raises(ValueError, match="cost"):
            read_script(path)
    with pytest.raises(ValueError, match="no field 'cost'"):
        Script().overridden({"cost": values})
