"""The snapshot that gateways follow: one current value, and a way to wait for what is new in it.

Decides since which version each part of it stands; desks write what they changed, gateways are told what is newer than what they know. It
must not know who does either.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Final

from potluck_coordinator.pool_snapshot import PoolNews, PoolSnapshot
from potluck_protocol.values import DesiredState, NodeId

WATCH_SECONDS_MAX: Final = 20.0
"""A gateway asks again so often, so that no answer hangs for ever on a connection that died."""
_PARTS: Final = tuple(field.name for field in fields(PoolSnapshot) if field.name != "version")


class SnapshotBoard:
    """Holds the newest `PoolSnapshot`.

    Args:
        first_version: higher than any version of an earlier run, or gateways would not notice the restart.
    """

    def __init__(self, first_version: int) -> None:
        self._first_version = first_version
        self._snapshot = PoolSnapshot(first_version, key_generation=first_version)
        self._changed_at = dict.fromkeys(_PARTS, first_version)
        """By part, the version that brought it as a whole."""
        self._desired_at: dict[NodeId, int] = {}
        """The version that last desired something else of a node, where that came after the whole."""
        self._changed = asyncio.Event()

    @property
    def snapshot(self) -> PoolSnapshot:
        """What gateways should know now."""
        return self._snapshot

    def publish(self, **changes: Any) -> None:
        """Replaces parts of the snapshot; if that is news, waiting gateways are told at once."""
        news = {part: value for part, value in changes.items() if value != getattr(self._snapshot, part)}
        if not news:
            return
        version = self._snapshot.version + 1
        for part, value in news.items():
            if part == "desired":
                self._note_desired(value, version)
            else:
                self._changed_at[part] = version
        self._snapshot = replace(self._snapshot, version=version, **news)
        self._changed.set()
        self._changed = asyncio.Event()

    def _note_desired(self, desired: Mapping[NodeId, DesiredState], version: int) -> None:
        before = self._snapshot.desired
        if before.keys() <= desired.keys():
            self._desired_at |= {node_id: version for node_id, state in desired.items() if before.get(node_id) is not state}
        else:
            # Somebody is gone for good, which is rare.
            self._changed_at["desired"] = version
            self._desired_at = {}

    def forget_keys(self) -> None:
        """Makes every gateway ask anew whose keys are good."""
        self.publish(key_generation=self._snapshot.key_generation + 1)

    async def wait(self, known_version: int) -> PoolNews:
        """As `PoolDesk.watch`."""
        if known_version == self._snapshot.version:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_SECONDS_MAX):
                    await self._changed.wait()
        snapshot = self._snapshot
        if not self._first_version <= known_version <= snapshot.version:
            known_version = 0  # of an earlier run
        changes = {part: getattr(snapshot, part) for part, changed_at in self._changed_at.items() if changed_at > known_version}
        if "desired" in changes:
            return PoolNews(snapshot.version, changes, {})
        desired = {node_id: snapshot.desired[node_id] for node_id, told_at in self._desired_at.items() if told_at > known_version}
        return PoolNews(snapshot.version, changes, desired)
