"""What a gateway does again and again: a failure costs one turn, one that comes again and again the process."""

from __future__ import annotations

import asyncio

import pytest

from potluck_coordinator.gateway import gateway
from potluck_protocol.errors import ErrorCode, PotluckError

FAILURES_MAX = 3


@pytest.fixture(autouse=True)
def _bound(monkeypatch):
    monkeypatch.setattr(gateway, "FAILURES_IN_A_ROW_MAX", FAILURES_MAX)


async def turns_of(outcomes):
    """How many turns were taken before the work's outcomes were used up, or it ended itself."""
    taken, used_up = 0, asyncio.Event()

    async def work():
        nonlocal taken
        taken += 1
        outcome = next(outcomes, None)
        if outcome is None:
            used_up.set()
            await asyncio.Event().wait()
        if isinstance(outcome, Exception):
            raise outcome

    repeating = asyncio.ensure_future(gateway._every(0.0, work))
    waiting = asyncio.ensure_future(used_up.wait())
    await asyncio.wait([repeating, waiting], timeout=10, return_when=asyncio.FIRST_COMPLETED)
    repeating.cancel()
    waiting.cancel()
    (ended,) = await asyncio.gather(repeating, return_exceptions=True)
    return taken, ended


async def test_unforeseen_failures_cost_their_turns_until_they_are_too_many_in_a_row():
    failing = [KeyError("a")] * FAILURES_MAX
    taken, ended = await turns_of(iter([*failing, "fine", *failing, "fine"]))
    assert (taken, type(ended)) == (2 * FAILURES_MAX + 3, asyncio.CancelledError)
    taken, ended = await turns_of(iter([*failing, KeyError("last"), "never"]))
    assert (taken, repr(ended)) == (FAILURES_MAX + 1, "KeyError('last')")


async def test_a_failure_that_was_foreseen_never_ends_it():
    away = [PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE)] * (5 * FAILURES_MAX)
    taken, ended = await turns_of(iter(away))
    assert (taken, type(ended)) == (len(away) + 1, asyncio.CancelledError)
