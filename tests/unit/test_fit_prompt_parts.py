"""How long the parts of a prompt take through several cards that one thread feeds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.architectures import known_architecture
from potluck_coordinator.domain.fit import prompt_parts
from potluck_coordinator.domain.fit.cards import CARD_MODELS
from potluck_coordinator.domain.fit.engines import LLAMACPP, VLLM
from potluck_coordinator.domain.fit.fitting import fit
from potluck_coordinator.domain.fit.hardware import NodeCard, NodeHardware
from potluck_coordinator.domain.fit.prompt_parts import LAUNCHES_WAITING_MAX, PARTS_MAX, seconds_of_parts
from potluck_coordinator.domain.fit.quantizations import quantization_named
from potluck_coordinator.domain.fit.report import ShapeFit

Stages = list[tuple[float, float, int]]
stages = st.lists(st.tuples(st.floats(0.001, 10), st.floats(0, 1), st.integers(1, 5000)), min_size=1, max_size=8)


def seconds(given_stages: Stages, part_count: int) -> float:
    steps, hops, launches = zip(*given_stages, strict=True)
    return seconds_of_parts(steps, hops, launches, part_count)


def last_shape(engine: str, *, cards: int, batch_tokens: int | None = None, context: int = 1024) -> ShapeFit:
    """Over all cards."""
    model = replace(known_architecture("llama-3-70b-instruct"), quantization=quantization_named("Q4_K_M"), weight_bytes_of_files=None)
    box = NodeHardware((NodeCard(CARD_MODELS["rtx3090"]),) * cards)
    report = fit(model, [box], engine_kind=engine, context_length_tokens=context, sequence_count_wanted=1, batch_tokens=batch_tokens)
    return next(found for found in report.shapes if found.shape.cards_per_replica == cards)


def test_one_card_reads_one_part_after_the_other() -> None:
    assert seconds([(2.0, 5.0, 900)], 3) == pytest.approx(6)


def test_two_parts_over_six_cards_take_seven_twelfths_of_the_time_that_they_take_one_after_the_other() -> None:
    assert seconds([(1.0, 0.0, 700)] * 6, 2) == pytest.approx(7)


def test_a_stage_that_fills_the_queue_keeps_the_next_part_from_the_cards_before_it() -> None:
    # The thread gets through the last of four stages once its first 36 kernels are done, and starts the second part's then.
    launches = LAUNCHES_WAITING_MAX + 36
    assert seconds([(1.0, 0.0, launches)] * 4, 2) == pytest.approx(3 + 36 / launches + 4)


def test_two_parts_wait_in_the_queue_where_both_find_room_and_the_third_does_not() -> None:
    # The thread has the second part's kernels in all four queues once the last card is through half of the first part.
    launches = LAUNCHES_WAITING_MAX * 2 // 3
    assert seconds([(1.0, 0.0, launches)] * 4, 2) == pytest.approx(5)
    assert seconds([(1.0, 0.0, launches)] * 4, 3) == pytest.approx(3 + 0.5 + 4, rel=0.01)


def test_the_first_part_s_way_to_the_last_card_is_taken_once() -> None:
    assert seconds([(1.0, 0.0, 1)] * 8, 16 * PARTS_MAX) == pytest.approx(7 + 16 * PARTS_MAX)


@pytest.mark.parametrize("launches", [422, LAUNCHES_WAITING_MAX * 2 // 3, 962, LAUNCHES_WAITING_MAX + 36])
def test_parts_that_are_not_counted_go_as_fast_as_those_that_are(monkeypatch: pytest.MonkeyPatch, launches: int) -> None:
    given_stages = [(1.0, 0.0, launches)] * 7 + [(1.1, 0.0, launches)]
    extrapolated = seconds(given_stages, 256)
    monkeypatch.setattr(prompt_parts, "PARTS_MAX", 256)
    assert extrapolated == pytest.approx(seconds(given_stages, 256), rel=0.01)


def test_the_slowest_card_sets_the_pace() -> None:
    assert seconds([(1.0, 0.0, 1), (3.0, 0.0, 1), (1.0, 0.0, 1)], 10) == pytest.approx(1 + 10 * 3 + 1)


@given(stages, st.integers(1, 60))
def test_parts_take_no_longer_than_one_by_one_and_no_less_than_the_slowest_card_needs(given_stages: Stages, part_count: int) -> None:
    # What follows the last stage is not waited for.
    through = sum(step + hop for step, hop, _ in given_stages) - given_stages[-1][1]
    slowest = max(step for step, _, _ in given_stages)
    taken = seconds(given_stages, part_count)
    assert part_count * slowest * (1 - 1e-9) <= taken <= part_count * through * (1 + 1e-9)
    assert seconds(given_stages, 1) == pytest.approx(through)


@given(stages, st.integers(1, PARTS_MAX), st.integers(0, 3000))
def test_more_kernels_and_more_parts_never_take_less_time(given_stages: Stages, part_count: int, more: int) -> None:
    taken = seconds(given_stages, part_count)
    assert seconds(given_stages, part_count + 1) >= taken * (1 - 1e-9)
    assert seconds([(step, hop, launches + more) for step, hop, launches in given_stages], part_count) >= taken * (1 - 1e-9)


def test_cards_of_one_thread_overlap_a_prompt_s_parts_and_those_of_a_process_each_are_not_said_to() -> None:
    whole, halves = (last_shape(LLAMACPP, cards=6, batch_tokens=size).rates.prefill for size in (1024, 512))
    assert halves > 1.4 * whole
    apart, together = (last_shape(VLLM, cards=6, batch_tokens=size).rates.prefill for size in (512, 1024))
    assert together >= apart


def test_llamacpp_over_several_cards_is_handed_several_parts_at_a_time() -> None:
    def told(found: ShapeFit) -> list[str]:
        words = found.flags.arguments
        return [words[words.index(name) + 1] for name in ("--batch-size", "--ubatch-size")]

    assert told(last_shape(LLAMACPP, cards=1, batch_tokens=512)) == ["512", "512"]
    assert told(last_shape(LLAMACPP, cards=4, batch_tokens=512, context=8192)) == ["2048", "512"]
    assert told(last_shape(LLAMACPP, cards=4, batch_tokens=512)) == ["1024", "512"]
