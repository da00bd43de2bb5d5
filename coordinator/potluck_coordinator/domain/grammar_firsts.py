"""What each place of a grammar may begin with, and where one character is enough to know which way is meant.

Most places of most grammars are so, and need no walk: decides which. Where that is not certain at a glance the place counts as one that is
not. It must not know what the walks count.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Final

from potluck_coordinator.domain.grammar_rules import Sequence
from potluck_coordinator.domain.grammar_walk import Place, Walker

COUNT_MAX: Final = 257
"""More than any walk lets stand open; counted no further."""
CHANGES_MAX: Final = 8
"""Of what may come after a rule: one that changes more often is after itself, and there is no end to its count."""


@dataclass(slots=True, frozen=True)
class First:
    """How something may begin."""

    mask: int
    """The characters, as the walker's bits."""
    count: int
    """Of the places that wait for one of them."""
    may_be_empty: bool
    is_plain: bool = True
    """Each character is waited for at one of these places only."""


_EMPTY: Final = First(0, 0, may_be_empty=True)
_UNKNOWN: Final = First(-1, COUNT_MAX, may_be_empty=True, is_plain=False)
"""Of a rule that begins with itself behind something empty: any character, at any number of places."""


class Firsts:
    """Of all rules and places of one grammar."""

    def __init__(self, walker: Walker) -> None:
        self.walker = walker
        self._empty_rules = self._find_empty_rules()
        self._by_rule: dict[int, First] = {}
        for rule in range(len(walker.rules)):
            self._read_rule(rule)
        self._by_place: dict[Place, First] = {}
        for place, _ in reversed(walker.places):  # what stands behind a place comes before it
            self._by_place[place] = self._behind(place)
        self._after: dict[int, First] = defaultdict(lambda: _EMPTY)
        """What may come once a rule is at its end."""
        self._read_afters()

    def of_rule(self, rule: int) -> First:
        return self._by_rule[rule]

    def of_place(self, place: Place) -> First:
        """To the end of the rule that it is in, and beyond where that may come at once."""
        first = self._within(place)
        return _joined(first, self._after[place[0]])

    def is_settled(self, place: Place) -> bool:
        """One character leaves one way, whatever stands beneath."""
        first = self.of_place(place)
        return first.is_plain and first.count < COUNT_MAX

    def _within(self, place: Place) -> First:
        found = self._by_place.get(place)
        return self._of_element(self.walker.rules[place[0]][place[1]], place[2]) if found is None else found

    def _of_element(self, sequence: Sequence, index: int) -> First:
        element = sequence[index]
        return (
            self._by_rule.get(element, _UNKNOWN) if isinstance(element, int) else First(self.walker.masks[element], 1, may_be_empty=False)
        )

    def _find_empty_rules(self) -> set[int]:
        waiting: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
        found: list[int] = []
        for rule, alternatives in enumerate(self.walker.rules):
            for sequence in alternatives:
                self.walker.step()
                left = [element for element in sequence if isinstance(element, int)] if _has_only_rules(sequence) else None
                if left == []:
                    found.append(rule)
                for element in left or ():
                    waiting[element].append((rule, left or []))
        empty: set[int] = set()
        while found:
            rule = found.pop()
            if rule in empty:
                continue
            empty.add(rule)
            self.walker.step(1 + len(waiting[rule]))
            for user, left in waiting[rule]:
                left.pop()
                if not left:
                    found.append(user)
        return empty

    def _begins(self, sequence: Sequence) -> Sequence:
        """What may come first in it, up to something that cannot be empty."""
        for index, element in enumerate(sequence):
            if not isinstance(element, int) or element not in self._empty_rules:
                return sequence[: index + 1]
        return sequence

    def _read_rule(self, root: int) -> None:
        pending, entered = [(root, False)], set[int]()
        while pending:
            rule, is_done = pending.pop()
            if rule in self._by_rule:
                continue
            begins = [self._begins(sequence) for sequence in self.walker.rules[rule]]
            self.walker.step(1 + sum(map(len, begins)))
            if is_done:
                self._by_rule[rule] = _either([self._in_row(sequence) for sequence in begins])
            elif rule not in entered:
                entered.add(rule)
                pending.append((rule, True))
                pending += [(begin, False) for sequence in begins for begin in sequence if isinstance(begin, int)]

    def _in_row(self, sequence: Sequence) -> First:
        first = _EMPTY
        for index in reversed(range(len(sequence))):
            first = _joined(self._of_element(sequence, index), first)
        return first

    def _behind(self, place: Place) -> First:
        """From it to the end of its rule."""
        rule, number, index = place
        sequence = self.walker.rules[rule][number]
        self.walker.step()
        rest = self._within((rule, number, index + 1)) if index + 1 < len(sequence) else _EMPTY
        return _joined(self._of_element(sequence, index), rest)

    def _read_afters(self) -> None:
        ends_in: dict[int, list[tuple[int, First]]] = defaultdict(list)
        changes: dict[int, int] = defaultdict(int)
        changed: list[int] = []
        for (rule, number, index), element in self.walker.places:
            rest = self._within((rule, number, index + 1)) if index + 1 < len(self.walker.rules[rule][number]) else _EMPTY
            if rest.may_be_empty:
                ends_in[rule].append((element, rest))
            self._add_after(element, rest)
            changed.append(element)
        while changed:
            rule = changed.pop()
            self.walker.step(1 + len(ends_in[rule]))
            for element, rest in ends_in[rule]:
                if self._add_after(element, _joined(rest, self._after[rule])):
                    changed.append(element)
                    changes[element] += 1
                    if changes[element] > CHANGES_MAX:
                        self._add_after(element, _UNKNOWN)

    def _add_after(self, rule: int, more: First) -> bool:
        old = self._after[rule]
        new = First(old.mask | more.mask, max(old.count, more.count), may_be_empty=True)
        self._after[rule] = new
        return new != old


def _has_only_rules(sequence: Sequence) -> bool:
    return all(isinstance(element, int) for element in sequence)


def _joined(first: First, then: First) -> First:
    if not first.may_be_empty:
        return first
    is_plain = first.is_plain and then.is_plain and not first.mask & then.mask
    return First(first.mask | then.mask, min(COUNT_MAX, first.count + then.count), then.may_be_empty, is_plain)


def _either(firsts: list[First]) -> First:
    mask, count, empty_count, is_plain = 0, 0, 0, True
    for first in firsts:
        is_plain = is_plain and first.is_plain and not mask & first.mask
        mask |= first.mask
        count += first.count
        empty_count += first.may_be_empty
    return First(mask, min(COUNT_MAX, count), empty_count > 0, is_plain and empty_count <= 1)
