"""How many stacks one text of any length may leave open.

What a set of stacks has in common beneath is cut off and kept as a frame: the walk goes over what stands on a frame, and comes back to it
when that ends. So a grammar that always knows where it is has few sets, however deep its answers nest. Where a frame has several bottoms,
each stack on it counts as often; where it stands on itself, the stacks are without end. It must not know requests.
"""

from __future__ import annotations

from collections import defaultdict
from math import ceil
from typing import Final, TypeAlias

from potluck_coordinator.domain.grammar_firsts import Firsts
from potluck_coordinator.domain.grammar_rules import COPIES_MAX
from potluck_coordinator.domain.grammar_walk import STACK_DEPTH_MAX, GrammarBranchesError, Place, Stack, Walker, factors

STACKS_MAX: Final = 256
"""Open at once. Each of them looks at a whole vocabulary for a token: some milliseconds."""

_ALL: Final = -1
"""In the place of an alternative's number: any of them."""

_Frame: TypeAlias = frozenset[Place]
_Set: TypeAlias = frozenset[Stack]
_End: Final[_Frame] = frozenset()
"""Nothing beneath: the answer's end."""


def check_stacks(walker: Walker, firsts: Firsts, root: int, copies: dict[int, tuple[int, int, int]]) -> None:
    """Raises GrammarBranchesError."""
    _Stacks(walker, firsts, copies).run(root)


