"""The heartbeats of one link: in full where there is something to say, and else in a word, which costs the coordinator next to nothing.

Decides what counts as something to say: all that the report tells, but for what changes by itself all the time, such as a card's power and
heat; that is told from time to time. It must not know when a heartbeat is due, nor what it means for the lease.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from potluck_protocol.cards import CardTelemetry

if TYPE_CHECKING:
    from potluck_node.report import SelfReport
    from potluck_protocol.values import AttemptId, Heartbeat, Hello

TELEMETRY_BUSY_SECONDS: Final = 10.0
"""So old may be what the coordinator knows of power, heat and disk."""
TELEMETRY_IDLE_SECONDS: Final = 60.0
"""The same of a node that has nothing to do."""


class Beats:
    """See the module.

    Args:
        report: what there is to say.
    """

    def __init__(self, report: SelfReport) -> None:
        self._report = report
        self._takes_brief = False
        self._said: Heartbeat | None = None
        """What lasts of the last one in full."""
        self._said_at_seconds = -math.inf

    def hello(self, in_flight: tuple[AttemptId, ...]) -> Hello:
        """A new connection's; what was said on another one counts no more, also where that one is gone back to."""
        self._takes_brief, self._said = False, None
        return self._report.hello(in_flight)

    def welcomed(self, *, takes_brief: bool) -> None:
        """The connection stands; whether its coordinator knows heartbeats in a word."""
        self._takes_brief = takes_brief

    def next(self, now_seconds: float, *, busy: bool) -> Heartbeat:
        """The heartbeat that leaves now."""
        heartbeat = self._report.heartbeat()
        lasting = lasting_word(heartbeat)
        fresh_seconds = TELEMETRY_BUSY_SECONDS if busy else TELEMETRY_IDLE_SECONDS
        if self._takes_brief and lasting == self._said and now_seconds - self._said_at_seconds < fresh_seconds:
            return replace(heartbeat, unchanged=True)
        self._said, self._said_at_seconds = lasting, now_seconds
        return heartbeat


def lasting_word(heartbeat: Heartbeat) -> Heartbeat:
    """What two heartbeats have alike between which nothing happened."""
    cards = tuple(
        CardTelemetry(card.uuid, lost=card.lost, xid_count=card.xid_count, thermal_rung=card.thermal_rung) for card in heartbeat.cards
    )
    return replace(heartbeat, number=0, progress_count=0, disk_free_bytes=0, cards=cards)
