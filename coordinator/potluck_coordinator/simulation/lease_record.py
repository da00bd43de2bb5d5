"""Who really held which lease when, by the world's own clock.

Decides whether a word that the coordinator counted, an answer that it paid for, or a node that goes on working had a lease. It writes down
grants as nodes get them, ends as they are made, and expiry from when a beat really arrived; it never looks at the coordinator's sessions or
at a node's own clock, which are what is judged. It must not know requests or policies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from potluck_coordinator.simulation.agenda import Agenda
from potluck_coordinator.simulation.invariants import Invariant, Invariants
from potluck_protocol.values import NodeId

MARGIN_SECONDS: Final = 1.1
"""By which the two ends of a lease may differ: a clock that runs a twentieth slow over fifteen seconds, and one tick of the agent's."""
LATE_SECONDS: Final = 1.0
"""How long the coordinator may take to see that a lease has lapsed: it looks four times a second, and doubts itself before it judges."""


@dataclass(slots=True)
class _Lease:
    """The last one that a node was granted."""

    epoch: int
    expires_at: float | None = None
    """None: the node is heard of, and renews it."""
    ended: bool = False
    judged_at: float = 0.0
    """Not before: its node stood still until shortly."""


class LeaseRecord:
    """One world's.

    Args:
        agenda: the time.
        invariants: are told of breaks.
        ttl_seconds: of a lease; infinite where the policy knows none.
        doubted_at: when the coordinator last doubted itself: until then it evicts nobody.
    """

    def __init__(self, agenda: Agenda, invariants: Invariants, ttl_seconds: float, doubted_at: Callable[[], float]) -> None:
        self._agenda = agenda
        self._invariants = invariants
        self._ttl_seconds = ttl_seconds
        self._doubted_at = doubted_at
        self._leases: dict[NodeId, _Lease] = {}
        self._earned_tokens: dict[int, int] = {}

    def granted(self, node_id: NodeId, epoch: int) -> None:
        """A node was welcomed; by the same epoch its lease goes on."""
        lease = self._leases.get(node_id)
        if lease is None or lease.epoch != epoch:
            self._leases[node_id] = _Lease(epoch)
        else:
            lease.expires_at = None

    def renewed(self, node_id: NodeId, epoch: int) -> None:
        """A beat of that epoch has arrived, after a silence."""
        lease = self._leases.get(node_id)
        if lease is not None and lease.epoch == epoch:
            lease.expires_at = None

    def silent(self, node_id: NodeId, heard_at: float, is_at_work: Callable[[], bool]) -> None:
        """Nothing comes any more, and the last beat arrived then."""
        lease = self._leases.get(node_id)
        if lease is not None and self._ttl_seconds < math.inf:
            lease.expires_at = heard_at + self._ttl_seconds
            self._judge_later(node_id, lease, is_at_work)

    def awake(self, node_id: NodeId, is_at_work: Callable[[], bool]) -> None:
        """A node that stood still can look at its clock again."""
        lease = self._leases.get(node_id)
        if lease is not None and lease.expires_at is not None:
            self._judge_later(node_id, lease, is_at_work)

    def _judge_later(self, node_id: NodeId, lease: _Lease, is_at_work: Callable[[], bool]) -> None:
        assert lease.expires_at is not None
        lease.judged_at = max(self._agenda.now, lease.expires_at) + MARGIN_SECONDS
        self._agenda.at(lease.judged_at, self._judge, node_id, lease, lease.expires_at, is_at_work)

    def _judge(self, node_id: NodeId, lease: _Lease, expires_at: float, is_at_work: Callable[[], bool]) -> None:
        """Unless it was heard of in between: a node that could have looked at its clock for a while has nothing in hand any more."""
        is_due = lease is self._leases.get(node_id) and lease.expires_at == expires_at and lease.judged_at <= self._agenda.now
        if is_due and is_at_work():
            words = f"{node_id} works {self._agenda.now - expires_at:.1f} s after its lease {lease.epoch} has lapsed"
            self._invariants.break_of(Invariant.GHOST_LEASE, words, self._agenda.now)

    def ended(self, node_id: NodeId, epoch: int) -> None:
        """The coordinator has given the lease up: what it was for is somebody else's."""
        lease = self._leases.get(node_id)
        if lease is not None and lease.epoch == epoch:
            lease.ended = True

    def counted(self, node_id: NodeId, epoch: int, now: float) -> None:
        """The coordinator took a word of a node's for what it says."""
        reason = self._why_not(node_id, epoch, now)
        if reason is not None:
            self._invariants.break_of(Invariant.GHOST_LEASE, f"a word of {node_id}'s session {epoch} counted, {reason}", now)

    def earned(self, node_id: NodeId, epoch: int, attempt_id: int, token_count: int, now: float) -> None:
        """These tokens of an attempt reach its client: by a node with a lease, or as a gift."""
        if self._why_not(node_id, epoch, now) is None:
            self._earned_tokens[attempt_id] = self._earned_tokens.get(attempt_id, 0) + token_count

    def paid(self, attempt_id: int, token_count: int, now: float) -> None:
        """An attempt is over, and so many tokens of it are paid for."""
        earned = self._earned_tokens.pop(attempt_id, 0)
        if token_count > earned:
            words = f"attempt {attempt_id} was paid for {token_count} tokens, {earned} of which came under a lease"
            self._invariants.break_of(Invariant.GHOST_LEASE, words, now)

    def _why_not(self, node_id: NodeId, epoch: int, now: float) -> str | None:
        lease = self._leases.get(node_id)
        if lease is None or lease.epoch != epoch:
            return f"and its lease is {'none' if lease is None else lease.epoch}"
        if lease.ended:
            return "whose lease was given up"
        if lease.expires_at is not None and now > max(lease.expires_at, self._doubted_at()) + LATE_SECONDS:
            return f"{now - lease.expires_at:.1f} s after its lease had lapsed"
        return None
