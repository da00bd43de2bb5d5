"""Two nodes of a site measure their line, and nobody else gets a word out of them."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import subprocess
import sys
from contextlib import asynccontextmanager, suppress

import pytest
import uvloop

from potluck_node import peer_exchange
from potluck_node.peer_exchange import PeerFailedError, answer, measure
from potluck_node.peer_measurement import PeerMeasuring
from potluck_protocol.clock import SystemClock
from potluck_protocol.values import GroupOffer, NodeId, Peer
from tests.support import namespaces
from tests.support.coordinator_process import wait_until
from tests.support.engines import MovedClock

ANN, BOB = NodeId("a" * 26), NodeId("b" * 26)
SECRET = b"s" * 32
PEER = {"node_id": BOB, "address": "127.0.0.1", "port": 1, "secret": SECRET}


class Listener:
    """The listening side on a free port of loopback; `endings` has how each connection ended."""

    def __init__(self) -> None:
        self.endings: list[str] = []
        self.port = 0

    async def serve(self, reader, writer) -> None:
        try:
            await answer(reader, writer, own_id=BOB, secrets={ANN: SECRET}, turn=asyncio.Lock(), random_bytes=os.urandom)
            self.endings.append("measured")
        except (PeerFailedError, TimeoutError, OSError, EOFError) as error:
            self.endings.append(str(error) or type(error).__name__)
        finally:
            writer.transport.abort()

    async def connect(self):
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ended(self) -> str:
        async with asyncio.timeout(10):
            while not self.endings:
                await asyncio.sleep(0.01)
        return self.endings[0]


@asynccontextmanager
async def listening():
    listener = Listener()
    server = await asyncio.start_server(listener.serve, "127.0.0.1", 0)
    listener.port = server.sockets[0].getsockname()[1]
    try:
        yield listener
    finally:
        server.close()


async def measured(listener, **changes):
    reader, writer = await listener.connect()
    clock = SystemClock()
    values = {"own_id": ANN, "peer_id": BOB, "secret": SECRET, "random_bytes": os.urandom, "now": clock.monotonic_seconds}
    try:
        return await measure(reader, writer, **(values | changes))
    finally:
        writer.close()


async def test_a_line_has_a_round_trip_and_a_bandwidth():
    async with listening() as listener:
        figures = await measured(listener)
        assert 1 <= figures.round_trip_microseconds < 100_000
        assert figures.bandwidth_bytes_per_second > 10_000_000
        assert await listener.ended() == "measured"


@pytest.mark.parametrize("changes", [{"secret": b"x" * 32}, {"own_id": NodeId("c" * 26)}, {"peer_id": NodeId("d" * 26)}])
async def test_who_does_not_hold_the_pairs_secret_gets_nothing_but_a_random_number(changes):
    async with listening() as listener:
        with pytest.raises((EOFError, OSError)):
            await measured(listener, **changes)
        assert await listener.ended() == "it did not prove the secret of this pair"


async def test_a_strangers_bytes_are_answered_by_one_random_number_whatever_they_are():
    async with listening() as listener:
        for sent in (b"GET / HTTP/1.1\r\nHost: example\r\n\r\n" + b"x" * 200, os.urandom(90), b"\0" * 90):
            reader, writer = await listener.connect()
            writer.write(sent)
            received = b""
            with suppress(OSError):
                received = await asyncio.wait_for(reader.read(), 10)
            assert len(received) <= 32
            writer.close()


async def test_the_listeners_own_number_is_no_secret_for_a_node_that_is_not_expected():
    async with listening() as listener:
        reader, writer = await listener.connect()
        stranger, mine = NodeId("c" * 26), os.urandom(32)
        writer.write(stranger.encode() + mine)
        yours = await reader.readexactly(32)
        writer.write(peer_exchange._Pair(stranger, BOB, yours).proof(b"dialler", mine + yours))
        with suppress(OSError):
            assert await reader.read() == b""
        assert await listener.ended() == "it did not prove the secret of this pair"


async def test_a_proof_that_was_overheard_is_worth_nothing_later():
    async with listening() as listener:
        said = []

        def remembered(count):
            said.append(os.urandom(count))
            return said[-1]

        await measured(listener, random_bytes=remembered)
        # The same number again, and the proof that went with it: the listener's number is another one.
        reader, writer = await listener.connect()
        writer.write(ANN.encode() + said[0])
        await reader.readexactly(32)
        writer.write(peer_exchange._Pair(ANN, BOB, SECRET).proof(b"dialler", said[0] + os.urandom(32)))
        with pytest.raises((EOFError, OSError)):
            await reader.readexactly(1)
        writer.close()


async def test_an_impostor_at_the_peers_address_is_found_out():
    async def impostor(reader, writer):
        await reader.readexactly(26 + 32)
        writer.write(os.urandom(32))
        overheard = await reader.readexactly(32)
        writer.write(overheard)

    server = await asyncio.start_server(impostor, "127.0.0.1", 0)
    listener = Listener()
    listener.port = server.sockets[0].getsockname()[1]
    with pytest.raises(PeerFailedError, match=f"who answers is not node {BOB}"):
        await measured(listener)
    server.close()


async def proven(listener):
    reader, writer = await listener.connect()
    await peer_exchange._prove(reader, writer, peer_exchange._Pair(ANN, BOB, SECRET), os.urandom(32))
    return reader, writer


@pytest.mark.parametrize(
    ("command", "ending"),
    [
        (b"X" + bytes(8), "something that is no measurement"),
        (b"D" + b"\xff" * 8, "more than a measurement takes"),
        (b"E", "IncompleteRead"),
    ],
)
async def test_a_peer_gets_no_more_than_a_measurement(command, ending):
    async with listening() as listener:
        reader, writer = await proven(listener)
        writer.write(command)
        writer.write_eof()
        with suppress(OSError):
            assert await reader.read() == b""
        assert ending in await listener.ended() or ending == "IncompleteRead"


async def test_nobody_holds_a_connection_by_saying_nothing(monkeypatch):
    monkeypatch.setattr(peer_exchange, "PROOF_SECONDS_MAX", 0.1)
    async with listening() as listener:
        _, writer = await listener.connect()
        assert await listener.ended() == "TimeoutError"
        writer.close()


async def test_a_node_that_offers_itself_to_no_group_neither_listens_nor_dials():
    measuring = PeerMeasuring(ANN, None, SystemClock())
    running = asyncio.create_task(measuring.run())
    measuring.set_peers((Peer(**PEER, dial=True), Peer(**PEER | {"node_id": NodeId("c" * 26)}, dial=False)))
    await asyncio.sleep(0.1)
    assert (measuring.measurements(), measuring._server) == ((), None)
    running.cancel()


@pytest.mark.parametrize("address", ["203.0.113.7", "127.0.0.1"])
async def test_nobody_is_dialled_outside_private_networks(address):
    changed = asyncio.Event()
    measuring = PeerMeasuring(ANN, GroupOffer("lab", "10.0.0.1", 29600), SystemClock())
    measuring.on_change(changed.set)
    measuring.set_peers((Peer(**PEER | {"address": address}, dial=True),))
    running = asyncio.create_task(measuring.run())
    await asyncio.wait_for(changed.wait(), 5)
    (known,) = measuring.measurements()
    assert address in known.failure
    running.cancel()


async def test_a_node_that_cannot_be_dialled_says_why_until_it_can():
    told = asyncio.Event()
    with socket.create_server(("127.0.0.1", 0)) as occupant:
        port = occupant.getsockname()[1]
        measuring = PeerMeasuring(BOB, GroupOffer("lab", "127.0.0.1", port - 1), SystemClock())
        measuring.on_change(told.set)
        wish = (Peer(**PEER | {"node_id": ANN, "address": "10.0.0.9"}, dial=False),)
        measuring.set_peers(wish)
        running = asyncio.create_task(measuring.run())
        await asyncio.wait_for(told.wait(), 5)
        (known,) = measuring.measurements()
        assert known.node_id == ANN
        assert f"127.0.0.1 port {port} cannot be opened: Address already in use" in known.failure
        assert "--group-port" in known.failure
    told.clear()
    measuring.set_peers(wish)
    await asyncio.wait_for(told.wait(), 5)
    assert measuring.measurements() == ()
    running.cancel()


async def test_who_has_the_pairs_secret_and_dials_from_elsewhere_than_its_owner_offers_is_not_measured():
    measuring = PeerMeasuring(BOB, GroupOffer("lab", "10.0.0.1", 29600), SystemClock())
    measuring.set_peers((Peer(**PEER | {"node_id": ANN, "address": "10.0.0.9"}, dial=False),))
    server = await asyncio.start_server(measuring._accept, "127.0.0.1", 0)
    listener = Listener()
    listener.port = server.sockets[0].getsockname()[1]
    try:
        with pytest.raises((EOFError, OSError)):
            await measured(listener)
    finally:
        server.close()


def test_a_connection_that_is_reset_at_once_is_dropped_without_a_word():
    # Of such a one uvloop, on which agents run, does not know whose it was.
    names, writers, endings = [], [], []

    async def reset_three():
        measuring = PeerMeasuring(BOB, GroupOffer("lab", "10.0.0.1", 29600), SystemClock())
        measuring.set_peers((Peer(**PEER | {"node_id": ANN, "address": "10.0.0.9"}, dial=False),))

        def accept(reader, writer):
            names.append(writer.get_extra_info("peername"))
            writers.append(writer)
            endings.append(asyncio.ensure_future(measuring._answered(reader, writer)))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        for _ in range(3):
            with socket.create_connection(server.sockets[0].getsockname()) as dialled:
                dialled.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        async with asyncio.timeout(5):
            while len(endings) < 3:
                await asyncio.sleep(0.01)
        assert await asyncio.gather(*endings, return_exceptions=True) == [None, None, None]
        assert all(writer.transport.is_closing() for writer in writers)
        server.close()

    uvloop.run(reset_three())
    assert None in names


async def test_what_is_known_of_a_peer_is_kept_while_it_is_wished_and_then_forgotten():
    measuring = PeerMeasuring(ANN, GroupOffer("lab", "10.0.0.1", 29600), MovedClock())
    peer = Peer(**PEER, dial=True)
    measuring.set_peers((peer,))
    running = asyncio.create_task(measuring.run())
    async with asyncio.timeout(5):
        while not measuring.measurements():
            await asyncio.sleep(0.01)
    known = measuring.measurements()
    measuring.set_peers((peer, Peer(**PEER | {"node_id": NodeId("c" * 26)}, dial=True)))
    assert measuring.measurements() == known
    measuring.set_peers((Peer(**PEER | {"secret": b"t" * 32}, dial=True),))
    assert measuring.measurements() == ()
    running.cancel()


def peer_process(host, node_id, other_id, other, *, dial, secret=SECRET):
    settings = {
        "node_id": node_id,
        "address": host.address,
        "port": 29600,
        "seconds": 8,
        "peers": [{"node_id": other_id, "address": other.address, "port": 29601, "secret": secret.hex(), "dial": dial}],
    }
    command = [*host.wrap, sys.executable, "-m", "tests.support.peer_node", json.dumps(settings)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.namespaces
@pytest.mark.skipif(not namespaces.available(), reason="needs root and `ip netns` (Debian's iproute2)")
@pytest.mark.timeout(60)
def test_two_hosts_measure_each_other_on_the_named_address_alone_and_only_while_it_is_wished():
    with namespaces.hosts_of_one_site(2) as (_, first, second):
        dialler = peer_process(first, ANN, BOB, second, dial=True)
        listener = peer_process(second, BOB, ANN, first, dial=False)
        try:
            wait_until(lambda: second.listeners() != [], 10, "the second host listens")
            assert second.listeners() == [(second.address, 29601)]
            known = next(known for line in dialler.stdout if line.startswith("[{") and not (known := json.loads(line)[0])["failure"])
            assert (known["node_id"], known["failure"]) == (BOB, "")
            assert 1 <= known["round_trip_microseconds"] < 100_000
            assert known["bandwidth_bytes_per_second"] > 10_000_000
            assert first.listeners() == []
            wait_until(lambda: second.listeners() == [], 10, "the second host listens no more")
        finally:
            for process in (dialler, listener):
                process.kill()
                process.wait(5)
                process.stdout.close()
