"""The modelled coordinator: sessions and leases, attempts, what reaches clients, what is charged.

Decides nothing about requests: it asks a policy where each goes and the live machine of `domain.requests` what becomes of one whose attempt
was lost, and carries the answers out as the gateway does. Bytes are put in order by the gateway's own `relay`; who is alive is
`lease_model`'s to say. It must not know how a node makes tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from potluck_coordinator.domain.nodes import LivenessLimits
from potluck_coordinator.domain.requests import (
    Abandoned,
    Broke,
    Completed,
    Dispatched,
    Effect,
    End,
    Event,
    Failure,
    Place,
    Said,
    Unplaced,
    advance,
)
from potluck_coordinator.gateway.relay import Relay
from potluck_coordinator.simulation.agenda import Agenda
from potluck_coordinator.simulation.asking import Outcome, Request
from potluck_coordinator.simulation.books import Books, price
from potluck_coordinator.simulation.conserving import Conserving
from potluck_coordinator.simulation.invariants import Invariants
from potluck_coordinator.simulation.lease_model import Session, Watch
from potluck_coordinator.simulation.lease_record import LeaseRecord
from potluck_coordinator.simulation.link_model import Frame, Work
from potluck_coordinator.simulation.node_model import Node
from potluck_coordinator.simulation.policy import Attempt, Go, Hold, Policy, Refuse, Verdict
from potluck_coordinator.simulation.scenario import Scenario
from potluck_protocol.values import AccountId, AttemptId, EndReason, NodeId

WINDOW_BYTES: Final = 1 << 30
"""Clients read as fast as they get: windows are no part of what is simulated. A token is a byte of the relay's."""
RETRY_SECONDS: Final = 5.0
"""What a client waits that was told no time."""
REQUEST_SECONDS_MAX: Final = 600.0
"""After which an answer that broke off is not continued any more."""


