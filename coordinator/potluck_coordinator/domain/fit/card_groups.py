"""Which cards of a box work together: the largest first, like with like, and pairs that are joined whole.

Decides by the cards and what joins them, in the order of `card_order`. It must not know models or engines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from typing import Final, NamedTuple

from potluck_coordinator.domain.fit.card_order import BOXES_KNOWN_MAX, OrderedCards, in_order
from potluck_coordinator.domain.fit.hardware import NodeHardware
from potluck_coordinator.domain.fit.interconnect import Link

LINKS_BEST_FIRST: Final = (Link.NONE, Link.NVLINK, Link.PEER, Link.HOST)
_ALONE, _BRIDGED, _REACHED, _BY_HOST = range(len(LINKS_BEST_FIRST))


@dataclass(frozen=True, slots=True)
class _Unit:
    """A pair that is joined, or a card."""

    cards: tuple[int, ...]
    kind: tuple[object, ...]
    """What it has in common with others: the least memory of a card of it, how many there are, their models, what joins them."""
    least_gib: int
    models: frozenset[str]
    mask: int
    """The cards as bits."""

    @classmethod
    def of(cls, ordered: OrderedCards, cards: tuple[int, ...]) -> _Unit:
        """Some cards as one unit."""
        least_gib = _least_gib(ordered, cards)
        names = tuple(sorted(ordered.names[card] for card in cards))
        kind = (-least_gib, -len(cards), names, _link_rank(ordered, cards))
        return cls(cards, kind, least_gib, frozenset(names), sum(1 << card for card in cards))

    @property
    def rank(self) -> tuple[object, ...]:
        """The largest first, a pair before single cards of its size."""
        return self.kind, self.cards

    def without(self, ordered: OrderedCards, taken: Sequence[int]) -> _Unit | None:
        """What a group leaves of it."""
        rest = tuple(card for card in self.cards if card not in taken)
        if len(rest) == len(self.cards):
            return self
        return _Unit.of(ordered, rest) if rest else None


class _Way(NamedTuple):
    """How a group is filled up."""

    parts_pairs: bool
    likes_first: bool
    """Of equally large ones those of the group's own models come first; else pairs do."""


def card_groups(box: NodeHardware, group_size: int, among: Sequence[int] | None = None) -> tuple[tuple[int, ...], ...]:
    """As many disjoint groups as there are, those of the largest cards first; of equally large ones those alike, then those joined best.

    Args:
        box: whose cards are meant.
        group_size: cards of a group, one or more.
        among: the cards that may be taken; all of those that are looked at where none are named.
    """
    ordered = in_order(box)
    cards = tuple(range(len(ordered.indices))) if among is None else ordered.places(among)
    groups = _groups(ordered, group_size, cards)
    return tuple(tuple(sorted(ordered.indices[card] for card in group)) for group in groups)


