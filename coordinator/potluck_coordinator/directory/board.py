"""The snapshot that gateways follow: one current value, and a way to wait for the next.

Decides nothing; desks write what they changed, gateways read all of it. It must not know who does either.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any, Final

from potluck_coordinator.desks import PoolSnapshot

WATCH_SECONDS_MAX: Final = 20.0
"""A gateway asks again so often, so that no answer hangs for ever on a connection that died."""


class SnapshotBoard:
    """Holds the newest `PoolSnapshot`.

    Args:
        first_version: higher than any version of an earlier run, or gateways would not notice the restart.
    """

    def __init__(self, first_version: int) -> None:
        self._snapshot = PoolSnapshot(first_version, {}, {}, {}, first_version)
        self._changed = asyncio.Event()

    @property
    def snapshot(self) -> PoolSnapshot:
        """What gateways should know now."""
        return self._snapshot

    def publish(self, **changes: Any) -> None:
        """Replaces fields of the snapshot; waiting gateways get it at once."""
        self._snapshot = replace(self._snapshot, version=self._snapshot.version + 1, **changes)
        self._changed.set()
        self._changed = asyncio.Event()

    def forget_keys(self) -> None:
        """Makes every gateway ask anew whose keys are good."""
        self.publish(key_generation=self._snapshot.key_generation + 1)

    async def wait(self, known_version: int) -> PoolSnapshot:
        """As `PoolDesk.watch`."""
        if known_version == self._snapshot.version:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), WATCH_SECONDS_MAX)
        return self._snapshot
