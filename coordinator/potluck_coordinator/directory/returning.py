"""Nodes that come back as they were when the last plan was made: they get what they had, and need no plan before their welcome.

Decides what "as they were" is: all that a plan looks at, but for what changes by itself. When a gateway has died, thousands come back so
within seconds; one plan for all of them follows. It must not know how a plan is made.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from potluck_coordinator.domain.node_view import NodeView
    from potluck_protocol.values import DesiredState, NodeId


class Returning:
    """Of one directory's nodes."""

    def __init__(self) -> None:
        self._planned: dict[NodeId, tuple[NodeView, DesiredState]] = {}
        """Each active node as it was when it was last there for a plan, and what was wished of it then."""

    def planned(self, nodes: Mapping[NodeId, NodeView], desired: Mapping[NodeId, DesiredState]) -> None:
        """A plan was made from these, and told."""
        there = {node_id: (view, desired[node_id]) for node_id, view in nodes.items() if view.connected}
        self._planned = {**{node_id: known for node_id, known in self._planned.items() if node_id in nodes}, **there}

    def is_as_planned(self, view: NodeView, desired: DesiredState | None) -> bool:
        """Whether the node is as it was, and the same is wished of it as then. Of a group's member never: its group may be another."""
        before, wished = self._planned.get(view.node_id, (view, None))
        if wished is None or wished != desired or wished.peers or any(wish.group is not None for wish in wished.engines):
            return False
        return _lasting(view) == _lasting(before)


def _lasting(view: NodeView) -> object:
    engines = {
        status.replica_id: (status.model_id, status.state, status.engine_kind, status.slot_count, status.failure, status.weight_bytes)
        for status in view.engines
    }
    inventory = replace(view.inventory, disk_free_bytes=0, line=None)
    return inventory, view.owner_account_id, view.state, view.rest_causes, view.cards_lost, engines
