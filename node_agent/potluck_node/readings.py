"""What is read off the node's cards and engines every few seconds, for heartbeats.

Decides how often, that a reading which is not to be had costs nothing else, that an engine whose count of tokens grows was heard, and that
a fault of a card is logged once. What the readings mean is `probe`'s and `engines.metrics`' business. It must not know who hears of them.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

import aiohttp
import structlog

from potluck_node.domain.hardware import XidEvent
from potluck_node.domain.xid import meaning
from potluck_node.engines.asking import ask_load
from potluck_node.engines.metrics_words import EngineLoad
from potluck_node.probe.host import process_tree
from potluck_node.probe.nvml import NvmlLibrary
from potluck_node.probe.process_memory import resident_bytes
from potluck_node.probe.telemetry import card_bytes_held, card_telemetry, with_foreign_bytes_known
from potluck_node.probe.xid import XidWatcher
from potluck_node.replicas import Replicas, Residence
from potluck_protocol.cards import CardTelemetry
from potluck_protocol.values import ReplicaId

READING_SECONDS: Final = 5.0
"""A heartbeat of an idle node is no more frequent."""

_log = structlog.get_logger()


class Readings:
    """The newest ones.

    Args:
        replicas: the engines to ask.
        http: a client for them.
        heard: called with each engine that has made tokens since the look before.
        library: the driver's library; the process's own if not given.
    """

    def __init__(
        self,
        replicas: Replicas,
        http: aiohttp.ClientSession,
        *,
        heard: Callable[[ReplicaId], None],
        library: NvmlLibrary | None = None,
    ) -> None:
        self._replicas = replicas
        self._http = http
        self._heard = heard
        self._library = library
        self._xids = XidWatcher(library)
        self._loads: dict[ReplicaId, EngineLoad] = {}
        self._memory_bytes: Mapping[ReplicaId, int | None] = {}
        self.cards: tuple[CardTelemetry, ...] = ()
        self._on_read: list[Callable[[], None]] = []

    def on_read(self, callback: Callable[[], None]) -> None:
        """Calls back, on the event loop, after the cards were read; the callback is quick and never raises."""
        self._on_read.append(callback)

    def load(self, replica_id: ReplicaId) -> EngineLoad:
        """What the replica's engine said last; nothing where it did not."""
        return self._loads.get(replica_id, EngineLoad())

    def memory_bytes(self, replica_id: ReplicaId) -> int | None:
        """What the replica's engine holds of its cards, or of the machine's memory where it has none."""
        return self._memory_bytes.get(replica_id)

    async def run(self) -> None:
        """Reads until cancelled."""
        while True:
            await self.read()
            await asyncio.sleep(READING_SECONDS)

    async def read(self) -> None:
        """Reads everything once."""
        statuses = self._replicas.statuses()
        residences = {
            status.replica_id: residence for status in statuses if (residence := self._replicas.residence(status.replica_id)) is not None
        }
        # Drivers answer when they like, and walking the processes is no work for the loop.
        cards, self._memory_bytes = await asyncio.to_thread(self._look, residences, self._replicas.cards_given())
        self.cards = with_foreign_bytes_known(cards, self.cards)
        for callback in self._on_read:
            callback()
        ready = [(status, address) for status in statuses if (address := self._replicas.ready_address(status.replica_id)) is not None]
        # At once: one that does not answer keeps nobody else's numbers waiting.
        answers = await asyncio.gather(*(ask_load(self._http, status.engine_kind, address) for status, address in ready))
        loads = {status.replica_id: load for (status, _), load in zip(ready, answers, strict=True)}
        for replica_id, load in loads.items():
            if _has_worked(self.load(replica_id), load):
                self._heard(replica_id)
        self._loads = loads

    def _look(
        self, residences: Mapping[ReplicaId, Residence], cards_given: frozenset[str]
    ) -> tuple[tuple[CardTelemetry, ...], dict[ReplicaId, int | None]]:
        _log_faults(self._xids.poll())
        cards = card_telemetry(process_tree(os.getpid()), self._library, self._xids.counts, own_card_uuids=cards_given)
        return cards, {replica_id: self._bytes_held(residence) for replica_id, residence in residences.items()}

    def _bytes_held(self, residence: Residence) -> int | None:
        process_ids = process_tree(residence.process_id)
        if residence.card_uuids:
            return card_bytes_held(residence.card_uuids, process_ids, self._library)
        return resident_bytes(process_ids)


def _has_worked(before: EngineLoad, now: EngineLoad) -> bool:
    if before.generated_tokens is None or now.generated_tokens is None:
        return False
    return now.generated_tokens > before.generated_tokens


def _log_faults(events: tuple[XidEvent, ...]) -> None:
    """A line for each kind of fault of a card, however often it came since the last look."""
    for event, count in Counter(events).items():
        known = meaning(event.xid)
        _log.warning("card_fault", xid=event.xid, card=event.bus_id, count=count, what=known.what, fix=known.fix)
