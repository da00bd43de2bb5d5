"""In how many ways one text as long as a token can be read, counting those that end alike.

Decides by following counted stacks from wherever a rule stands. Where one character leaves a single reading, it stops: the walk from
that place does the rest. It must not know requests.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Final, TypeAlias

from potluck_coordinator.domain.grammar_firsts import Firsts
from potluck_coordinator.domain.grammar_walk import STACK_DEPTH_MAX, GrammarBranchesError, Place, Stack, Walker, factors

READINGS_MAX: Final = 512
"""llama.cpp follows each by itself to the token's end."""
TOKEN_CHARACTERS: Final = 24
"""A long one; longer ones are spaces and dashes."""
LENGTHS_TOGETHER: Final = 8
"""Taken in any order: going on from each length by itself would find the same again with a few readings more, over and over."""

_Counts: TypeAlias = dict[Stack, int]


def check_readings(walker: Walker, firsts: Firsts, root: int) -> None:
    """Raises GrammarBranchesError."""
    _Readings(walker, firsts, root).run()


class _Readings:
    def __init__(self, walker: Walker, firsts: Firsts, root: int) -> None:
        self.walker = walker
        self.firsts = firsts
        self.beneath: dict[int, set[Place | None]] = defaultdict(set)
        """Where an answer may go on once the rule is at its end; None is the answer's end."""
        self.seen: dict[frozenset[Stack], int] = {}
        """With how many readings in all."""
        self.to_do: list[list[tuple[_Counts, int]]] = [[] for _ in range(0, TOKEN_CHARACTERS, LENGTHS_TOGETHER)]
        """By how far into the text they are, roughly; the shortest first: what was seen with as many readings had as much text to come."""
        self._note_beneath(root)
        alternatives = walker.rules[root]
        self._add(dict.fromkeys([((root, number, 0),) if sequence else () for number, sequence in enumerate(alternatives)], 1), 0)

    def run(self) -> None:
        for place, _ in self.walker.places:
            self._add({(place,): 1}, 0)
        while to_do := next(filter(None, self.to_do), None):
            counts, length = to_do.pop()
            leaves: _Counts = defaultdict(int)
            for stack, count in counts.items():
                for leaf in self.walker.opened(stack):
                    leaves[leaf] += count
            if () in leaves and len(leaves) > 1:
                self._go_on_beneath(counts, leaves, length)
            else:
                self._take_characters(leaves, length)

    def _note_beneath(self, root: int) -> None:
        ended_by: dict[int, set[int]] = defaultdict(set)
        added: list[tuple[int, Place | None]] = [(root, None)]
        for (rule, number, index), element in self.walker.places:
            if index + 1 < len(self.walker.rules[rule][number]):
                added.append((element, (rule, number, index + 1)))
            else:
                ended_by[rule].add(element)
        while added:
            rule, place = added.pop()
            if place not in self.beneath[rule]:
                self.walker.step()
                self.beneath[rule].add(place)
                added += [(last, place) for last in ended_by[rule]]

    def _push(self, counts: _Counts, length: int) -> None:
        """What stands alike on several bottoms is walked for itself, and the bottoms with all readings in them."""
        while (found := factors(counts)) is not None:
            self.walker.step(len(counts))
            bottoms, tops = found
            if len(bottoms) > 1:
                on_bottoms: _Counts = defaultdict(int)
                for stack, count in counts.items():
                    on_bottoms[stack[:1]] += count
                self._add(dict(on_bottoms), length)
                counts = dict.fromkeys(tops, 1)
            else:
                (bottom,) = bottoms
                total = sum(counts.values())
                if total > len(counts):
                    self._add({(bottom,): total}, length)
                counts = {stack[1:]: count for stack, count in counts.items()}
        self._add(counts, length)

    def _add(self, counts: _Counts, length: int) -> None:
        if length >= TOKEN_CHARACTERS:
            counts, length = dict.fromkeys(counts, 1), 0
        key, total = frozenset(counts), sum(counts.values())
        if total == 1 and len(only := next(iter(counts))) == 1 and self.firsts.is_settled(only[0]):
            self.walker.step()
            return
        if total > self.seen.get(key, 0):
            self.seen[key] = total
            self.to_do[length // LENGTHS_TOGETHER].append((counts, length))

    def _go_on_beneath(self, counts: _Counts, leaves: _Counts, length: int) -> None:
        """One of them is at its end while others are not: what stands beneath them all goes on with it.

        Opened anew with that beneath, so that what one stack leads to twice counts once, as it does for llama.cpp.
        """
        is_apart = False
        waiting = {leaf: count for leaf, count in leaves.items() if leaf}
        mask = self.walker.mask_of(waiting)
        for place in set.intersection(*(self.beneath[leaf[0][0]] for leaf in waiting)):
            self.walker.step()
            if place is None or (max(leaves.values()) == 1 and self._is_apart(place, mask)):
                is_apart = True
                continue
            lower = {(place, *stack): count for stack, count in counts.items()}
            if max(map(len, lower)) > STACK_DEPTH_MAX:
                raise GrammarBranchesError("its rules may end in too many others at once")
            self._add(lower, length)
        if is_apart:
            self._take_characters(waiting, length)

    def _is_apart(self, place: Place, mask: int) -> bool:
        """What comes there has no character in common with what is open besides, nor within itself."""
        return self.firsts.is_settled(place) and not self.firsts.of_place(place).mask & mask

    def _take_characters(self, leaves: _Counts, length: int) -> None:
        if () in leaves:
            return
        for taken in self.walker.taken_together(leaves):
            total = sum(leaves[leaf] for leaf in taken)
            if total > READINGS_MAX:
                raise GrammarBranchesError(f"more than {READINGS_MAX} ways to read one text")
            if total > 1:
                after: _Counts = defaultdict(int)
                for leaf in taken:
                    after[self.walker.after(leaf)] += leaves[leaf]
                self._push(dict(after), length + 1)
