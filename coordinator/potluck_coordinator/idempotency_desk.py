"""What the gateway asks of the directory about idempotency keys: one of the `desks`, in a file of its own.

Decides the calls between the two, no more than `desks` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from potluck_coordinator.domain.idempotency import KeyRecord, KeyUse


class IdempotencyDesk(Protocol):
    """Which keys of which accounts have been used. Every call may be made again."""

    async def claim(self, use: KeyUse) -> KeyRecord | None:
        """Takes the key for this request, for a day; None: it is its. Else the record of whose it is, which may be the same request's."""
        ...

    async def finish(self, use: KeyUse, charge_micro_credits: int) -> None:
        """The request that has the key was answered, in whole or in part."""
        ...

    async def release(self, use: KeyUse) -> None:
        """Nothing came of the request that has the key, and the key is free again."""
        ...
