"""The desks over a real socket file: answers, refusals, a directory that goes away and one that comes back."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from potluck_coordinator.desk_socket import DeskClient, DeskServer, DirectoryAbsentError, DirectoryLostError, RemoteDirectory
from potluck_protocol.clock import SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId


class Nodes:
    """Calls that answer, refuse, fail and hang."""

    def __init__(self):
        self.asked = asyncio.Event()

    async def list_nodes(self):
        return ("one", "two")

    async def revoke_node(self, node_id, reason):
        raise PotluckError(ErrorCode.NOT_FOUND, f"no {node_id}", param="node_id")

    async def report(self, reports):
        raise ValueError("an inner secret")

    async def open_session(self, hello):
        self.asked.set()
        await asyncio.Event().wait()


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


async def test_a_directory_that_never_comes_is_given_up(path, monkeypatch):
    monkeypatch.setattr("potluck_coordinator.desk_socket.PATIENCE_SECONDS", 0)
    with pytest.raises(PotluckError) as failure:
        await RemoteDirectory(DeskClient(path).call, SystemClock()).ledger.balance(AccountId("a"))
    assert failure.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
