"""Whose turn it is to measure its line to the coordinator.

Decides who may begin, and when those who may not should try again, so that measuring never takes more than a small, known part of the
coordinator's own line. It must not know how anything is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from potluck_protocol.values import NodeId

TOGETHER_MAX: Final = 2
"""Measurements at a time in one gateway. Each more takes of the others' figures where the coordinator's line is the narrow one; two at a
time, of two seconds each way, let thirty nodes a minute through."""
REPEAT_SECONDS: Final = 180.0
"""Between two measurements of one node in one direction. Agents measure once a day: this is for an owner who runs the doctor again and
again, or a node that means ill."""
RETRY_SECONDS: Final = 10.0
"""What those are told who only met others: their turns have ended by then."""


class Direction(StrEnum):
    """As the node sees it."""

    UPLOAD = "upload"
    DOWNLOAD = "download"


@dataclass(frozen=True, slots=True)
class Turns:
    """Who measures now, and when each node began last, in monotonic seconds; older beginnings than REPEAT_SECONDS are forgotten."""

    running: frozenset[NodeId] = frozenset()
    begun_at: Mapping[tuple[NodeId, Direction], float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not now, in words for the node's owner, and when to try again."""

    reason: str
    retry_after_seconds: float


def begin(turns: Turns, node_id: NodeId, direction: Direction, now: float) -> Turns | Refusal:
    """The turns with this one among them, or why it must wait. A refusal costs nothing: it does not put the next try off."""
    if node_id in turns.running:
        return Refusal("another measurement of this node is running", RETRY_SECONDS)
    begun_at = {key: seconds for key, seconds in turns.begun_at.items() if now - seconds < REPEAT_SECONDS}
    last = begun_at.get((node_id, direction))
    if last is not None:
        left_seconds = REPEAT_SECONDS - (now - last)
        return Refusal(f"this node's {direction} was measured {now - last:.0f} s ago", left_seconds)
    if len(turns.running) >= TOGETHER_MAX:
        return Refusal("other nodes are measuring their lines", RETRY_SECONDS)
    return Turns(turns.running | {node_id}, {**begun_at, (node_id, direction): now})


def end(turns: Turns, node_id: NodeId) -> Turns:
    """The turns without this one; when it began is still known."""
    return replace(turns, running=turns.running - {node_id})
