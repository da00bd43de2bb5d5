"""The engines of a node that runs none, because it is only here to leave.

Decides nothing. It stands where `replicas.Replicas` is asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class NoReplicas:
    """See the module."""

    def set_desired(self, desired: object) -> None: ...
    def set_paused(self, paused: bool) -> None: ...
    def on_change(self, callback: Callable[[], None]) -> None: ...
    def on_death(self, callback: object) -> None: ...
    def end_hung(self, replica_id: object, why: object) -> None: ...

    def statuses(self) -> tuple[()]:
        return ()

    def slot_count_of(self, _replica_id: object) -> int:
        return 0

    def ready_address(self, _replica_id: object) -> None:
        return None

    def residence(self, _replica_id: object) -> None:
        return None

    def cards_given(self) -> frozenset[str]:
        return frozenset()

    async def answers(self, replica_id: object, *, token_seconds_max: object) -> bool:  # noqa: ARG002 - as the protocol names it
        return True

    async def run(self) -> None:
        await asyncio.Event().wait()
