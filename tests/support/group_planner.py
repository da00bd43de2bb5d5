"""The caller of `plan_groups`, with nodes that report what a test says."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

from potluck_coordinator.domain.grouping.plan import plan_groups
from potluck_coordinator.domain.grouping.words import GroupPhase
from potluck_protocol.values import EngineState
from tests.support.grouping import GROUP, measured, need, node, reporting, rooms


class GroupPlanner:
    """The caller of `plan_groups`: keeps the groups, the time and the numbers."""

    def __init__(self, *nodes, **need_changes):
        self.views = measured(*nodes)
        self.needs = [need(**need_changes)]
        self.groups = {}
        self.now = 100.0
        self.attempt_counts = {}
        self.numbers = count(1)

    def step(self, seconds=1.0, memory_bytes=90):
        self.now += seconds
        plan = plan_groups(
            self.needs,
            self.views,
            rooms(self.views, memory_bytes),
            self.groups,
            next_generation=lambda: next(self.numbers),
            now=self.now,
            attempt_counts=self.attempt_counts,
        )
        self.groups = plan.groups
        return plan

    @property
    def group(self):
        return self.groups[GROUP]

    def report(self, state=EngineState.READY, **by_node):
        self.views = reporting(self.views, self.group, state, **by_node)

    def change(self, node_id, **changes):
        self.views = {**self.views, node_id: replace(self.views[node_id], **changes)}

    def formed(self):
        self.step()
        self.report()
        self.step()
        assert self.group.phase is GroupPhase.READY
        return self


def pair():
    return GroupPlanner(node(1, "ann", ("bob",)), node(2, "bob", ("ann",)))