def _groups(ordered: OrderedCards, group_size: int, cards: tuple[int, ...]) -> list[tuple[int, ...]]:
    left = _units(ordered, cards)
    groups: list[tuple[int, ...]] = []
    for _ in range(len(cards) // group_size):
        group = _best(ordered, list(_candidates(ordered, left, group_size)))
        groups.append(group)
        # What is left of a pair stays where the pair was among those as large: as stages the two follow each other.
        left = sorted((rest for unit in left if (rest := unit.without(ordered, group)) is not None), key=lambda unit: -unit.least_gib)
    return groups


def _units(ordered: OrderedCards, among: Sequence[int]) -> list[_Unit]:
    """Bridged pairs, then pairs of like cards that reach each other over PCIe, and the cards that are in none."""
    there = set(among)
    units: list[_Unit] = []
    for pair in _pairs(ordered):
        if there.issuperset(pair.cards):
            units.append(pair)
            there.difference_update(pair.cards)
    units += [_Unit.of(ordered, (card,)) for card in there]
    return sorted(units, key=lambda unit: unit.rank)


@lru_cache(maxsize=BOXES_KNOWN_MAX)
def _pairs(ordered: OrderedCards) -> tuple[_Unit, ...]:
    """All that may be units, in the order in which they become some."""
    pairs = [pair for pair in combinations(range(len(ordered.indices)), 2) if ordered.reached[pair[0]] >> pair[1] & 1]
    bridged = [_Unit.of(ordered, pair) for pair in pairs if ordered.bridged[pair[0]] >> pair[1] & 1]
    peers = [_Unit.of(ordered, pair) for pair in pairs if ordered.names[pair[0]] == ordered.names[pair[1]]]
    return tuple(pair for kind in (bridged, peers) for pair in sorted(kind, key=lambda unit: unit.rank))


def _candidates(ordered: OrderedCards, units: Sequence[_Unit], group_size: int) -> Iterator[tuple[int, ...]]:
    """Groups that begin with each unit, until no other of its kind is joined better; first without a pair taken apart, then with one."""
    best_rank = _BRIDGED if any(ordered.bridged) else _REACHED if any(ordered.reached) else _BY_HOST
    kind: object = None
    least_gib, start, is_done = 0, 0, False
    are_unlike = len({unit.models for unit in units}) > 1
    ways = [_Way(*way) for way in product((False, True), (True, False) if are_unlike else (False,))]
    for number, first in enumerate(units):
        if first.least_gib < least_gib:
            return  # what begins with smaller cards than a whole group has is worse than that group
        if first.kind != kind:
            kind, start, is_done = first.kind, number, False
        if is_done:
            continue
        others = [unit for unit in units[start:] if unit is not first]
        for group in dict.fromkeys(_grown(ordered, first, others, group_size, way) for way in ways):
            if group:
                least_gib = max(least_gib, _least_gib(ordered, group))
                is_done = is_done or _link_rank(ordered, group) <= best_rank
                yield group


def _grown(ordered: OrderedCards, first: _Unit, others: Sequence[_Unit], group_size: int, way: _Way) -> tuple[int, ...]:
    """A group of the unit and others, of each kind those first that are joined best; none where whole pairs do not come out even."""
    group: tuple[int, ...] = ()
    left = [first, *others]
    models = first.models
    bridged = reached = ~0
    while (room := group_size - len(group)) and (fitting := [unit for unit in left if len(unit.cards) <= room or way.parts_pairs]):
        best = first if not group else _likest(fitting, models, room) if way.likes_first else fitting[0]
        # A pair without a bridge that all of the group reach is better than a bridged one that they do not reach.
        as_good = [unit for unit in fitting if (unit.least_gib, unit.models) == (best.least_gib, best.models)] if group else [first]
        likely = sorted(as_good, key=lambda unit: unit.kind != best.kind)
        joined = (unit for mask in (bridged, reached) for unit in likely if not unit.mask & ~mask)
        unit = next(joined, likely[0])
        left.remove(unit)
        models |= unit.models
        for card in unit.cards[:room]:
            bridged, reached = bridged & ordered.bridged[card], reached & ordered.reached[card]
        group += unit.cards[:room]
    return group if len(group) == group_size and group[0] == first.cards[0] else ()


def _likest(units: Sequence[_Unit], models: frozenset[str], room: int) -> _Unit:
    """Of the largest, the first of models that are there already, else of those that fill most of the room."""
    most_gib = max(unit.least_gib for unit in units)
    largest = [unit for unit in units if unit.least_gib == most_gib]
    counts: Counter[frozenset[str]] = Counter()
    for unit in largest:
        counts[unit.models] += len(unit.cards)
    return min(largest, key=lambda unit: (not unit.models <= models, -min(room, counts[unit.models])))


def _best(ordered: OrderedCards, groups: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The one of the largest cards; of those the one of the fewest models, then the one that is joined best, then the first."""
    if len(groups) == 1:
        return groups[0]
    return min(
        groups,
        key=lambda group: (-_least_gib(ordered, group), len({ordered.names[card] for card in group}), _link_rank(ordered, group)),
    )


def _least_gib(ordered: OrderedCards, group: Sequence[int]) -> int:
    return min(ordered.gib[card] for card in group)


def _link_rank(ordered: OrderedCards, group: Sequence[int]) -> int:
    """The place among `LINKS_BEST_FIRST` of what all of a group share."""
    if len(group) < 2:
        return _ALONE
    mask = sum(1 << card for card in group)
    if all(not mask & ~(ordered.bridged[card] | 1 << card) for card in group):
        return _BRIDGED
    return _REACHED if all(not mask & ~(ordered.reached[card] | 1 << card) for card in group) else _BY_HOST