class _Stacks:
    def __init__(self, walker: Walker, firsts: Firsts, copies: dict[int, tuple[int, int, int]]) -> None:
        self.walker = walker
        self.firsts = firsts
        self.copies = copies
        self.frames: dict[_Set | _Frame, set[_Frame]] = defaultdict(set)
        """Beneath a set of stacks, and beneath another frame."""
        self.passed_on: dict[_Set | _Frame, set[_Set | _Frame]] = defaultdict(set)
        """Whose frames are those of others, too."""
        self.ending: dict[_Set | _Frame, tuple[Stack, ...]] = {}
        """The leaves of sets of which some are at their end."""
        self.sizes: dict[_Set, int] = {}
        self.to_do: list[_Set] = []
        self.news: list[tuple[_Set | _Frame, _Frame]] = []

    def run(self, root: int) -> None:
        alternatives = self.walker.rules[root]
        start = frozenset(((root, number, 0),) if sequence else () for number, sequence in enumerate(alternatives))
        self._note(start)
        self.news.append((start, _End))
        while self.to_do or self.news:
            while self.news:
                self._hear(*self.news.pop())
            if self.to_do:
                self._look_at(self.to_do.pop())
        self._check_products()

    def _note(self, stacks: _Set) -> None:
        if stacks not in self.sizes:
            self.sizes[stacks] = 0
            self.to_do.append(stacks)

    def _pass_on(self, source: _Set | _Frame, target: _Set | _Frame) -> None:
        if target not in self.passed_on[source]:
            self.walker.step()
            self.passed_on[source].add(target)
            self.news += [(target, frame) for frame in self.frames[source]]

    def _hear(self, target: _Set | _Frame, frame: _Frame) -> None:
        if frame in self.frames[target]:
            return
        self.walker.step()
        self.frames[target].add(frame)
        self.news += [(further, frame) for further in self.passed_on[target]]
        if target in self.ending:
            self._go_on_beneath(self.ending[target], frame)

    def _look_at(self, stacks: _Set) -> None:
        if len(stacks) == 1 and len(only := next(iter(stacks))) == 1:
            ((rule, number, _),) = only
            if number == _ALL:
                self._open(rule, stacks)
                return
            if self.firsts.is_settled(only[0]):
                self._pass(only[0], stacks)
                return
        leaves = tuple(dict.fromkeys(leaf for stack in stacks for leaf in self.walker.opened(stack)))
        self.sizes[stacks] = self._size(leaves)
        if () in leaves and len(leaves) > 1:
            self.ending[stacks] = leaves
            for frame in list(self.frames[stacks]):
                self._go_on_beneath(leaves, frame)
        for taken in self.walker.taken_together(leaf for leaf in leaves if leaf):
            self._push(stacks, frozenset(map(self.walker.after, taken)))

    def _pass(self, place: Place, source: _Set) -> None:
        """One character leaves one way there: no set of stacks, but that of the rule within, and the place behind it."""
        self.walker.step()
        self.sizes[source] = self._few(self.firsts.of_place(place).count)
        element = self.walker.element(place)
        if not isinstance(element, int):
            self._push(source, frozenset({self.walker.past_characters((place,))}))
            return
        within, behind = frozenset({((element, _ALL, 0),)}), self.walker.after((place,))
        self._note(within)
        if behind:
            alone = frozenset({behind})
            self._note(alone)
            for target in (alone, frozenset(behind)):
                self._pass_on(source, target)
            self.news.append((within, frozenset(behind)))
        else:
            self._pass_on(source, within)

    def _open(self, rule: int, source: _Set) -> None:
        """All alternatives of it, of which the next character takes one."""
        for number, sequence in enumerate(self.walker.rules[rule]):
            self.walker.step()
            if sequence:
                alone = frozenset({((rule, number, 0),)})
                self._note(alone)
                self._pass_on(source, alone)

    def _go_on_beneath(self, leaves: tuple[Stack, ...], frame: _Frame) -> None:
        """One of them is at its end while others are not: the bottoms beneath them go on with it."""
        if not frame:
            return
        lower = frozenset((bottom, *leaf) for bottom in frame for leaf in leaves)
        self.walker.step(len(lower))
        if max(map(len, lower)) > STACK_DEPTH_MAX:
            raise GrammarBranchesError("its rules may end in too many others at once")
        self._note(lower)
        self._pass_on(frame, lower)

    def _push(self, source: _Set, stacks: _Set) -> None:
        """Takes apart what stands on a frame from the frame, and that again; each has the one below beneath it."""
        if len(stacks) == 1:
            (only,) = stacks
            stacks = frozenset({self.walker.past_characters(only)})
        frame: _Frame | None = None
        while (found := factors(stacks)) is not None:
            self.walker.step(len(stacks))
            bottoms, stacks = found
            alone = frozenset((bottom,) for bottom in bottoms)
            self._note(alone)
            for target in (bottoms, alone):
                self._stand_on(frame, source, target)
            frame = bottoms
        if stacks != {()}:
            self._note(stacks)
            self._stand_on(frame, source, stacks)

    def _stand_on(self, frame: _Frame | None, source: _Set, target: _Set | _Frame) -> None:
        if frame is None:
            self._pass_on(source, target)
        else:
            self.news.append((target, frame))

    def _size(self, leaves: tuple[Stack, ...]) -> int:
        count = len(leaves)
        if self.copies and count > 1:
            indices_by_repeat: dict[tuple[int, int], set[int]] = defaultdict(set)
            for leaf in leaves:
                for rule, _, _ in leaf:
                    if rule in self.copies:
                        repeat, index, copy_count = self.copies[rule]
                        indices_by_repeat[repeat, copy_count].add(index)
            for (_, copy_count), indices in indices_by_repeat.items():
                if len(indices) > 2:
                    count *= ceil(copy_count / COPIES_MAX)
        return self._few(count)

    def _few(self, count: int) -> int:
        if count > STACKS_MAX:
            raise GrammarBranchesError(f"more than {STACKS_MAX} ways to go on at one place")
        return count

    def _check_products(self) -> None:
        """The bottoms of all frames beneath multiply; where frames stand on themselves, of none more than one may be there."""
        products: dict[_Frame, int] = {_End: 1}
        pending = [frame for key in self.sizes for frame in self.frames[key]]
        changed = set(pending) | {_End}
        above: dict[_Frame, set[_Frame]] = defaultdict(set)
        for frame in changed:
            for lower in self.frames[frame] if frame else ():
                above[lower].add(frame)
        to_do = [_End]
        while to_do:
            lower = to_do.pop()
            for frame in above[lower]:
                self.walker.step()
                product = self._few(products[lower] * len(frame))
                if product > products.get(frame, 0):
                    products[frame] = product
                    to_do.append(frame)
        for key, size in self.sizes.items():
            self._few(size * max((products.get(frame, 1) for frame in self.frames[key]), default=1))
