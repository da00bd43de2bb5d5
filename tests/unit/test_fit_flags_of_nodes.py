"""The flags that the fit names beside those that a node starts vLLM with: one shape, one command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from potluck_coordinator.domain.fit.fitting import fit
from potluck_coordinator.domain.planning.node_kinds import hardware_of
from potluck_coordinator.domain.planning.sizing import Sizer, architecture_of
from potluck_coordinator.domain.planning.words import Sizing
from potluck_node.engines import vllm
from potluck_node.engines.base import EngineLaunch
from potluck_protocol.values import ModelId
from tests.support.planning import card_entry, node

SHAPE_FLAGS = ("--tensor-parallel-size", "--pipeline-parallel-size", "--max-model-len", "--max-num-seqs", "--gpu-memory-utilization")


def values(words: tuple[str, ...], names: tuple[str, ...]) -> dict[str, str]:
    return {name: words[words.index(name) + 1] for name in names if name in words}


@pytest.mark.parametrize("card_count", [1, 2, 3, 4])
@pytest.mark.parametrize("size", ["8b", "32b", "70b"])
def test_a_node_starts_vllm_with_the_flags_that_the_fit_names(size, card_count):
    box, entry, sizer = node("box", cards=card_count), card_entry(size, slot_count=32), Sizer()
    kind = sizer.kind_of(box)
    sized = sizer.size(entry, kind, kind.whole_room)
    hardware, _ = hardware_of(box, kind.whole_room, on_cards=True)
    report = fit(architecture_of(entry), (hardware,), engine_kind="vllm", context_length_tokens=4096, sequence_count_wanted=1)
    # Inside one box vLLM gets stages only on as many cards as the model cannot be cut into slices for.
    assert {shape.shape.cards_per_replica for shape in report.shapes if len(shape.shape.stages) > 1} <= {3}
    if not isinstance(sized, Sizing):
        assert (size, card_count) == ("70b", 1)
        return
    shape = sized.shape
    assert len(shape.card_uuids) == shape.tensor_parallel_size * max(1, len(shape.stage_layer_counts))
    named = next(each for each in report.shapes if each.shape.cards_per_replica == len(shape.card_uuids))
    launch = EngineLaunch(
        model_id=ModelId(size),
        model_path=Path("/models/m"),
        slot_count=sized.slot_count,
        context_length_tokens=sized.context_length_tokens,
        shape=shape,
    )
    expected = values(named.flags.arguments, SHAPE_FLAGS)
    assert values(vllm.flags(launch), SHAPE_FLAGS) == expected | {"--max-num-seqs": str(min(32, named.sequences_at_context))}


def test_a_shape_without_a_bridge_is_two_pairs_and_not_four_slices():
    box, entry = node("box", cards=4), replace(card_entry("32b"), context_length_tokens=4096)
    kind = Sizer().kind_of(box)
    hardware, _ = hardware_of(box, kind.whole_room, on_cards=True)
    report = fit(architecture_of(entry), (hardware,), engine_kind="vllm", context_length_tokens=4096, sequence_count_wanted=1)
    rates = {shape.shape.tensor_parallel: shape.rates.decode_single for shape in report.shapes}
    assert rates[2] > rates[4]
