"""Nodes join a pool in which a group serves, with any luck: somebody always answers, and in the end one node does alone."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from potluck_coordinator.domain.grouping.words import GroupPhase
from potluck_protocol.values import EngineState, NodeId
from tests.support.planning import node, status, wish
from tests.unit.test_planning_groups import Pool

GROUP = "group/70b/0"
joining = st.tuples(st.sampled_from("cde"), st.sampled_from((1, 2, 4)))
luck = st.sampled_from((EngineState.STARTING, EngineState.READY, EngineState.BACKING_OFF))
steps = st.lists(st.tuples(st.none() | joining, luck, st.integers(0, 2), st.sampled_from((1.0, 5.0, 130.0))), max_size=12)


def members_obey(pool, state):
    """The group's members run what is wished of them, and the others are so far with it."""
    for name, each in pool.boxes.items():
        said = []
        for engine in pool.wishes.engines.get(name, ()):
            place = {} if engine.group is None else {"group_id": GROUP, "group_generation": engine.group.generation}
            before = [old.state for old in each.engines if old.replica_id == engine.replica_id]
            stays_ready = engine.group is not None or EngineState.READY in before
            said.append(status(engine.replica_id, engine.model.model_id, EngineState.READY if stays_ready else state, **place))
        pool.boxes[name] = replace(each, engines=tuple(said))


def answering(pool):
    """The group, if it is one, and the nodes that serve alone."""
    group = pool.planner.groups.get(GROUP)
    alone = [
        name
        for name, each in pool.boxes.items()
        for told in each.engines
        if not told.group_id and told.state is EngineState.READY and told.replica_id in {e.replica_id for e in pool.wishes.engines[name]}
    ]
    return group is not None and group.phase is GroupPhase.READY, alone


@settings(max_examples=60, deadline=None)
@given(steps)
def test_somebody_always_answers_and_no_answer_is_cut_short(moments):
    pool = Pool(wish("70b", 1)).step().obey().step()
    assert answering(pool) == (True, [])
    large = False
    for joined, state, attempt_count, seconds in moments:
        if joined is not None and NodeId(joined[0]) not in pool.boxes:
            pool.boxes[NodeId(joined[0])] = node(joined[0], cards=joined[1], memory_gib=64)
            large = large or joined[1] > 1
        was_standing = answering(pool)[0]
        pool.attempt_counts = {GROUP: attempt_count}
        pool.step(seconds)
        stands, alone = answering(pool)
        assert stands or alone
        if was_standing and not stands:
            assert not attempt_count or seconds > 100
        members_obey(pool, state)
    for _ in range(8):
        pool.attempt_counts = {}
        pool.step(130.0)
        members_obey(pool, EngineState.READY)
    stands, alone = answering(pool)
    assert (stands, len(alone)) == ((False, 1) if large else (True, 0))
    before = dict(pool.planner.replicas)
    pool.step(130.0)
    assert pool.planner.replicas == before
