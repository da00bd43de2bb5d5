"""What a replica on its way out is asked to run: what it runs, so that its last answers end by themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.domain.planning.plan import plan
from potluck_coordinator.domain.planning.words import Phase
from tests.support.planning import card_entry, node, view, wish
from tests.unit.test_planning import later

ENTRY = card_entry("8b")
PINNED_ANEW = replace(ENTRY, file=replace(ENTRY.file, source=f"hf:org/8b@{'b' * 40}", sha256="1" * 64))


def wishes(made):
    return {engine.replica_id: engine.model for engines in made.desired.values() for engine in engines}


@pytest.mark.parametrize("at_once", [False, True])
def test_a_replica_on_its_way_out_keeps_its_files_when_its_model_is_pinned_anew(at_once):
    before = view([node("a", cards=1), node("b", cards=1)], [ENTRY], [wish("8b", 2)])
    made = plan(before)
    assert wishes(made) == {"a/8b": ENTRY.file, "b/8b": ENTRY.file}
    renewed = {"catalogue": {ENTRY.model_id: PINNED_ANEW}}
    fewer = later(
        before, made, deployments=(wish("8b", 1),), attempt_counts=dict.fromkeys(made.replicas, 3), **(renewed if at_once else {})
    )
    leaving = plan(fewer)
    after = plan(later(fewer, leaving, **renewed))
    (going,) = after.leaving
    (staying,) = after.replicas.keys() - {going}
    assert after.replicas[going].phase is Phase.LEAVING
    assert wishes(leaving)[going] == ENTRY.file
    assert wishes(after) == {going: ENTRY.file, staying: PINNED_ANEW.file}
