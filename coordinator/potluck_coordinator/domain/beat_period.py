"""How often an idle node is to beat: as its operator set it, and more rarely where there are many, or this process is busy.

Decides within what the lease allows: a node is suspect after two missed beats, and that before its lease ends; and when the first of many
that fell silent together lapses, all of them are overdue (`domain.nodes`). It must not know links or clocks.
"""

from __future__ import annotations

from typing import Final

from potluck_coordinator.domain.nodes import LivenessLimits

LATE_SECONDS: Final = 1.0
"""Of the lease, kept for the way of a beat and the look that judges it."""
BEATS_PER_SECOND_MAX: Final = 1000.0
"""Of idle nodes together, as far as the lease allows: a tenth of a core or two."""
LOAD_BEGIN: Final = 0.5
"""Of a core that this process spends: from here on idle nodes are heard more rarely."""
LOAD_FULL: Final = 0.9
"""From here on as rarely as the lease allows."""
STEP_SECONDS: Final = 0.25
"""A period is told in such steps, so that a little more or less to do is not told to everybody."""


def longest_idle_seconds(limits: LivenessLimits) -> float:
    """The longest period that the lease bears; never shorter than what the operator set."""
    bearable = (limits.lease_ttl_seconds - LATE_SECONDS) / (limits.missed_heartbeats_suspect + 0.5)
    return max(limits.heartbeat_idle_seconds, bearable)


def idle_period_seconds(node_count: int, load: float, limits: LivenessLimits) -> float:
    """The period for idle nodes.

    Args:
        node_count: those that this process has links of.
        load: the share of a core that it spends, all its threads together.
        limits: the lease and its companions.
    """
    shortest, longest = limits.heartbeat_idle_seconds, longest_idle_seconds(limits)
    by_count = node_count / BEATS_PER_SECOND_MAX
    by_load = shortest + (longest - shortest) * min(1.0, max(0.0, (load - LOAD_BEGIN) / (LOAD_FULL - LOAD_BEGIN)))
    wanted = max(by_count, by_load)
    if wanted <= shortest:
        return shortest
    return min(longest, STEP_SECONDS * -(-wanted // STEP_SECONDS))