class CoordinatorModel:
    """One coordinator with one policy. `ended` is called with every request that is over for its client."""

    def __init__(
        self,
        agenda: Agenda,
        policy: Policy,
        invariants: Invariants,
        limits: LivenessLimits,
        scenario: Scenario,
        record: LeaseRecord,
        ended: Callable[[Request], None],
    ) -> None:
        self._agenda = agenda
        self._policy = policy
        self._invariants = invariants
        self._ended = ended
        self._request_tokens_max = scenario.request_tokens_max
        self._watch = Watch(agenda, policy, limits, lambda: self.open_count, self._lost, self._close_session)
        self._record = record
        self.books = Books(invariants)
        self.sessions: dict[NodeId, Session] = {}
        self._conserving = Conserving(policy.beliefs, self.sessions, invariants, scenario)
        self.attempts: dict[int, Attempt] = {}
        self.open_count = 0
        """Of the sessions."""
        self.down_until = -1.0
        self.refused_frame_count = 0
        self.lost_attempt_count = 0
        self._epochs: dict[NodeId, int] = {}
        self._charged: dict[int, int] = {}
        self._attempt_number = 0

    @property
    def doubted_at(self) -> float:
        """When it last doubted itself, and evicted nobody."""
        return self._watch.doubted_at

    # Clients.

    def arrive(self, request: Request) -> None:
        """A client asks."""
        now = self._agenda.now
        if now < self.down_until:
            self._end(request, Outcome.FAILED, self.down_until - now + 1.0)
            return
        if request.prompt_tokens >= self._request_tokens_max:
            # As the live gateway does: no node could ever take it.
            self._advance(request, Unplaced())
            self._end(request, Outcome.TOO_LONG)
            return
        self._agenda.after(request.patience_seconds, self._patience_over, request)
        # Whoever waits comes first.
        self.serve_waiting()
        self._carry_out(request, self._policy.arrive(request, now))

    def _carry_out(self, request: Request, verdict: Verdict) -> None:
        match verdict:
            case Go(node_id):
                self._dispatch(request, node_id)
            case Hold():
                request.waiting = True
                self.serve_waiting()
            case Refuse():
                self._conserving.refused(request, self._agenda.now)
                self._refuse(request, verdict)

    def _refuse(self, request: Request, refusal: Refuse) -> None:
        self._advance(request, Unplaced())
        self._end(request, Outcome.REFUSED if request.attempt_count == 0 else Outcome.FAILED, refusal.retry_after_seconds)

    def serve_waiting(self) -> None:
        """Something may have become free."""
        while (found := self._policy.next_up(self._agenda.now)) is not None:
            self._dispatch(*found)

    def sweep(self) -> None:
        """Every second: those that waited for too long, and whoever can be served although nothing happened."""
        self._policy.heard(self._agenda.now)
        self.serve_waiting()
        sent_away = self._policy.sweep(self._agenda.now)
        self._conserving.sent_away([request for request, _ in sent_away], self._agenda.now)
        for request, refusal in sent_away:
            request.waiting = False
            self._refuse(request, refusal)
        self.serve_waiting()
        self._conserving.look(self._policy.waiting(), self._agenda.now)

    def _patience_over(self, request: Request) -> None:
        if request.outcome is not Outcome.OPEN or request.first_token_at is not None:
            return
        if request.waiting:
            self._policy.left(request)
            request.waiting = False
        for attempt_id in request.attempts:
            attempt = self.attempts.get(attempt_id)
            if attempt is not None:
                self._close(attempt, whole=False)
                self._tell_to_cancel(attempt)
        self._advance(request, Abandoned())
        self._end(request, Outcome.LEFT, RETRY_SECONDS)
        self.serve_waiting()

    def _end(self, request: Request, outcome: Outcome, retry_after_seconds: float = RETRY_SECONDS) -> None:
        now = self._agenda.now
        request.outcome = outcome
        request.ended_at = now
        request.retry_after_seconds = retry_after_seconds
        charged = self._charged.pop(request.number, 0)
        self._invariants.request_charged(request.number, charged, price(request.prompt_tokens, request.delivered_tokens), now)
        for attempt_id in request.attempts:
            self.books.forget(attempt_id)
        self._ended(request)

    # Attempts.

    def _dispatch(self, request: Request, node_id: NodeId) -> None:
        now = self._agenda.now
        session = self.sessions[node_id]
        self._attempt_number += 1
        attempt_id = self._attempt_number
        prompt_tokens = request.prompt_tokens + request.delivered_tokens
        relay = Relay(AttemptId(str(attempt_id)), WINDOW_BYTES, now, _acknowledge)
        attempt = Attempt(attempt_id, request, node_id, prompt_tokens, relay, now)
        request.waiting = False
        request.attempt_count += 1
        request.attempts.append(attempt_id)
        self.attempts[attempt_id] = attempt
        session.attempts[attempt_id] = attempt
        if session.busy_since is None:
            session.busy_since = now
        most = price(request.prompt_tokens, request.answer_tokens_max)
        self.books.open(attempt_id, request.account_id, AccountId(f"owner-of-{node_id}"), most, now)
        self._advance(request, Dispatched(node_id))
        self._policy.began(attempt, now)
        work = Work(attempt_id, session.epoch, prompt_tokens, request.tokens_left, request.delivered_tokens, request.prefixes)
        node = session.node
        self._agenda.after(node.round_trip_seconds / 2, node.start, work, node.link_number)

    def _close(self, attempt: Attempt, *, whole: bool) -> None:
        """It is over, one way or the other: settled, and its slot is free."""
        now, request = self._agenda.now, attempt.request
        del self.attempts[attempt.attempt_id]
        session = self.sessions[attempt.node_id]
        session.attempts.pop(attempt.attempt_id, None)
        if not session.attempts and session.busy_since is not None:
            session.busy_since = None
        # A prompt is paid for once, with the answer's end; what broke off is paid by the tokens that came.
        amount = price(request.prompt_tokens if whole else 0, attempt.answered_tokens)
        self._record.paid(attempt.attempt_id, attempt.answered_tokens, now)
        charged = self.books.settle(attempt.attempt_id, amount, now)
        self._charged[request.number] = self._charged.get(request.number, 0) + charged
        self._policy.over(attempt, now, whole=whole)

    def _lost(self, attempt: Attempt, failure: Failure = Failure.LOST) -> None:
        """An attempt failed: its request goes on elsewhere if the policy knows how, else its client gets an error."""
        if attempt.attempt_id not in self.attempts:
            return
        request = attempt.request
        self.lost_attempt_count += failure is Failure.LOST
        failed = Outcome.TOO_LONG if failure is Failure.UNFIT and not request.delivered_tokens else Outcome.FAILED
        self._close(attempt, whole=False)
        self._tell_to_cancel(attempt)
        if not self._policy.keeps_leases:
            self._end(request, failed)
            return
        seconds_left = REQUEST_SECONDS_MAX - (self._agenda.now - request.arrived_at)
        for effect in self._advance(request, Broke(failure, Said(anything=request.delivered_tokens > 0), seconds_left)):
            match effect:
                case Place(excluded):
                    request.excluded = excluded
                    self._carry_out(request, self._policy.arrive(request, self._agenda.now))
                case End():
                    self._end(request, failed)
                case _:
                    # The attempt has been settled already.
                    pass

    def _tell_to_cancel(self, attempt: Attempt) -> None:
        session = self.sessions[attempt.node_id]
        node = session.node
        if session.open and node.linked:
            self._agenda.after(node.round_trip_seconds / 2, node.be_told_to_cancel, attempt.attempt_id, node.link_number)

    def _advance(self, request: Request, event: Event) -> tuple[Effect, ...]:
        """The live machine over one request; a peer has none."""
        if not self._policy.keeps_leases:
            return ()
        request.course, effects = advance(request.course, event)
        return effects

    # The link.

    def receive(self, node: Node, frame: Frame) -> None:
        """A frame arrives over a link that stands."""
        now = self._agenda.now
        session = self.sessions.get(node.node_id)
        if session is None or not self.is_current(session, frame.epoch):
            self.refused_frame_count += 1
            if session is None or not session.open:
                node.turned_away()
            return
        self._record.counted(node.node_id, frame.epoch, now)
        attempt = self.attempts.get(frame.attempt_id)
        if attempt is None:
            return
        relay = attempt.relay
        sequence_before = relay.next_sequence
        relay.receive(frame.sequence, bytes(frame.token_count), now)
        if relay.next_sequence > sequence_before and frame.token_count:
            self._record.earned(node.node_id, frame.epoch, attempt.attempt_id, frame.token_count, now)
            self._deliver(attempt, frame, now)
        if frame.ends:
            relay.end(frame.sequence + 1, EndReason.ENGINE_FAILED if frame.died else EndReason.COMPLETED, "")
        if relay.over:
            self._relay_over(attempt, node, relay, frame)

    def is_current(self, session: Session, epoch: int) -> bool:
        """Whether words of that epoch count: the fence between a session and its ghosts."""
        return session.open and epoch == session.epoch

    def _relay_over(self, attempt: Attempt, node: Node, relay: Relay, frame: Frame) -> None:
        if frame.refused:
            self._lost(attempt, Failure.UNFIT)
        elif frame.ends and not frame.died and relay.next_sequence == frame.sequence + 1:
            node.forget(attempt.attempt_id)
            attempt.cached_tokens = frame.cached_tokens
            self._close(attempt, whole=True)
            request = attempt.request
            self._advance(request, Completed())
            # It ends at the latest where its node's context does.
            whole_tokens = min(request.answer_tokens, node.node_class.request_tokens_max - request.prompt_tokens)
            self._invariants.answer_ended(request.number, request.delivered_tokens, whole_tokens, self._agenda.now)
            self._end(request, Outcome.SERVED)
        else:
            self._lost(attempt)
        self.serve_waiting()

    def _deliver(self, attempt: Attempt, frame: Frame, now: float) -> None:
        request = attempt.request
        self._invariants.tokens_arrived(request.number, frame.first_token_index, frame.token_count, request.delivered_tokens, now)
        request.delivered_tokens += frame.token_count
        request.last_token_at = now
        attempt.answered_tokens += frame.token_count
        if request.first_token_at is None:
            request.first_token_at = now
        if attempt.first_token_at is None:
            attempt.first_token_at = now
            self._policy.first_token(attempt, now)

    def hello(self, node: Node) -> None:
        """A node's link stands. Within the grace its session goes on, else it gets a new one, and what it was doing is nobody's."""
        now = self._agenda.now
        if now < self.down_until:
            node.lose_coordinator(self.down_until - now)
            return
        session = self.sessions.get(node.node_id)
        if session is not None and session.open:
            session.link_lost_at = None
            points = {
                number: attempt.relay.next_sequence for number, attempt in session.attempts.items() if isinstance(attempt.relay, Relay)
            }
            node.welcome(session.epoch, points)
            return
        epoch = self._epochs[node.node_id] = self._epochs.get(node.node_id, 0) + 1
        self.sessions[node.node_id] = Session(node, epoch, now)
        self.open_count += 1
        node.welcome(epoch, {})
        self._policy.joined(node, now)
        self.serve_waiting()

    def link_broke(self, node: Node, *, goodbye: bool = False) -> None:
        """The link's end was seen at this end, too."""
        session = self.sessions.get(node.node_id)
        if session is None or not session.open:
            return
        session.link_lost_at = self._agenda.now
        if goodbye or not self._policy.keeps_leases:
            self._close_session(session)
        else:
            self._watch.begin(session)

    def fell_silent(self, node: Node) -> None:
        """Its heartbeats stop, although its link stands."""
        session = self.sessions.get(node.node_id)
        if session is not None and session.open:
            self._watch.begin(session)

    def heartbeat(self, node: Node) -> None:
        """The first one after a silence; a node whose session is over hears so."""
        session = self.sessions.get(node.node_id)
        if session is None or not self.is_current(session, node.epoch):
            self.refused_frame_count += 1
            node.turned_away()
        else:
            self._record.counted(node.node_id, node.epoch, self._agenda.now)

    def orders_changed(self, node: Node) -> None:
        """Its next heartbeat, which a change does not wait for, tells of other slots."""
        session = self.sessions.get(node.node_id)
        if session is not None and session.open:
            self._policy.orders(node, self._agenda.now)
            self.serve_waiting()

    def _close_session(self, session: Session) -> None:
        session.open = False
        self.open_count -= 1
        node_id = session.node.node_id
        self._record.ended(node_id, session.epoch)
        self._policy.gone(node_id, self._agenda.now)
        for attempt in tuple(session.attempts.values()):
            self._lost(attempt)
        self.serve_waiting()

    # The coordinator itself.

    def restart(self, seconds: float) -> None:
        """It dies, and is back after so long: clients lose their connections, nodes their sessions, and nobody any credits."""
        for session in self.sessions.values():
            if session.open:
                session.node.stream_out()
        self.down_until = self._agenda.now + seconds
        for session in self.sessions.values():
            if session.open:
                session.open = False
                self.open_count -= 1
                self._record.ended(session.node.node_id, session.epoch)
                self._policy.gone(session.node.node_id, self._agenda.now)
                session.node.lose_coordinator(seconds)
        self.books.gateway_epoch += 1
        for attempt in tuple(self.attempts.values()):
            self._close(attempt, whole=False)
            self._end(attempt.request, Outcome.FAILED, seconds + 1.0)
        while waiting := self._policy.waiting():
            for request in waiting:
                self._policy.left(request)
                request.waiting = False
                self._end(request, Outcome.FAILED, seconds + 1.0)


def _acknowledge(attempt_id: AttemptId, next_sequence: int) -> None:
    """Windows are no part of what is simulated."""
