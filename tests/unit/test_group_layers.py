"""A group is started with the layers that the fit predicts of the same nodes: what was promised is what runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.domain.fit.fitting import fit
from potluck_coordinator.domain.fit.shapes import ShapeKind
from potluck_coordinator.domain.planning.node_kinds import Room, hardware_of
from potluck_protocol.values import NodeId
from tests.support.planning import GIB, card_entry, cards, wish
from tests.unit.test_planning_groups import Pool

LARGE = ("NVIDIA GeForce RTX 3090", 24 * GIB, 350_000)
CAPPED = ("NVIDIA GeForce RTX 3090", 24 * GIB, 200_000)
FAST = ("NVIDIA GeForce RTX 4090", 24 * GIB, 450_000)
SMALL = ("NVIDIA GeForce RTX 3060", 12 * GIB, 170_000)


def grouped(model_id, specifications):
    """The group that forms, and its members' hardware by rank."""
    names = [NodeId(name) for name in "abc"[: len(specifications)]]
    pool = Pool(wish(model_id, 1), names=names)
    pool.entries[model_id] = card_entry(model_id)
    for name, (card, memory_bytes, limit) in zip(names, specifications, strict=True):
        (accelerator,) = cards(1, card, memory_bytes, name)
        inventory = replace(pool.boxes[name].inventory, accelerators=(replace(accelerator, power_limit_milliwatts=limit),))
        pool.change(name, inventory=inventory)
    (group,) = pool.step().planner.groups.values()
    boxes = [hardware_of(pool.boxes[stage.node_id], Room(frozenset(stage.card_uuids), 0), on_cards=True)[0] for stage in group.stages]
    return group, boxes


@pytest.mark.parametrize(
    ("model_id", "specifications", "layer_counts"),
    [
        ("70b", (LARGE, LARGE), [40, 40]),
        ("70b", (FAST, LARGE), [41, 39]),
        ("70b", (LARGE, CAPPED), None),
        ("70b", (FAST, CAPPED), None),
        ("32b", (SMALL, SMALL), [32, 32]),
        ("70b", (LARGE, SMALL, SMALL), None),
    ],
)
def test_layers_are_those_of_the_fit(model_id, specifications, layer_counts):
    group, boxes = grouped(model_id, specifications)
    entry = card_entry(model_id)
    report = fit(entry.architecture, boxes, engine_kind="vllm", context_length_tokens=entry.context_length_tokens, sequence_count_wanted=1)
    predicted = next(found.shape for found in report.shapes if found.shape.kind is ShapeKind.BOXES)
    formed = [stage.layer_count for stage in group.stages]
    assert formed == [stage.layer_count for stage in predicted.stages]
    assert len(boxes) == len(specifications)
    assert layer_counts is None or sorted(formed) == sorted(layer_counts)
