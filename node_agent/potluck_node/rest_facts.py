"""What the node's rest is decided on, gathered: the owner's word, the use of the machine, the cards, and other policies' words.

Decides how often the machine's use is looked at, and that a look which is not wanted is not taken. It must not know what follows from a
fact: `domain.rest` does.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Final

from potluck_node.domain.rest import TAKEN_BYTES, CardUse, Facts, Reason, Use, Word
from potluck_node.probe.card_programs import foreign_program_names
from potluck_node.probe.host import process_tree
from potluck_node.probe.owner_use import owner_use
from potluck_protocol.cards import CardTelemetry
from potluck_protocol.clock import Clock

USE_SECONDS: Final = 5.0
"""Between two looks at whether the machine is used; as often as the cards are read."""


class RestFacts:
    """See the module.

    Args:
        clock: time.
        environment: the agent's, which names the display.
        watches_use: whether the owner set `idle_minutes`.
        cards: the newest readings.
        cards_given: the uuids of the cards that engines of this node have.
        others: what other policies ask for now.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        environment: Mapping[str, str],
        watches_use: bool,
        cards: Callable[[], tuple[CardTelemetry, ...]],
        cards_given: Callable[[], Collection[str]],
        others: Callable[[], tuple[Reason, ...]],
    ) -> None:
        self._clock = clock
        self._environment = environment
        self._watches_use = watches_use
        self._cards = cards
        self._cards_given = cards_given
        self._others = others
        self._use = Use(None, "it has not been looked at yet")
        self._looked_at_seconds = clock.monotonic_seconds()
        self._program_names: dict[str, tuple[str, ...]] = {}

    def facts(self, word: Word) -> Facts:
        """As of now."""
        return Facts(word, self._use_now(), self._card_uses(), self._others())

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(USE_SECONDS)

    async def look(self) -> None:
        """Once. What blocks is off the loop."""
        if self._watches_use:
            use = await asyncio.to_thread(owner_use, self._clock.unix_ms() / 1000, self._environment)
            self._use, self._looked_at_seconds = use, self._clock.monotonic_seconds()
        foreign = [card.uuid for card in self._cards() if (card.memory_foreign_bytes or 0) >= TAKEN_BYTES]
        self._program_names = await asyncio.to_thread(self._names, foreign) if foreign else {}

    @staticmethod
    def _names(card_uuids: list[str]) -> dict[str, tuple[str, ...]]:
        return foreign_program_names(card_uuids, process_tree(os.getpid()))

    def _use_now(self) -> Use:
        """The last look's, with what has passed since."""
        if self._use.idle_seconds is None:
            return self._use
        return replace(self._use, idle_seconds=self._use.idle_seconds + self._clock.monotonic_seconds() - self._looked_at_seconds)

    def _card_uses(self) -> tuple[CardUse, ...]:
        given = self._cards_given()
        return tuple(
            CardUse(card.uuid, card.memory_foreign_bytes, card.uuid in given, self._program_names.get(card.uuid, ()))
            for card in self._cards()
            if not card.lost
        )
