"""The desks over a real socket file: answers, refusals, a directory that goes away and one that comes back."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import shutil
import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop
from structlog.testing import capture_logs

from potluck_coordinator import desk_frames, desk_socket
from potluck_coordinator.desk_socket import DeskClient, DeskServer, DirectoryAbsentError, DirectoryLostError, RemoteDirectory
from potluck_protocol.clock import SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId


class Unreadable:
    """Pickles, and fails where it is read."""

    def __reduce__(self):
        return int, ("no number",)


class Nodes:
    """Calls that answer, refuse, fail and hang."""

    def __init__(self):
        self.asked = asyncio.Event()
        self.gone = asyncio.Event()
        self.answer: Any = ("one", "two")
        self.listed_count = 0

    async def list_nodes(self):
        self.listed_count += 1
        return self.answer

    async def revoke_node(self, node_id, reason):
        raise PotluckError(ErrorCode.NOT_FOUND, f"no {node_id}", param="node_id")

    async def report(self, reports):
        raise ValueError("an inner secret")

    async def open_session(self, hello):
        self.asked.set()
        await self.gone.wait()


@pytest.fixture
def path():
    """Short, as the system's bound on such names asks for."""
    folder = Path(tempfile.mkdtemp(prefix="plk"))
    yield folder / "desks"
    shutil.rmtree(folder)


@pytest.fixture
async def nodes(path):
    nodes = Nodes()
    server = DeskServer(SimpleNamespace(nodes=nodes), path)
    await server.start()
    nodes.server = server
    yield nodes
    await server.stop()


async def test_answers_and_refusals_cross_as_they_are(path, nodes):
    directory = RemoteDirectory(DeskClient(path).call, SystemClock())
    assert await directory.nodes.list_nodes() == ("one", "two")
    with pytest.raises(PotluckError, match="no gone") as refusal:
        await directory.nodes.revoke_node("gone", reason="test")
    assert (refusal.value.code, refusal.value.param) == (ErrorCode.NOT_FOUND, "node_id")


async def test_what_fails_inside_is_not_told(path, nodes):
    with pytest.raises(PotluckError) as failure:
        await RemoteDirectory(DeskClient(path).call, SystemClock()).nodes.report(())
    assert failure.value.code is ErrorCode.INTERNAL_ERROR
    assert "secret" not in failure.value.message


async def test_many_calls_share_a_connection_and_a_hanging_one_holds_up_none(path, nodes):
    client = DeskClient(path)
    hanging = asyncio.ensure_future(client.call("nodes", "open_session", (None,), {}))
    answers = await asyncio.gather(*(client.call("nodes", "list_nodes", (), {}) for _ in range(200)))
    assert answers == [("one", "two")] * 200
    hanging.cancel()
    await asyncio.gather(hanging, return_exceptions=True)


@pytest.fixture
async def client(path, nodes):
    """With another call under way on the same connection, which must outlive whatever the test does."""
    client = DeskClient(path)
    hanging = asyncio.ensure_future(client.call("nodes", "open_session", (None,), {}))
    await nodes.asked.wait()
    yield client
    assert not hanging.done()
    hanging.cancel()
    nodes.answer = "still there"
    async with asyncio.timeout(5):
        assert await client.call("nodes", "list_nodes", (), {}) == "still there"


@pytest.mark.parametrize("argument", [b"x" * 2000, lambda: None], ids=["too large", "not to be pickled"])
async def test_a_call_that_cannot_be_sent_fails_alone(client, monkeypatch, argument):
    monkeypatch.setattr(desk_frames, "FRAME_BYTES_MAX", 1000)
    async with asyncio.timeout(5):
        with pytest.raises(PotluckError) as failure:
            await RemoteDirectory(client.call, SystemClock()).nodes.report(argument)
    assert failure.value.code is ErrorCode.INTERNAL_ERROR


@pytest.mark.parametrize(
    "outcome", [b"x" * 2000, lambda: None, Unreadable()], ids=["too large", "not to be pickled", "not to be read by the caller"]
)
async def test_an_answer_that_cannot_cross_fails_alone(client, nodes, monkeypatch, outcome):
    monkeypatch.setattr(desk_frames, "FRAME_BYTES_MAX", 1000)
    nodes.answer = outcome
    async with asyncio.timeout(5):
        with pytest.raises(PotluckError) as failure:
            await RemoteDirectory(client.call, SystemClock()).nodes.list_nodes()
    assert failure.value.code is ErrorCode.INTERNAL_ERROR


@pytest.mark.parametrize(
    ("desk", "method", "argument"),
    [("nodes", "report", Unreadable()), ("kitchen", "list_nodes", None), ("nodes", "no_such_method", None)],
    ids=["arguments that cannot be read", "no such desk", "no such method"],
)
async def test_a_call_that_the_directory_cannot_read_fails_alone(client, desk, method, argument):
    async with asyncio.timeout(5):
        outcome = await client.call(desk, method, (argument,), {})
    assert isinstance(outcome, PotluckError)
    assert outcome.code is ErrorCode.INTERNAL_ERROR


