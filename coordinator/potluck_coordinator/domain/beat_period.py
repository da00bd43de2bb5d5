"""How often an idle node is to beat: as its operator set it, and more rarely where there are many, or this process is busy.

Decides the lease that goes with it, too: a node is suspect after two missed beats, and that before its lease ends; and when the first of
many that fell silent together lapses, all of them are overdue (`domain.nodes`). What a long period costs is that the loss of a node that
only waits is seen late; where others wait for a node, it holds the operator's lease. It must not know links or clocks.
"""

from __future__ import annotations

from typing import Final

from potluck_coordinator.domain.nodes import LivenessLimits

LATE_SECONDS: Final = 1.0
"""Of the lease, kept for the way of a beat and the look that judges it."""
STRETCH_MAX: Final = 1.85
"""How many times as long as the operator set a period may become: with the usual 5 s a beat each 9.25 s. Each second one is answered, and a
link without an answer for 20 s would be pinged, which costs as much as a beat."""
BEATS_PER_SECOND_MAX: Final = 1000.0
"""Of idle nodes together, as far as they may be stretched: a tenth of a core or two."""
LOAD_BEGIN: Final = 0.5
"""Of a core that this process spends: from here on idle nodes are heard more rarely."""
LOAD_FULL: Final = 0.9
"""From here on as rarely as may be."""
STEP_SECONDS: Final = 0.25
"""A period is told in such steps, so that a little more or less to do is not told to everybody."""


def terms(idle_seconds: float, limits: LivenessLimits, *, is_awaited: bool) -> tuple[float, float]:
    """The idle period and the lease that a node is told, in seconds.

    Args:
        idle_seconds: as `idle_period_seconds` has it.
        limits: the operator's.
        is_awaited: others wait for the node, for its answers or in its group. Its lease is the operator's then, its period what that bears.
    """
    if idle_seconds <= limits.heartbeat_idle_seconds:
        return idle_seconds, limits.lease_ttl_seconds
    if is_awaited:
        bearable_seconds = (limits.lease_ttl_seconds - LATE_SECONDS) / limits.suspect_beats
        return min(idle_seconds, max(limits.heartbeat_idle_seconds, bearable_seconds)), limits.lease_ttl_seconds
    return idle_seconds, max(limits.lease_ttl_seconds, limits.suspect_beats * idle_seconds + LATE_SECONDS)


def idle_period_seconds(node_count: int, load: float, limits: LivenessLimits) -> float:
    """The period for idle nodes.

    Args:
        node_count: those that this process has links of.
        load: the share of a core that it spends, all its threads together.
        limits: the operator's.
    """
    shortest, longest = limits.heartbeat_idle_seconds, STRETCH_MAX * limits.heartbeat_idle_seconds
    by_count = node_count / BEATS_PER_SECOND_MAX
    by_load = shortest + (longest - shortest) * min(1.0, max(0.0, (load - LOAD_BEGIN) / (LOAD_FULL - LOAD_BEGIN)))
    wanted = max(by_count, by_load)
    if wanted <= shortest:
        return shortest
    return min(longest, STEP_SECONDS * -(-wanted // STEP_SECONDS))
