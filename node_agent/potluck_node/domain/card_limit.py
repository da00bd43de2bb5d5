"""How much of a card the owner lets engines take, as the coordinator and the engines have to be told it.

Decides that the pool sees a card with no more memory than the limit, and what share of the whole card that is. It must not know settings.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from potluck_protocol.values import Accelerator, Inventory


def capped(inventory: Inventory, card_memory_bytes_max: int | None) -> Inventory:
    """What the pool may plan with."""
    if card_memory_bytes_max is None:
        return inventory
    cards = tuple(replace(card, memory_bytes=min(card.memory_bytes, card_memory_bytes_max)) for card in inventory.accelerators)
    return replace(inventory, accelerators=cards)


def card_percents_max(cards: Collection[Accelerator], card_memory_bytes_max: int | None) -> dict[str, int]:
    """The limit as a share of each whole card, rounded down; those that are smaller than it are left out."""
    if card_memory_bytes_max is None:
        return {}
    smaller = {card.uuid: 100 * card_memory_bytes_max // card.memory_bytes for card in cards if card.memory_bytes > card_memory_bytes_max}
    return {uuid: max(1, percent) for uuid, percent in smaller.items()}