async def test_who_takes_no_answers_is_not_asked_for_more_work(path, nodes):
    nodes.answer = b"x" * 10_000
    _, writer = await asyncio.open_unix_connection(path, limit=1000)
    call = pickle.dumps(("nodes", "list_nodes", (), {}))
    for number in range(5000):
        writer.write(desk_frames.HEAD.pack(len(call), number) + call)
    listed_before = -1
    while nodes.listed_count != listed_before:
        listed_before = nodes.listed_count
        await asyncio.sleep(0.05)
    # As many as are read at one go.
    assert 0 < nodes.listed_count < 4000
    writer.transport.abort()


def test_a_stop_leaves_no_traceback(path):
    told: list[dict[str, Any]] = []

    async def run(*, stopped: bool) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context))
        server = DeskServer(SimpleNamespace(nodes=Nodes()), path)
        await server.start()
        assert await DeskClient(path).call("nodes", "list_nodes", (), {}) == ("one", "two")
        if stopped:
            await server.stop()

    asyncio.run(run(stopped=True))
    asyncio.run(run(stopped=False))
    assert told == []


def test_a_gateway_that_is_killed_during_its_calls_leaves_no_traceback(path):
    told: list[dict[str, Any]] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context))
        nodes = Nodes()
        server = DeskServer(SimpleNamespace(nodes=nodes), path)
        await server.start()
        _, writer = await asyncio.open_unix_connection(path)
        call = pickle.dumps(("nodes", "open_session", (None,), {}))
        writer.write(desk_frames.HEAD.pack(len(call), 1) + call)
        async with asyncio.timeout(10):
            await nodes.asked.wait()
            writer.transport.abort()
            while server._connections:
                await asyncio.sleep(0)
            (answering,) = server._calls
            nodes.gone.set()
            await asyncio.wait([answering])
        del answering
        await server.stop()

    uvloop.run(run())
    gc.collect()
    assert told == []


def test_a_call_on_a_connection_that_just_closed_never_left(path, monkeypatch):
    monkeypatch.setattr(desk_socket, "RETRY_PAUSE_SECONDS", 0)

    async def run() -> None:
        server = DeskServer(SimpleNamespace(nodes=Nodes()), path)
        await server.start()
        client = DeskClient(path)
        assert await client.call("nodes", "list_nodes", (), {}) == ("one", "two")
        client._connection.transport.abort()
        with pytest.raises(DirectoryAbsentError):
            await client.call("nodes", "list_nodes", (), {})
        assert await RemoteDirectory(client.call, SystemClock()).nodes.list_nodes() == ("one", "two")
        await server.stop()

    uvloop.run(run())


async def test_a_directory_that_goes_away_is_noticed_and_its_successor_found(path, nodes):
    client = DeskClient(path)
    hanging = asyncio.ensure_future(client.call("nodes", "open_session", (None,), {}))
    await nodes.asked.wait()
    await nodes.server.stop()
    with pytest.raises(DirectoryLostError):
        await asyncio.wait_for(hanging, 5)
    with pytest.raises(DirectoryAbsentError):
        await client.call("nodes", "list_nodes", (), {})
    await nodes.server.start()
    assert await client.call("nodes", "list_nodes", (), {}) == ("one", "two")


async def test_only_this_user_can_reach_it(path, nodes):
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("module", "name", "value", "reason"),
    [
        (socket, "SO_PEERCRED", 9_999, "the system does not say whose it is: Protocol not available"),
        (os, "getuid", lambda: -1, f"it is of another user, {os.getuid()}"),
    ],
)
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_whoever_is_not_known_to_be_this_user_is_turned_away_and_the_log_says_why(path, monkeypatch, loop, module, name, value, reason):
    told: list[dict[str, Any]] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context))
        server = DeskServer(SimpleNamespace(nodes=Nodes()), path)
        await server.start()
        monkeypatch.setattr(module, name, value)
        with pytest.raises(DirectoryLostError):
            await asyncio.wait_for(DeskClient(path).call("nodes", "list_nodes", (), {}), 5)
        assert not server._connections
        await server.stop()

    with capture_logs() as logged, asyncio.Runner(loop_factory=loop) as runner:
        runner.run(run())
    assert [line["reason"] for line in logged if line["event"] == "desk_socket_refused_a_caller"] == [reason]
    assert told == []


async def test_a_directory_that_never_comes_is_given_up(path, monkeypatch):
    monkeypatch.setattr("potluck_coordinator.desk_socket.PATIENCE_SECONDS", 0)
    with pytest.raises(PotluckError) as failure:
        await RemoteDirectory(DeskClient(path).call, SystemClock()).ledger.balance(AccountId("a"))
    assert failure.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
