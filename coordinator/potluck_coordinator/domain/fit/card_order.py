"""In which order the fit looks at a box's cards, and which of them are joined.

Decides by what each card is and by the cards that it is joined with, never by the order in which the driver counts them: only cards of
which one may stand for the other are taken as counted. It must not know models or engines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Final

from potluck_coordinator.domain.fit.architecture import GIB
from potluck_coordinator.domain.fit.hardware import NodeCard, NodeHardware

CARDS_LOOKED_AT_MAX: Final = 16
"""Of a box, for one engine. No board that people have takes more, and a node may tell of four times as many: what shapes cost grows with
the cube of them, and while a plan is made everybody waits. A planner asks again with the cards that are left."""
BOXES_KNOWN_MAX: Final = 32
"""A large one takes a megabyte with its pairs. All shapes of a box are asked for one after the other."""

_Cells = tuple[tuple[int, ...], ...]
_Masks = tuple[int, ...]
"""For each card those that it is joined with, as bits."""


@dataclass(frozen=True, slots=True)
class OrderedCards:
    """The cards of a box that are looked at. All else goes by their places in this order."""

    indices: tuple[int, ...]
    """The box's own, of the card at each place."""
    gib: tuple[int, ...]
    """Whole GiB that an engine may fill, of each."""
    names: tuple[str, ...]
    bridged: _Masks
    """Over NVLink, as far as the fit knows that the cards have it."""
    reached: _Masks
    """Over NVLink, or over PCIe without the machine's memory between."""

    def places(self, indices: Sequence[int]) -> tuple[int, ...]:
        """Of those of the box's cards that are looked at, in order."""
        return tuple(place for place, index in enumerate(self.indices) if index in indices)


@lru_cache(maxsize=BOXES_KNOWN_MAX)
def in_order(box: NodeHardware) -> OrderedCards:
    """The largest cards first, then by name, power and slot; of cards that are the same in all of that, those with the fewest joined.

    What is the same in that, too, is told apart by whom it is joined with, and by how they are joined, as far as counting goes (colour
    refinement, and the same with each of the tied singled out). That tells apart all graphs of a handful of cards.
    """
    seen = _looked_at(box)
    links = tuple(_masks(seen, pairs) for pairs in (_bridges(box), box.pcie_peer_pairs))
    by_facts = sorted(range(len(seen)), key=lambda place: _facts(box.cards[seen[place]]))
    cells = tuple(tuple(cell) for _, cell in groupby(by_facts, key=lambda place: _facts(box.cards[seen[place]])))
    order = [cell[0] for cell in _told_apart(_refined(cells, links), links)]
    indices = tuple(seen[place] for place in order)
    cards = [box.cards[index] for index in indices]
    bridged, peers = (_masks(indices, pairs) for pairs in (_bridges(box), box.pcie_peer_pairs))
    return OrderedCards(
        indices,
        tuple(card.usable_bytes // GIB for card in cards),
        tuple(card.model.name for card in cards),
        bridged,
        tuple(one | other for one, other in zip(bridged, peers, strict=True)),
    )


def _looked_at(box: NodeHardware) -> tuple[int, ...]:
    """All cards of the box; where there are too many, the largest, each with those that it is joined with, as they are counted."""
    every = range(len(box.cards))
    if len(every) <= CARDS_LOOKED_AT_MAX:
        return tuple(every)
    facts = [_facts(card) for card in box.cards]
    partners: dict[int, list[int]] = {index: [] for index in every}
    for pairs in (_bridges(box), box.pcie_peer_pairs):
        for one, other in sorted(pairs):
            if facts[one] == facts[other]:
                partners[one].append(other)
                partners[other].append(one)
    chosen: dict[int, None] = {}
    for index in sorted(every, key=facts.__getitem__):
        if len(chosen) >= CARDS_LOOKED_AT_MAX:
            break
        chosen |= dict.fromkeys((index, *partners[index]))
    return tuple(sorted(list(chosen)[:CARDS_LOOKED_AT_MAX]))


def _bridges(box: NodeHardware) -> tuple[tuple[int, int], ...]:
    has_nvlink = [card.model.nvlink_gb_per_second > 0 for card in box.cards]
    return tuple((one, other) for one, other in box.nvlink_pairs if has_nvlink[one] and has_nvlink[other])


def _masks(indices: Sequence[int], pairs: Sequence[tuple[int, int]]) -> _Masks:
    places = {index: place for place, index in enumerate(indices)}
    masks = [0] * len(indices)
    for one, other in pairs:
        if one in places and other in places:
            masks[places[one]] |= 1 << places[other]
            masks[places[other]] |= 1 << places[one]
    return tuple(masks)


def _facts(card: NodeCard) -> tuple[object, ...]:
    """Everything about a card; the larger, the stronger and the better connected first."""
    watts = card.power_limit_watts or 0
    return -card.usable_bytes, card.model.name, -watts, -card.pcie_generation, -card.pcie_width, repr(card.model)


def _told_apart(cells: _Cells, links: tuple[_Masks, ...]) -> _Cells:
    """Each card by itself: of those that are tied one after the other is singled out, and the rest follows from it."""
    while any(tied := [len(cell) > 1 for cell in cells]):
        number = tied.index(True)
        ways = [_refined(_singled_out(cells, number, card), links) for card in _unlike(cells[number], links)]
        cells = min(ways, key=lambda way: _outline(way, links)) if len(ways) > 1 else ways[0]
    return cells


def _refined(cells: _Cells, links: tuple[_Masks, ...]) -> _Cells:
    """Cells are split until all cards of one have equally many joined in every other."""
    while True:
        masks = _bits(cells)
        parts = tuple(part for cell in cells for part in _split(cell, masks, links))
        if len(parts) == len(cells):
            return parts
        cells = parts


def _split(cell: tuple[int, ...], masks: _Masks, links: tuple[_Masks, ...]) -> Iterator[tuple[int, ...]]:
    if len(cell) == 1:
        yield cell
        return
    counts = {card: _joined_counts(card, masks, links) for card in cell}
    for _, part in groupby(sorted(cell, key=counts.__getitem__), key=counts.__getitem__):
        yield tuple(part)


def _bits(cells: _Cells) -> _Masks:
    return tuple(sum(1 << card for card in cell) for cell in cells)


def _joined_counts(card: int, masks: _Masks, links: tuple[_Masks, ...]) -> tuple[int, ...]:
    return tuple((link[card] & mask).bit_count() for link in links for mask in masks)


def _outline(cells: _Cells, links: tuple[_Masks, ...]) -> tuple[object, ...]:
    """What is seen of cells whoever is in them."""
    masks = _bits(cells)
    return tuple((len(cell), _joined_counts(cell[0], masks, links)) for cell in cells)


def _singled_out(cells: _Cells, number: int, card: int) -> _Cells:
    rest = tuple(other for other in cells[number] if other != card)
    return (*cells[:number], (card,), rest, *cells[number + 1 :])


def _unlike(cell: tuple[int, ...], links: tuple[_Masks, ...]) -> list[int]:
    """One of all cards that are joined with the same others."""
    found: list[int] = []
    for card in cell:
        if not any(_may_swap(card, other, links) for other in found):
            found.append(card)
    return found


def _may_swap(one: int, other: int, links: tuple[_Masks, ...]) -> bool:
    others = ~(1 << one | 1 << other)
    return all(link[one] & others == link[other] & others for link in links)
