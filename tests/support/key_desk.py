"""Desks of idempotency keys: one for edges whose tests name none, and one that can be away."""

from __future__ import annotations

import asyncio
from enum import Enum, auto
from typing import Any, cast

from potluck_coordinator.directory.idempotency import IdempotencyKeys
from potluck_coordinator.domain.idempotency import KeyRecord, KeyUse
from potluck_coordinator.gateway.keyed_requests import KeyedRequests
from potluck_protocol.clock import SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError
from tests.support.books import Books


class _NoKeys:
    async def claim(self, use: KeyUse) -> KeyRecord | None:
        raise AssertionError(f"nobody names a key here, but {use}")

    async def finish(self, use: KeyUse, charge_micro_credits: int) -> None:
        raise AssertionError(f"nobody names a key here, but {use}, {charge_micro_credits}")

    async def release(self, use: KeyUse) -> None:
        raise AssertionError(f"nobody names a key here, but {use}")


def no_keys(requests: object) -> KeyedRequests:
    """The way to these requests that no test takes."""
    return KeyedRequests(cast("Any", requests), _NoKeys(), SystemClock(), hash_key=b"k" * 32, gateway_epoch=1)


class RunsAtOnce:
    """The books' thread, waited for: whatever is asked of it is done in the same turn of the loop."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def run(self, work: Any) -> Any:
        return self._books.run_now(work)


class Absence(Enum):
    """How a call to books that are away fails."""

    BEFORE = auto()
    AFTER = auto()
    """It was carried out, and its answer lost."""


class MortalDesk:
    """A desk that its gateway can lose, for ever or for a while."""

    def __init__(self, desk: IdempotencyKeys) -> None:
        self._desk = desk
        self.is_lost = False
        self.absence: Absence | None = None

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            if self.is_lost:
                await asyncio.Event().wait()
            absence = self.absence
            answer = None if absence is Absence.BEFORE else await getattr(self._desk, name)(*arguments)
            if absence is not None:
                raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE)
            return answer

        return call
