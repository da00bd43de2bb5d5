"""Measures the lines to other nodes of this site, for as long as the coordinator wishes it.

Decides when: at once, again after a failure with a growing pause, and rarely after a success. Of each pair one node dials and the other
listens, on its owner's group address alone and only while there is somebody to listen for. What is said is `peer_exchange`'s. It must not
know what the figures are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

import structlog

from potluck_node.domain.breaker import backoff_seconds
from potluck_node.peer_exchange import PeerFailedError, answer, measure
from potluck_protocol.clock import Clock
from potluck_protocol.private_network import address_refusal
from potluck_protocol.values import GroupOffer, NodeId, Peer, PeerMeasurement

PEERS_MAX: Final = 16
"""How many peers are measured, whatever was wished."""
SECRET_BYTES_MIN: Final = 16
CONNECT_SECONDS_MAX: Final = 3.0
CONNECTIONS_MAX: Final = 8
"""Of strangers and peers together; one more is closed unheard."""
REPEAT_SECONDS: Final = 600.0
LISTEN_RETRY_SECONDS: Final = 60.0
"""After the port was found taken."""

_log = structlog.get_logger()


@dataclass(slots=True)
class _Line:
    """What is known of the line to one peer that this node dials."""

    peer: Peer
    due_at_seconds: float
    failure_count: int = 0
    measurement: PeerMeasurement | None = None


class PeerMeasuring:
    """The lines to this node's peers.

    Args:
        node_id: this node.
        offer: the owner's; without one nothing is measured and nobody is listened to.
        clock: time.
    """

    def __init__(self, node_id: NodeId, offer: GroupOffer | None, clock: Clock) -> None:
        self._node_id = node_id
        self._offer = offer
        self._clock = clock
        self._callbacks: list[Callable[[], None]] = []
        self._lines: dict[NodeId, _Line] = {}
        self._diallers: dict[NodeId, Peer] = {}
        """The peers that dial this node."""
        self._turn = asyncio.Lock()
        self._wished = asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._port_failure = ""
        """Why nobody can dial this node."""

    def set_peers(self, peers: tuple[Peer, ...]) -> None:
        """Whom to measure from now on. What is known of those who stay is kept, and of others forgotten."""
        named = [peer for peer in peers[:PEERS_MAX] if len(peer.secret) >= SECRET_BYTES_MIN and peer.node_id != self._node_id]
        self._diallers = {peer.node_id: peer for peer in named if not peer.dial and not address_refusal(peer.address)}
        known = self._lines
        self._lines = {
            peer.node_id: known[peer.node_id]
            if peer.node_id in known and known[peer.node_id].peer == peer
            else _Line(peer, self._clock.monotonic_seconds())
            for peer in named
            if peer.dial
        }
        self._wished.set()

    def on_change(self, callback: Callable[[], None]) -> None:
        """Calls back, on the event loop, when there is something new to report; the callback is quick and never raises."""
        self._callbacks.append(callback)

    def measurements(self) -> tuple[PeerMeasurement, ...]:
        """What is known of the peers that are wished now. Of those that dial, only why they cannot: they find a closed door."""
        dialled = [line.measurement for line in self._lines.values() if line.measurement is not None]
        unheard = self._diallers if self._port_failure else ()
        return (*dialled, *(PeerMeasurement(node_id, failure=self._port_failure) for node_id in unheard))

    def _tell(self) -> None:
        for callback in self._callbacks:
            callback()

    async def run(self) -> None:
        """Works until cancelled."""
        try:
            while True:
                self._wished.clear()
                if self._offer is not None:
                    await self._listen_or_not(self._offer)
                    await self._measure_what_is_due(self._offer)
                await self._wait()
        finally:
            await self._stop_listening()

    async def _wait(self) -> None:
        now = self._clock.monotonic_seconds()
        due = [line.due_at_seconds for line in self._lines.values()] if self._offer is not None else []
        if self._offer is not None and self._diallers and self._server is None:
            # The port was taken.
            due.append(now + LISTEN_RETRY_SECONDS)
        limit_seconds = max(0.0, min(due) - now) if due else None
        # Not `wait_for`: up to Python 3.11 it loses a cancellation that comes with what it waits for.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_seconds):
                await self._wished.wait()

    # Dialling.

    async def _measure_what_is_due(self, offer: GroupOffer) -> None:
        for line in list(self._lines.values()):
            if line.due_at_seconds > self._clock.monotonic_seconds():
                continue
            # One at a time, and never while another node measures this one.
            async with self._turn:
                measurement = await self._measured(line.peer, offer)
            line.failure_count = line.failure_count + 1 if measurement.failure else 0
            # Short at first: the other node hears of the wish at about the same time.
            pause_seconds = backoff_seconds(line.failure_count) if measurement.failure else REPEAT_SECONDS
            line.due_at_seconds = self._clock.monotonic_seconds() + pause_seconds
            if measurement != line.measurement:
                line.measurement = measurement
                _log.info(
                    "peer_measured",
                    peer_node_id=line.peer.node_id,
                    round_trip_microseconds=measurement.round_trip_microseconds,
                    bandwidth_bytes_per_second=measurement.bandwidth_bytes_per_second,
                    failure=measurement.failure,
                )
                self._tell()

    async def _measured(self, peer: Peer, offer: GroupOffer) -> PeerMeasurement:
        if refusal := address_refusal(peer.address):
            return PeerMeasurement(peer.node_id, failure=f"the address {peer.address} {refusal}")
        try:
            async with asyncio.timeout(CONNECT_SECONDS_MAX):
                reader, writer = await asyncio.open_connection(peer.address, peer.port, local_addr=(offer.address, 0))
        except TimeoutError:
            return PeerMeasurement(peer.node_id, failure=f"{peer.address} did not answer within {CONNECT_SECONDS_MAX:.0f} s")
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else type(error).__name__
            return PeerMeasurement(peer.node_id, failure=f"{peer.address} cannot be reached: {why}")
        try:
            figures = await measure(
                reader,
                writer,
                own_id=self._node_id,
                peer_id=peer.node_id,
                secret=peer.secret,
                random_bytes=os.urandom,
                now=self._clock.monotonic_seconds,
            )
        except PeerFailedError as error:
            return PeerMeasurement(peer.node_id, failure=f"{peer.address}: {error}")
        except TimeoutError:
            return PeerMeasurement(peer.node_id, failure=f"the measurement towards {peer.address} took too long")
        except (OSError, EOFError):
            return PeerMeasurement(peer.node_id, failure=f"{peer.address} closed the connection; it may not expect {self._node_id}")
        finally:
            writer.transport.abort()
        return PeerMeasurement(peer.node_id, figures.round_trip_microseconds, figures.bandwidth_bytes_per_second)

    # Listening.

    async def _listen_or_not(self, offer: GroupOffer) -> None:
        if not self._diallers:
            await self._stop_listening()
        elif self._server is None:
            failure_before, self._port_failure = self._port_failure, ""
            try:
                self._server = await asyncio.start_server(self._accept, offer.address, offer.measuring_port, backlog=CONNECTIONS_MAX)
            except OSError as error:
                _log.warning("peer_port_not_opened", address=offer.address, port=offer.measuring_port, reason=error.strerror)
                why = os.strerror(error.errno) if error.errno else type(error).__name__
                place = f"{offer.address} port {offer.measuring_port}"
                self._port_failure = f"{place} cannot be opened: {why}; see --group-address and --group-port of `potluck node run`"
            if self._port_failure != failure_before:
                self._tell()

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._connections):
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= CONNECTIONS_MAX:
            writer.transport.abort()
            return
        task = asyncio.create_task(self._answered(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _answered(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if (peer_name := writer.get_extra_info("peername")) is None:
                # It was reset at once, and uvloop does not know any more whose it was.
                return
            address = ip_address(peer_name[0])
            # Whoever has a secret and dials from elsewhere than its owner offers is not measured: the group would meet somebody else there.
            secrets = {node_id: peer.secret for node_id, peer in self._diallers.items() if ip_address(peer.address) == address}
            await answer(reader, writer, own_id=self._node_id, secrets=secrets, turn=self._turn, random_bytes=os.urandom)
        except (PeerFailedError, TimeoutError, OSError, EOFError) as error:
            _log.debug("peer_not_answered", reason=str(error) or type(error).__name__)
        finally:
            writer.transport.abort()
