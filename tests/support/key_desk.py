"""For edges whose tests name no idempotency key."""

from __future__ import annotations

from typing import Any, cast

from potluck_coordinator.domain.idempotency import KeyRecord, KeyUse
from potluck_coordinator.gateway.keyed_requests import KeyedRequests
from potluck_protocol.clock import SystemClock


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
