"""Whose absence a plan may act upon: not that of many nodes which went within one window, for the coordinator's own line is likelier.

Decides what an absence counts for. While the doubt lasts, nodes that went together are taken for just gone: nothing new is wished of them,
and nothing of theirs is moved. It must not know who heard them last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.nodes import DOUBT_SECONDS_MAX, is_mass_silence

if TYPE_CHECKING:
    from collections.abc import Mapping

    from potluck_protocol.values import NodeId

TOGETHER_SECONDS: Final = 30.0
"""Two lease times: so far apart are they missed who fell silent at once."""


def apparent_absences(
    absent_since: Mapping[NodeId, float], silent_since: Mapping[NodeId, float], present_count: int, now: float
) -> dict[NodeId, float]:
    """Since when nodes count as absent.

    Args:
        absent_since: everyone who does not serve now, for whatever reason.
        silent_since: of these, who went without a goodbye.
        present_count: how many are connected.
        now: monotonic seconds.
    """
    return {**absent_since, **dict.fromkeys(_went_together(silent_since, present_count, now), now)}


def _went_together(silent_since: Mapping[NodeId, float], present_count: int, now: float) -> set[NodeId]:
    """Everyone who is in some window with too many others for a coincidence, and not longer away than doubt lasts."""
    order = sorted(silent_since.items(), key=lambda item: item[1])
    doubted: set[NodeId] = set()
    end = 0
    for begin, (_, began_at) in enumerate(order):
        end = max(end, begin)
        while end < len(order) and order[end][1] - began_at < TOGETHER_SECONDS:
            end += 1
        if now - began_at < DOUBT_SECONDS_MAX and is_mass_silence(end - begin, present_count + end - begin):
            doubted.update(node_id for node_id, _ in order[begin:end])
    return doubted
