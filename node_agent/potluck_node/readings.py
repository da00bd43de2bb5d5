"""What is read off the node's cards and engines every few seconds, for heartbeats.

Decides how often, and that a reading which is not to be had costs nothing else. What the readings mean is `probe.telemetry`'s and
`engines.metrics`' business. It must not know who hears of them.
"""

from __future__ import annotations

import asyncio
import os
from typing import Final

import aiohttp

from potluck_node.engines.metrics import EngineLoad, ask_load
from potluck_node.probe.network import process_tree
from potluck_node.probe.telemetry import card_telemetry
from potluck_node.replicas import Replicas
from potluck_protocol.values import CardTelemetry, ReplicaId

READING_SECONDS: Final = 5.0
"""A heartbeat of an idle node is no more frequent."""


class Readings:
    """The newest ones.

    Args:
        replicas: the engines to ask.
        http: a client for them.
    """

    def __init__(self, replicas: Replicas, http: aiohttp.ClientSession) -> None:
        self._replicas = replicas
        self._http = http
        self._loads: dict[ReplicaId, EngineLoad] = {}
        self.cards: tuple[CardTelemetry, ...] = ()

    def load(self, replica_id: ReplicaId) -> EngineLoad:
        """What the replica's engine said last; nothing where it did not."""
        return self._loads.get(replica_id, EngineLoad())

    async def run(self) -> None:
        """Reads until cancelled."""
        while True:
            await self.read()
            await asyncio.sleep(READING_SECONDS)

    async def read(self) -> None:
        """Reads everything once."""
        # Drivers answer when they like, and walking the processes is no work for the loop.
        self.cards = await asyncio.to_thread(_read_cards)
        loads: dict[ReplicaId, EngineLoad] = {}
        for status in self._replicas.statuses():
            address = self._replicas.ready_address(status.replica_id)
            if address is not None:
                loads[status.replica_id] = await ask_load(self._http, status.engine_kind, address)
        self._loads = loads


def _read_cards() -> tuple[CardTelemetry, ...]:
    return card_telemetry(process_tree(os.getpid()))
