"""Every attempt of this node: asked of an engine on loopback, relayed in whole events or pieces, with one end.

Decides which attempts are taken, when an engine's answer is read on, and when an attempt may be forgotten. It must not know the link's
streams or channels: `orders` feeds it starts, acknowledgements and cancels, `link` resumes all or abandons all (a lapsed lease drops them
without a word), and `delivery` writes their chunks into frames.

Reading stops while an attempt's window is full, so a slow client slows its own engine answer by TCP's back-pressure and nothing else.
Cancelling closes the engine's connection at once, which frees its slot. What is noticed of the engines themselves goes to `engine_watches`:
who waits for them, what they say, and who was there when one died.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Final

import structlog

from potluck_node.delivery import Delivery
from potluck_node.domain.event_stream import EventTooLargeError
from potluck_node.domain.failures import may_be_a_requests_fault
from potluck_node.engine_exchange import EngineConnections, EngineUnreachableError
from potluck_node.engine_watches import EngineWatches
from potluck_node.engines.base import EngineAddress
from potluck_node.engines.standstill import Ear
from potluck_node.relaying import EVENT_BYTES_MAX, EngineDyingError, Relaying
from potluck_node.replicas import Replicas
from potluck_protocol.clock import Clock
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import AttemptId, EndReason, FailureKind, NodeState, ReplicaId, ResumePoint, StartAttempt

URGENT_PIECE_COUNT: Final = 2
"""Pieces of a new answer that wait for no company on the link: engines name the role in the first, the first token is in the second."""
DELIVERED_KEPT_SECONDS: Final = 20.0
"""How long an attempt whose chunks are all acknowledged is remembered after its end was sent, in case the link broke under that; longer
than the usual lease."""
DEATH_KNOWN_SECONDS: Final = 4.0
"""How long an attempt whose answer broke off waits to hear that its engine died, which mostly takes milliseconds: connections close before
a process is gone and its last lines are read, and on a busy machine that took more than a second."""
DYING_SECONDS: Final = 10.0
"""For an engine that said it dies to end: on two cores it took 2.1 s."""
UNDELIVERED_KEPT_SECONDS: Final = 600.0
"""How long an ended attempt waits for the coordinator to acknowledge its end; a lease that lapses before drops it sooner."""

_log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class _Attempt:
    replica_id: ReplicaId
    delivery: Delivery
    room: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    ended_at_seconds: float | None = None
    queued: bool = False
    """It stands in the line of attempts with something to send."""
    start: StartAttempt | None = None
    """While it is with its engine."""
    ear: Ear | None = None
    outlived: FailureKind | None = None
    """How its engine ended while it was held up: what that engine had said is read on."""


def _no_link_yet(_urgent: bool) -> None:
    return


def _ended(kind: FailureKind) -> str:
    return f"the engine ended ({kind})"


class Attempts:
    """The node's attempts.

    Args:
        replicas: where engines are, and how many slots each has.
        connections: to engines, this node's attempts' alone.
        clock: time.
        node_state: whether new attempts are welcome.
        slot_count_max: the owner's limit for one engine, whatever the coordinator wished; None: no limit.
        slots_now: how many of so many slots a replica may use for now.
    """

    def __init__(
        self,
        *,
        replicas: Replicas,
        connections: EngineConnections,
        clock: Clock,
        node_state: Callable[[], NodeState],
        slot_count_max: int | None,
        slots_now: Callable[[ReplicaId, int], int] = lambda _, slot_count: slot_count,
    ) -> None:
        self._replicas = replicas
        self._connections = connections
        self._clock = clock
        self._node_state = node_state
        self._slot_count_max = slot_count_max
        self._slots_now = slots_now
        self.wake: Callable[[bool], None] = _no_link_yet
        """Called after there is something new to send; True means at once. The link puts itself here."""
        self._attempts: dict[AttemptId, _Attempt] = {}
        self._line: deque[_Attempt] = deque()
        self._running: dict[ReplicaId, int] = {}
        self.watches = EngineWatches(clock.monotonic_seconds)
        self.progress_count = 0
        replicas.on_death(self._lose_engine)

    # What the agent, the link and the report read.

    @property
    def busy(self) -> bool:
        """An attempt runs, or its bytes have not all been sent."""
        return bool(self._line) or any(attempt.ended_at_seconds is None for attempt in self._attempts.values())

    @property
    def has_waiting(self) -> bool:
        """Something may wait to be sent."""
        return bool(self._line)

    @property
    def in_flight(self) -> tuple[AttemptId, ...]:
        """Attempts that the coordinator may still ask about."""
        return tuple(self._attempts)

    def running_count(self, replica_id: ReplicaId) -> int:
        """Slots of a replica that are taken."""
        return self._running.get(replica_id, 0)

    # What the coordinator says.

    def start(self, start: StartAttempt) -> None:
        """Takes an attempt, or refuses it with the reason. One that is already known, as after a reconnect, is left alone."""
        if start.attempt_id in self._attempts:
            return
        attempt = _Attempt(start.replica_id, Delivery(start.attempt_id, start.window_bytes))
        self._attempts[start.attempt_id] = attempt
        if self.watches.refuses(start):
            self._end(attempt, EndReason.REFUSED, "engines of this node died of this request", blamed=True)
            return
        address = self._replicas.ready_address(start.replica_id)
        refusal = self._refusal(start.replica_id) if address else "the replica has no ready engine"
        if refusal or address is None:
            self._end(attempt, EndReason.REFUSED, refusal)
            return
        self._running[start.replica_id] = self.running_count(start.replica_id) + 1
        attempt.start = start
        attempt.task = asyncio.create_task(self._run(attempt, start, address), name=f"attempt {start.attempt_id}")

    def refuse(self, attempt_id: AttemptId, detail: str) -> None:
        """Answers an attempt that could not even be read."""
        if attempt_id not in self._attempts:
            self._end_unknown(attempt_id, EndReason.REFUSED, detail, 0)

    def cancel(self, attempt_id: AttemptId) -> None:
        """Closes the engine's connection at once and forgets the attempt; of one that was running the end is still sent.

        The coordinator has forgotten it as well: it acknowledges nothing more of it, and would not resume it.
        """
        attempt = self._attempts.get(attempt_id)
        if attempt is None:
            return
        if attempt.delivery.ended:
            self._forget(attempt)
            return
        del self._attempts[attempt_id]
        if attempt.start is not None:
            self.watches.left(attempt.start)
        attempt.delivery.cancel()
        self._end(attempt, EndReason.CANCELLED)

    def end_running(self, reason: EndReason, detail: str, replica_id: ReplicaId | None = None) -> int:
        """Ends all that run, or those of one replica, behind what they have said so far, to be continued elsewhere; how many there were."""
        running = [attempt for attempt in self._attempts.values() if attempt.start and replica_id in {None, attempt.replica_id}]
        for attempt in running:
            self._end(attempt, reason, detail)
        return len(running)

    def acknowledge(self, attempt_id: AttemptId, next_sequence: int) -> None:
        """Frees the window of an attempt."""
        attempt = self._attempts.get(attempt_id)
        if attempt is None:
            return
        attempt.delivery.acknowledge(next_sequence)
        attempt.room.set()
        if attempt.delivery.end_acknowledged:
            self._forget(attempt)

    def resume(self, named: Iterable[AttemptId], resume_points: Mapping[AttemptId, ResumePoint]) -> None:
        """After a welcome: of the attempts named in the hello, those with a resume point go on from it, the others are dropped."""
        for attempt_id in named:
            attempt = self._attempts.get(attempt_id)
            point = resume_points.get(attempt_id)
            if attempt is None and point is not None:
                # The lease lapsed between our hello and the welcome: what was dropped then must still be ended.
                self._end_unknown(attempt_id, EndReason.ENGINE_FAILED, "the node's lease had lapsed", point.next_sequence)
            elif attempt is None:
                continue
            elif point is None or not attempt.delivery.rewind(point) or attempt.delivery.end_acknowledged:
                self._forget(attempt)
            else:
                attempt.room.set()
                self._stand_in_line(attempt, urgent=True)

    def abandon_all(self) -> int:
        """Fenced: drops every attempt without a word; how many there were."""
        dropped = list(self._attempts.values())
        for attempt in dropped:
            self._forget(attempt)
        # What is left are the ends of cancelled attempts.
        self._line.clear()
        return len(dropped)

    # What the link does.

    def move_into(self, frame: node_pb2.NodeFrame, bytes_max: int) -> bool:
        """Moves everything that waits, in turn and at most `bytes_max`, into the frame; False where nothing waited."""
        moved = False
        left_bytes = bytes_max
        while self._line and left_bytes > 0:
            attempt = self._line.popleft()
            attempt.queued = False
            if not attempt.delivery.waiting:
                continue
            left_bytes -= attempt.delivery.move_into(frame, left_bytes)
            moved = True
            if attempt.delivery.waiting:
                self._stand_in_line(attempt, urgent=False)
            elif attempt.delivery.ended:
                attempt.ended_at_seconds = self._clock.monotonic_seconds()
        return moved

    def sweep(self) -> None:
        """Forgets ended attempts whose acknowledgement will not come any more."""
        now_seconds = self._clock.monotonic_seconds()
        for attempt in list(self._attempts.values()):
            if attempt.ended_at_seconds is None:
                continue
            kept_seconds = DELIVERED_KEPT_SECONDS if attempt.delivery.all_acknowledged else UNDELIVERED_KEPT_SECONDS
            if now_seconds - attempt.ended_at_seconds >= kept_seconds:
                self._forget(attempt)

    async def close(self) -> None:
        """Drops every attempt and waits until its engine connection is closed."""
        tasks = [attempt.task for attempt in self._attempts.values() if attempt.task is not None]
        self.abandon_all()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._connections.close()

    # How an attempt runs.

    def _refusal(self, replica_id: ReplicaId) -> str:
        state = self._node_state()
        if state is not NodeState.SERVING:
            return f"the node is {state}"
        if replica_id in self.watches.frozen:
            return "the replica's engine stands still"
        slot_count = self._replicas.slot_count_of(replica_id)
        if self._slot_count_max is not None:
            slot_count = min(slot_count, self._slot_count_max)
        slot_count = self._slots_now(replica_id, slot_count)
        if self.running_count(replica_id) >= slot_count:
            return f"all {slot_count} slots of the replica are taken"
        return ""

    async def _run(self, attempt: _Attempt, start: StartAttempt, address: EngineAddress) -> None:
        attempt.ear = self.watches.listen(start)
        try:
            try:
                await self._relay(attempt, start, address, attempt.ear)
            except EngineUnreachableError:
                # It has just gone, and its next heartbeat would have said so.
                self._end(attempt, EndReason.REFUSED, "the engine takes no connections")
            except EngineDyingError:
                await asyncio.sleep(DYING_SECONDS)
                self._end(attempt, EndReason.ENGINE_FAILED, "the engine said that it failed")
            except OSError as error:  # TimeoutError is one
                if attempt.outlived is None:
                    # Should the engine have died, `_lose_engine` ends this attempt before that.
                    await asyncio.sleep(DEATH_KNOWN_SECONDS)
                # Only the kind of failure: an exception's own text may quote the request.
                broke_off = f"the engine's connection failed: {type(error).__name__}"
                self._end(attempt, EndReason.ENGINE_FAILED, _ended(attempt.outlived) if attempt.outlived else broke_off)
        except EventTooLargeError:
            self._end(attempt, EndReason.ENGINE_FAILED, f"the engine wrote an event of more than {EVENT_BYTES_MAX} bytes")
        except Exception as error:  # noqa: BLE001 - an attempt always gets its end, and the traceback could hold the request
            _log.error("attempt_broke", attempt_id=start.attempt_id, error_kind=type(error).__name__)
            self._end(attempt, EndReason.ENGINE_FAILED, "the agent failed to relay the answer")
        else:
            self._end(attempt, EndReason.COMPLETED)

    async def _relay(self, attempt: _Attempt, start: StartAttempt, address: EngineAddress, ear: Ear) -> None:
        stopwatch = self.watches.solo.begin(start, alone=self.running_count(start.replica_id) == 1)
        answer = await self._connections.ask(address.url, start.endpoint.value, address.headers, start.body)
        try:
            pushed = partial(self._pushed, attempt)
            await Relaying(start, answer, attempt.delivery, attempt.room, ear=ear, stopwatch=stopwatch, on_pushed=pushed).run()
            if answer.http_status == HTTPStatus.OK:
                self.watches.answered(start)
                self.watches.solo.end(start, stopwatch)
        finally:
            answer.close()

    def _pushed(self, attempt: _Attempt, piece_number: int) -> None:
        self.progress_count += 1
        self._stand_in_line(attempt, urgent=piece_number < URGENT_PIECE_COUNT)

    def _lose_engine(self, replica_id: ReplicaId, kind: FailureKind) -> None:
        """Ends what waited for it. An answer that only its client holds up may have come whole before, and is read on."""
        waiting = []
        for attempt in self._attempts.values():
            if attempt.replica_id != replica_id or attempt.ear is None:
                continue
            if attempt.ear.listening:
                waiting.append(attempt)
            else:
                attempt.outlived = kind
        engine_kind = next((status.engine_kind for status in self._replicas.statuses() if status.replica_id == replica_id), "")
        blamed = may_be_a_requests_fault(kind, engine_kind)
        self.watches.died(replica_id, [attempt.start for attempt in waiting if attempt.start], may_be_their_fault=blamed)
        for attempt in waiting:
            self._end(attempt, EndReason.ENGINE_FAILED, _ended(kind), blamed=blamed)

    def _end_unknown(self, attempt_id: AttemptId, reason: EndReason, detail: str, sequence: int) -> None:
        attempt = _Attempt(ReplicaId(""), Delivery(attempt_id, 0, sequence))
        self._attempts[attempt_id] = attempt
        self._end(attempt, reason, detail)

    def _end(self, attempt: _Attempt, reason: EndReason, detail: str = "", *, blamed: bool = False) -> None:
        attempt.delivery.finish(reason, detail, blamed=blamed)
        self._free_slot(attempt)
        self._stand_in_line(attempt, urgent=True)

    def _free_slot(self, attempt: _Attempt) -> None:
        if attempt.ear is not None:
            attempt.ear.close()
        # The request itself is not kept for as long as its end.
        attempt.ear = attempt.start = None
        task, attempt.task = attempt.task, None
        if task is None:
            return
        self._running[attempt.replica_id] -= 1
        if not self._running[attempt.replica_id]:
            del self._running[attempt.replica_id]
        if task is not asyncio.current_task():
            task.cancel()

    def _stand_in_line(self, attempt: _Attempt, *, urgent: bool) -> None:
        if not attempt.queued:
            attempt.queued = True
            self._line.append(attempt)
        self.wake(urgent)

    def _forget(self, attempt: _Attempt) -> None:
        self._attempts.pop(attempt.delivery.attempt_id, None)
        attempt.delivery.cancel()
        self._free_slot(attempt)
        if attempt.queued:
            attempt.queued = False
            self._line.remove(attempt)
