"""The node's one link to its coordinator, kept alive for as long as the agent runs.

Carries out what the lease decides (`domain.session`: when to dial, to beat, to be fenced) and what goodbyes mean (`farewell`). Decides when
the link moves to another connection. Welcomes, leases, certificates and goodbyes are taken here; the wish in a welcome, and everything else
the coordinator says, goes to `orders`. What is sent comes from `attempts` and `report`, certificate requests from `credentials`, which also
opens the channel under each `link_connection` and asks where the coordinator is now when dials go on failing. It must not know how
engines are run or where files lie.

There is at most one current connection. A lost one is dialled again under the same session, and its attempts go on where the coordinator
says; a new certificate moves the link to a new connection the same way, with the old one still read until the coordinator closes it. When
the lease lapses the node is fenced: every attempt is dropped, and the next hello starts from nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import Final

import grpc
import grpc.aio
import structlog

from potluck_node.attempts import Attempts
from potluck_node.beats import Beats
from potluck_node.credentials import Credentials
from potluck_node.domain import session as lease
from potluck_node.domain.session import Session
from potluck_node.enrolment import rpc_failure
from potluck_node.farewell import Farewells, Outcome
from potluck_node.link_connection import LinkConnection, welcome_of
from potluck_node.orders import Orders
from potluck_node.paced_chunks import PacedChunks
from potluck_node.peer_measurement import PeerMeasuring
from potluck_node.replicas import Replicas
from potluck_node.report import SelfReport
from potluck_protocol.clock import Clock
from potluck_protocol.codec import goodbye_message, goodbye_value, heartbeat_message, hello_message
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import AttemptId, GoodbyeReason, Welcome

BEAT_GAP_SECONDS: Final = 0.2
"""Changes of status are told at once, but no more often than this."""
MOVE_REPEATED_SECONDS: Final = 10.0
"""How long after a failed move to a new certificate the next is tried."""

_log = structlog.get_logger()


class Link:
    """See the module.

    Args:
        credentials: what the node shows, and where it dials.
        attempts: where attempts run; from now on they wake this link.
        replicas: who takes the coordinator's wishes; from now on their changes are reported at once.
        peers: who measures the lines to other nodes of the site; the same goes for what it finds.
        report: what hellos and heartbeats say.
        clock: time.
        jitter: random numbers from 0 to 1, for the pauses between dials.
        upload_bytes_per_second_max: the owner's limit for answers together.
    """

    def __init__(
        self,
        *,
        credentials: Credentials,
        attempts: Attempts,
        replicas: Replicas,
        peers: PeerMeasuring,
        report: SelfReport,
        clock: Clock,
        jitter: Callable[[], float],
        upload_bytes_per_second_max: int | None = None,
    ) -> None:
        self._credentials = credentials
        self._attempts = attempts
        self._chunks = PacedChunks(attempts, clock, upload_bytes_per_second_max)
        self._orders = Orders(attempts, replicas, peers)
        self._beats = Beats(report)
        self._clock = clock
        self._jitter = jitter
        self.session = Session()
        self.trouble = ""
        self._current: LinkConnection | None = None
        self._readers: set[asyncio.Task[None]] = set()
        self._connected_at_seconds = 0.0
        self._beat_wanted = False
        self._request_wanted = False
        self._renewed_after_refusal = False
        self._tokens_sent_at_seconds = -math.inf
        self._told_seconds = 0.0
        self._move_at_seconds: float | None = None
        self._farewells = Farewells()
        self._stopping = False
        self._goodbye_said = asyncio.Event()
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None
        attempts.wake = self.wake
        replicas.on_change(self.report_now)
        peers.on_change(self.report_now)

    # What the agent asks.

    async def run(self) -> None:
        """Stays linked until `say_goodbye`.

        Raises:
            PotluckError: INVALID_CERTIFICATE when the coordinator does not want this node, ALREADY_EXISTS when another agent took its
                identity's place, PROTOCOL_VERSION_UNSUPPORTED.
        """
        ticker = asyncio.create_task(self._tick_forever(), name="link ticker")
        ticker.add_done_callback(self._after_task)
        try:
            while not self._stopping:
                if self._failure is not None:
                    raise self._failure
                if self._current is None or self._move_due():
                    await self._connect()
                    continue
                await self._changed.wait()
                self._changed.clear()
            await self._goodbye_said.wait()
        finally:
            self._current = None
            tasks = [ticker, *self._readers]
            for task in tasks:
                task.cancel()
            # Each reader closes its connection.
            await asyncio.gather(*tasks, return_exceptions=True)

    async def say_goodbye(self, reason: GoodbyeReason) -> bool:
        """Ends `run`; whether the coordinator has the goodbye."""
        self._stopping = True
        connection, self._current = self._current, None
        self._changed.set()
        try:
            if connection is None:
                return False
            frame = self._next_frame() or node_pb2.NodeFrame(epoch=self.session.epoch)
            frame.goodbye.CopyFrom(goodbye_message(reason))
            return await connection.close(frame)
        finally:
            self._goodbye_said.set()

    def report_now(self) -> None:
        """Something changed that the coordinator should hear before the next heartbeat is due."""
        self._beat_wanted = True
        if self._clock.monotonic_seconds() - self.session.last_beat_at_seconds >= BEAT_GAP_SECONDS:
            self.wake(True)

    def introduce_again(self) -> None:
        """What a hello shows has changed: the link moves to a new connection, which begins with another."""
        self._move_at_seconds = self._clock.monotonic_seconds()
        self._changed.set()

    def wake(self, urgent: bool) -> None:
        """Something waits to be sent; True: at once."""
        if self._current is not None:
            self._current.wake(urgent=urgent)

    # Dialling.

    async def _connect(self) -> None:
        """One dial, after its pause, whether for a first connection or to move from the current one."""
        if self._current is None:
            move_seconds = self._credentials.gateways.delay_seconds(self._jitter())
            delay_seconds = lease.reconnect_delay_seconds(self.session.failure_count, self._jitter(), self._told_seconds)
            await self._pause(move_seconds + delay_seconds)
            if self._stopping:
                return
        self._credentials.gateways.begin_dial()
        try:
            knocks = lease.should_knock(self.session.failure_count)
            await self._credentials.make_ready(knocks=knocks)
            # A machine that slept wakes up here or there: nothing of a lapsed lease goes into a hello.
            self._fence_if_lapsed()
            await self._dial(patient=knocks or self._current is not None)
        except PotluckError as error:
            await self._after_failed_dial(error)
        except grpc.aio.AioRpcError as error:
            await self._after_failed_dial(rpc_failure(error, self._credentials.gateways.target))
        except (TimeoutError, asyncio.InvalidStateError):
            await self._after_failed_dial(PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, "The coordinator did not answer the hello."))

    async def _dial(self, *, patient: bool) -> None:
        connection = LinkConnection(self._credentials.open_channel(patient=patient), self._next_frame)
        former, self._current = self._current, None
        self._move_at_seconds = None
        if former is not None:
            # From the hello on, the coordinator drops what the former connection sends. It is still read: its goodbye is expected.
            former.stop_writing()
        try:
            in_flight = self._attempts.in_flight
            hello_at_seconds = self._clock.monotonic_seconds()
            hello = node_pb2.NodeFrame(epoch=self.session.epoch, hello=hello_message(self._beats.hello(in_flight)))
            first = await connection.greet(hello, self._credentials.gateways.greeting_seconds_max)
            welcome = welcome_of(first, self._farewells, self._clock.monotonic_seconds())
        except BaseException:
            await connection.close()
            self._go_back_to(former)
            raise
        if self._stopping:
            # The goodbye was said meanwhile, and not on this connection.
            await connection.close()
            return
        self._settle_in(connection, welcome, in_flight, hello_at_seconds)

    def _go_back_to(self, former: LinkConnection | None) -> None:
        if former is None or self._stopping:
            return
        if former.closed:
            self._credentials.gateways.lost(is_let_go=False)
            self.session = lease.after_loss(self.session, lived_seconds=self._lived_seconds())
            return
        self._current = former
        self._move_at_seconds = self._clock.monotonic_seconds() + MOVE_REPEATED_SECONDS
        former.start_writing()

    def _move_due(self) -> bool:
        return self._move_at_seconds is not None and self._clock.monotonic_seconds() >= self._move_at_seconds

    def _lived_seconds(self) -> float:
        return self._clock.monotonic_seconds() - self._connected_at_seconds

    def _settle_in(self, connection: LinkConnection, welcome: Welcome, in_flight: tuple[AttemptId, ...], hello_at_seconds: float) -> None:
        new_epoch = welcome.epoch != self.session.epoch
        self.session = lease.after_welcome(
            self.session,
            epoch=welcome.epoch,
            lease_ttl_ms=welcome.lease_ttl_ms,
            heartbeat_busy_ms=welcome.heartbeat_busy_ms,
            heartbeat_idle_ms=welcome.heartbeat_idle_ms,
            hello_sent_at_seconds=hello_at_seconds,
        )
        self._beats.welcomed(takes_brief=welcome.takes_brief_heartbeats)
        self._attempts.resume(in_flight, welcome.resume_points)
        self._orders.wish(welcome.desired, outright=new_epoch)
        self._current = connection
        self._connected_at_seconds = self._clock.monotonic_seconds()
        self._renewed_after_refusal = False
        self.trouble = ""
        self._told_seconds = 0.0
        self._credentials.gateways.linked(welcome.link_addresses)
        connection.start_writing()
        reader = asyncio.create_task(self._read(connection), name="link reader")
        self._readers.add(reader)
        reader.add_done_callback(self._readers.discard)
        reader.add_done_callback(self._after_task)
        _log.info("link_up", epoch=welcome.epoch, resumed_count=len(welcome.resume_points))

    async def _after_failed_dial(self, error: PotluckError) -> None:
        if self._current is None:
            self.trouble = error.message
        refused = error.code in {ErrorCode.INVALID_CERTIFICATE, ErrorCode.PERMISSION_DENIED}
        if error.code in {ErrorCode.PROTOCOL_VERSION_UNSUPPORTED, ErrorCode.ALREADY_EXISTS} or (refused and self._renewed_after_refusal):
            raise error
        if refused:
            # Perhaps only the certificate is at fault: the enrolled key may ask once for another.
            self._renewed_after_refusal = True
            try:
                await self._credentials.renew()
            except PotluckError as renewal_error:
                if renewal_error.code is not ErrorCode.COORDINATOR_UNAVAILABLE:
                    raise error from renewal_error
                self._renewed_after_refusal = False
        self.session = lease.after_failed_dial(self.session)
        if self._current is None:  # a link that stands is moved by its own gateway only, which has the answers
            self._credentials.gateways.failed()
        self._told_seconds = (error.retry_after_seconds or 0.0) if error.code is ErrorCode.QUEUE_FULL else 0.0
        _log.warning("link_not_up", code=error.code, reason=error.message, failure_count=self.session.failure_count)
        if lease.should_ask_the_way(self.session.failure_count):
            await self._credentials.find_coordinator()

    async def _pause(self, delay_seconds: float) -> None:
        self._changed.clear()
        if delay_seconds > 0 and not self._stopping:
            # Not `wait_for`: up to Python 3.11 it loses a cancellation that comes with what it waits for.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_seconds):
                    await self._changed.wait()

    # Reading.

    async def _read(self, connection: LinkConnection) -> None:
        outcome = Outcome(message="the coordinator closed the link without a goodbye")
        try:
            while (frame := await connection.read()) is not None:
                if frame.HasField("goodbye"):
                    outcome = Outcome(*goodbye_value(frame.goodbye))
                self._take(frame)
        except grpc.aio.AioRpcError as error:
            if outcome.goodbye is None:
                failure = rpc_failure(error, self._credentials.gateways.target)
                outcome = Outcome(message=failure.message)
        except PotluckError as error:
            outcome = Outcome(message=f"the coordinator sent a frame that cannot be read: {error.message}")
        finally:
            connection.closed = True
            if self._current is connection:
                self._current = None
                self._after_loss(outcome)
            await connection.close()

    def _take(self, frame: node_pb2.CoordinatorFrame) -> None:
        if not lease.may_order(self.session, frame.epoch):
            return
        if frame.HasField("lease"):
            told = frame.lease
            epoch, ttl_ms, idle_ms, number = told.epoch, told.lease_ttl_ms, told.heartbeat_idle_ms, told.heartbeat_number
            self.session = lease.after_renewal(self.session, epoch=epoch, lease_ttl_ms=ttl_ms, heartbeat_idle_ms=idle_ms, number=number)
        self._orders.take(frame)
        if frame.link_addresses:
            self._credentials.gateways.linked(tuple(frame.link_addresses))
        if frame.beat_now:
            self.report_now()
        if frame.HasField("certificate"):
            self._take_certificate(frame.certificate.certificate_pem)

    def _take_certificate(self, certificate_pem: str) -> None:
        try:
            self._credentials.accept(certificate_pem)
        except PotluckError as error:
            _log.error("certificate_not_taken", reason=error.message)
            return
        _log.info("certificate_renewed", way="link")
        self.introduce_again()

    def _after_loss(self, outcome: Outcome) -> None:
        lived_seconds = self._lived_seconds()
        self.session = lease.after_loss(self.session, lived_seconds=lived_seconds)
        self._credentials.gateways.lost(is_let_go=outcome.goodbye is GoodbyeReason.COORDINATOR_STOPPING)
        self.trouble = outcome.message or str(outcome.goodbye or "")
        self._failure = self._farewells.failure_of(outcome, self._clock.monotonic_seconds())
        self._changed.set()
        _log.warning("link_lost", goodbye=outcome.goodbye, reason=outcome.message, lived_seconds=round(lived_seconds, 1))

    def _after_task(self, task: asyncio.Task[None]) -> None:
        """A ticker or reader that breaks by a mistake of ours ends the agent: without them a lease would never lapse."""
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()
            self._changed.set()

    # Beating, renewing, fencing.

    async def _tick_forever(self) -> None:
        while True:
            # Four looks a period, so that a beat is late by a quarter of one at most.
            await asyncio.sleep(max(0.01, min(1.0, self.session.heartbeat_busy_seconds) / 4))
            self._tick()

    def _tick(self) -> None:
        self._fence_if_lapsed()
        self._attempts.sweep()
        if self._current is None:
            return
        now_seconds = self._clock.monotonic_seconds()
        if self._beat_wanted or lease.beat_due(self.session, busy=self._attempts.busy, now_seconds=now_seconds):
            waiting, self._beat_wanted = self._beat_wanted, True
            if not lease.beat_may_ride(waiting=waiting, tokens_sent_at_seconds=self._tokens_sent_at_seconds, now_seconds=now_seconds):
                self.wake(True)
        if self._credentials.renewal_due():
            self._request_wanted = True
            self.wake(True)
        if self._move_due():
            self._changed.set()

    def _fence_if_lapsed(self) -> None:
        if not lease.lease_lapsed(self.session, self._clock.monotonic_seconds()):
            return
        self.session = lease.after_lapse(self.session)
        dropped_count = self._attempts.abandon_all()
        self._orders.lease_ended()
        _log.warning("fenced", epoch=self.session.epoch, dropped_count=dropped_count)
        connection, self._current = self._current, None
        if connection is not None:
            self.trouble = "the coordinator did not renew the lease in time"
            self._credentials.gateways.lost(is_let_go=False)
            connection.cut()  # its reader, cut off, closes it
            self._changed.set()

    def _next_frame(self) -> node_pb2.NodeFrame | None:
        frame = node_pb2.NodeFrame(epoch=self.session.epoch)
        waiting = self._chunks.move_into(frame)
        now_seconds = self._clock.monotonic_seconds()
        if waiting:
            self._tokens_sent_at_seconds = now_seconds
        if self._beat_wanted:
            self._beat_wanted = False
            frame.heartbeat.CopyFrom(heartbeat_message(self._beats.next(now_seconds, busy=self._attempts.busy)))
            self.session = lease.after_beat(self.session, frame.heartbeat.number, now_seconds)
            waiting = True
        if self._request_wanted:
            self._request_wanted = False
            frame.certificate_request.certificate_request_der = self._credentials.request_der()
            waiting = True
        return frame if waiting else None
