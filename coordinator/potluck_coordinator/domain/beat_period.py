"""How often an idle node is to beat: as its operator set it, and more rarely where there are many, or this process is busy.

Decides the lease that goes with it, too: a node is suspect after two missed beats, and that before its lease ends; and when the first of
many that fell silent together lapses, all of them are overdue (`domain.nodes`). What a long period costs is that the loss of a node that
only waits is seen late; one that is given something to do beats each second from then on. It must not know links or clocks.
"""

from __future__ import annotations

from typing import Final

from potluck_coordinator.domain.nodes import LivenessLimits

LATE_SECONDS: Final = 1.0
"""Of the lease, kept for the way of a beat and the look that judges it."""
STRETCH_MAX: Final = 3.6
"""How many times as long as the operator set a period may become: with the usual 5 s just short of the ping that gRPC sends over a link
without a word for 20 s, which would cost as much as the beats that are saved."""
BEATS_PER_SECOND_MAX: Final = 1000.0
"""Of idle nodes together, as far as they may be stretched: a tenth of a core or two."""
LOAD_BEGIN: Final = 0.5
"""Of a core that this process spends: from here on idle nodes are heard more rarely."""
LOAD_FULL: Final = 0.9
"""From here on as rarely as may be."""
STEP_SECONDS: Final = 0.25
"""A period is told in such steps, so that a little more or less to do is not told to everybody."""


def idle_lease_seconds(period_seconds: float, limits: LivenessLimits) -> float:
    """The lease of a node that beats so rarely; never shorter than the operator's."""
    return max(limits.lease_ttl_seconds, (limits.missed_heartbeats_suspect + 0.5) * period_seconds + LATE_SECONDS)


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
