"""The gateway's view of a directory in another process: what is asked again after a loss, for how long, and what is not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from potluck_coordinator import desk_socket
from potluck_coordinator.desk_socket import NOT_REPEATABLE, DirectoryAbsentError, DirectoryLostError, RemoteDirectory
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, NodeId

WOULD_WORK_TWICE = [
    ("accounts", "create_account"),
    ("accounts", "create_key"),
    ("accounts", "create_join_token"),
    ("catalogue", "remove_model"),
    ("nodes", "report"),
    ("pool", "note_counts"),
]


class MovedClock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic_seconds(self) -> float:
        return self.now

    def unix_ms(self) -> int:
        return 0


class ScriptedCalls:
    """Answers with one outcome after another; each failed try costs a second of the clock."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = list(outcomes)
        self.asked: list[tuple[Any, ...]] = []
        self.clock = MovedClock()
        self.directory = RemoteDirectory(self, self.clock)

    async def __call__(self, *call: Any) -> Any:
        self.asked.append(call)
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, DirectoryLostError):
            self.clock.now += 1.0
            raise outcome
        return outcome


@pytest.fixture(autouse=True)
def _no_real_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_socket, "RETRY_PAUSE_SECONDS", 0)


async def test_a_call_names_its_desk_and_carries_its_arguments() -> None:
    calls = ScriptedCalls("answer")

    assert await calls.directory.nodes.revoke_node(NodeId("n"), reason="gone") == "answer"  # type: ignore[func-returns-value]
    assert calls.asked == [("nodes", "revoke_node", ("n",), {"reason": "gone"})]


async def test_a_refusal_that_came_as_a_value_is_raised() -> None:
    calls = ScriptedCalls(PotluckError(ErrorCode.NOT_FOUND, "no such node"))

    with pytest.raises(PotluckError, match="no such node") as caught:
        await calls.directory.nodes.list_nodes()
    assert caught.value.code is ErrorCode.NOT_FOUND
    assert len(calls.asked) == 1


async def test_a_lost_call_is_made_again_until_the_directory_is_back() -> None:
    calls = ScriptedCalls(DirectoryLostError(), DirectoryLostError(), ())

    assert await calls.directory.nodes.list_nodes() == ()
    assert len(calls.asked) == 3


async def test_patience_ends() -> None:
    calls = ScriptedCalls(DirectoryLostError())

    with pytest.raises(PotluckError) as caught:
        await calls.directory.ledger.balance(AccountId("a"))
    assert caught.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
    assert len(calls.asked) == desk_socket.PATIENCE_SECONDS


def test_exactly_what_would_work_twice_counts_as_not_repeatable() -> None:
    assert {method for _, method in WOULD_WORK_TWICE} == NOT_REPEATABLE


@pytest.mark.parametrize(("desk", "method"), WOULD_WORK_TWICE)
async def test_a_call_that_would_work_twice_is_not_made_again(desk: str, method: str) -> None:
    calls = ScriptedCalls(DirectoryLostError(), "answer")

    with pytest.raises(PotluckError, match="look whether it took effect") as caught:
        await getattr(getattr(calls.directory, desk), method)()
    assert caught.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
    assert len(calls.asked) == 1


async def test_a_directory_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_socket, "CALL_SECONDS_MAX", 0.01)

    async def hang(*_: Any) -> Any:
        await asyncio.Event().wait()

    with pytest.raises(PotluckError, match="does not answer"):
        await RemoteDirectory(hang, MovedClock()).nodes.list_nodes()


async def test_a_call_that_never_left_may_always_be_made_again() -> None:
    calls = ScriptedCalls(DirectoryAbsentError(), "answer")

    assert await calls.directory.accounts.create_account("ana") == "answer"
    assert len(calls.asked) == 2
