"""A node's half of its lease: when it beats and when it stops, by a clock that may run wrong.

Decides as the agent's `domain.session` does: a lease counts from the sending of the last heartbeat that was answered. Heartbeats of a node
that is well are no events, for thousands of them would be; when the last one left is worked out where it matters. It must not know
engines, nor what the coordinator thinks.
"""

from __future__ import annotations

import math
from typing import Final

from potluck_coordinator.domain.nodes import LivenessLimits

TICK_SECONDS: Final = 0.25
"""How often an agent looks whether a beat or the lease's end is due, by its own clock: four times a busy beat."""


class OwnLease:
    """One node's. All moments are the world's; `rate` says how many of its own seconds the node counts in one of these."""

    __slots__ = ("_answered_at", "_beat_at", "_busy", "_limits", "_round_trip_seconds", "_since", "heard_at", "rate")

    def __init__(self, limits: LivenessLimits, round_trip_seconds: float) -> None:
        self.rate = 1.0
        self._limits = limits
        self._round_trip_seconds = round_trip_seconds
        self._beat_at = 0.0
        self._answered_at = 0.0
        self.heard_at = 0.0
        """When the coordinator got its last beat before it fell silent, or its hello."""
        self._since: float | None = None
        """Since when it beats; None: it does not."""
        self._busy = False

    def seconds(self, own_seconds: float) -> float:
        """How long it really is until the node has counted so many."""
        return own_seconds / self.rate

    def welcomed(self, now: float) -> None:
        """A fresh lease, counted from the hello that was answered."""
        self._since = self._beat_at = self._answered_at = now - self._round_trip_seconds / 2
        self.heard_at = now

    def resumed(self, now: float) -> None:
        """It beats again, at once; whether that is answered shows."""
        self._since = self._beat_at = now

    def be_busy(self, now: float, *, busy: bool) -> None:
        """It has something to do from now on, or no longer: its beats come sooner, or later."""
        if busy is not self._busy:
            self._beat(now)
            self._busy = busy
            if self._since is not None and now - self._beat_at >= self._period_seconds:
                self._beat_at = now

    def fall_silent(self, now: float) -> float:
        """No beat leaves any more, and no answer comes; when the coordinator got the last beat."""
        self._beat(now)
        one_way_seconds = self._round_trip_seconds / 2
        self.heard_at = max(self.heard_at, self._last_before(now - one_way_seconds) + one_way_seconds)
        self._answered_at = self._last_before(now - self._round_trip_seconds)
        self._since = None
        return self.heard_at

    @property
    def is_silent(self) -> bool:
        """It has not beaten since it fell silent."""
        return self._since is None

    @property
    def ends_at(self) -> float:
        """When its lease lapses by its own clock, if nothing is answered any more."""
        return self._answered_at + self.seconds(self._limits.lease_ttl_seconds)

    @property
    def _period_seconds(self) -> float:
        limits = self._limits
        return self.seconds(limits.heartbeat_busy_seconds if self._busy else limits.heartbeat_idle_seconds)

    def _last_before(self, moment: float) -> float:
        """The last beat that left by then; without one the last that is known to have been answered."""
        if self._since is None:
            return self._answered_at
        sent_at = self._beat_at if self._beat_at <= moment else self._beat_at - self._period_seconds
        return max(self._answered_at, sent_at) if sent_at >= self._since else self._answered_at

    def _beat(self, now: float) -> None:
        """All beats that were due until now have left."""
        if self._since is not None and now > self._beat_at:
            self._beat_at += math.floor((now - self._beat_at) / self._period_seconds) * self._period_seconds
