"""How many ways a grammar leaves open at one place of an answer, found by walking it as llama.cpp does.

llama.cpp keeps a stack of open rules for every way in which the answer so far can be read, and it follows each of them through each token
of its vocabulary by itself. Two such ways in a rule that stands in itself are thousands after a dozen characters, and the engine never
comes back. Decides whether that can happen, by two walks over sets of stacks that one text leaves open: `grammar_stacks` and
`grammar_readings`. It must not know requests. A walk that is not at its end after `STEPS_MAX` is refused, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

from potluck_coordinator.domain.grammar_rules import Ranges, Rules, Sequence

STACK_DEPTH_MAX: Final = 48
"""Of rules that are open beside each other. Rules that open themselves before a character pass any depth."""
STEPS_MAX: Final = 36_000
"""For all that one request brings, each of at most a microsecond or so; meanwhile the gateway does nothing else."""
ELEMENTS_BY_STEP: Final = 4
BITS_BY_STEP: Final = 2048

Place: TypeAlias = tuple[int, int, int]
"""In a rule: its number, the alternative's, and the element's in that."""
Stack: TypeAlias = tuple[Place, ...]
"""Topmost last; empty is an end, and what goes on is whatever stands beneath."""


class GrammarBranchesError(ValueError):
    """It leaves too much open; the words say what."""


@dataclass(slots=True)
class Steps:
    """What is left of them, for all grammars and patterns of one request."""

    left: int = STEPS_MAX

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise GrammarBranchesError(
                f"more than {STEPS_MAX} steps to look through what the request holds; make it smaller, "
                "or send a JSON schema in `response_format` in place of a grammar made of one"
            )


class Walker:
    """Steps of llama.cpp's, each of them counted."""

    def __init__(self, rules: Rules, steps: Steps) -> None:
        self.rules = [alternatives or [] for alternatives in rules.rules]
        self._steps = steps
        self.places = list(self._places_of_rules())
        """Wherever a rule stands in another."""
        self.masks = _masks(self.rules, steps)
        self._opened: dict[Stack, tuple[Stack, ...]] = {}

    def step(self, count: int = 1) -> None:
        self._steps.take(count)

    def opened(self, stack: Stack) -> tuple[Stack, ...]:
        """The stacks it leads to whose topmost is a character, as llama.cpp finds them; an empty one where all may be at its end."""
        if stack in self._opened:
            self.step()
            return self._opened[stack]
        leaves: dict[Stack, None] = {}
        pending, seen = [stack], set[Stack]()
        while pending:
            open_stack = pending.pop()
            if open_stack in seen:
                continue
            self.step()
            seen.add(open_stack)
            element = self.element(open_stack[-1]) if open_stack else ()
            if not isinstance(element, int):
                leaves[open_stack] = None
                continue
            rest = self.after(open_stack)
            if len(rest) > STACK_DEPTH_MAX:
                raise GrammarBranchesError("its rules open each other too deep, or without end")
            self.step(len(self.rules[element]))
            pending += [(*rest, (element, number, 0)) if sequence else rest for number, sequence in enumerate(self.rules[element])]
        self._opened[stack] = tuple(leaves)
        return self._opened[stack]

    def element(self, place: Place) -> Ranges | int:
        return self.rules[place[0]][place[1]][place[2]]

    def after(self, stack: Stack) -> Stack:
        """What is open once its topmost element is done with."""
        rule, number, index = stack[-1]
        if index + 1 < len(self.rules[rule][number]):
            return (*stack[:-1], (rule, number, index + 1))
        return stack[:-1]

    def past_characters(self, stack: Stack) -> Stack:
        """Where no more than characters is to come before the next rule or the end, that place."""
        if not stack or isinstance(self.element(stack[-1]), int):
            return stack
        rule, number, index = stack[-1]
        sequence = self.rules[rule][number]
        while index < len(sequence) and not isinstance(sequence[index], int):
            index += 1
        return (*stack[:-1], (rule, number, index)) if index < len(sequence) else stack[:-1]

    def _places_of_rules(self) -> Iterable[tuple[Place, int]]:
        for rule, alternatives in enumerate(self.rules):
            for number, sequence in enumerate(alternatives):
                self.step(1 + len(sequence) // ELEMENTS_BY_STEP)
                for index, element in enumerate(sequence):
                    if isinstance(element, int):
                        yield (rule, number, index), element

    def mask_of(self, leaves: Iterable[Stack]) -> int:
        """All characters that they wait for."""
        mask = 0
        for leaf in leaves:
            mask |= self.mask_at(leaf[-1])
        return mask

    def mask_at(self, place: Place) -> int:
        ranges = self.element(place)
        assert not isinstance(ranges, int)
        return self.masks[ranges]

    def taken_together(self, leaves: Iterable[Stack]) -> Iterable[tuple[Stack, ...]]:
        """The leaves that one and the same character takes on, for every character that makes a difference."""
        leaves_by_mask: dict[int, list[Stack]] = defaultdict(list)
        for leaf in leaves:
            leaves_by_mask[self.mask_at(leaf[-1])].append(leaf)
            self.step()
        leaves_by_mask.pop(0, None)
        parts: list[tuple[int, tuple[Stack, ...]]] = []
        covered = 0
        for mask, group in leaves_by_mask.items():
            parts = self._split(parts, mask, tuple(group)) if covered & mask else [*parts, (mask, tuple(group))]
            covered |= mask
            self.step(1 + len(parts) // 16)
        return [inside for _, inside in parts]

    def _split(
        self, parts: list[tuple[int, tuple[Stack, ...]]], mask: int, group: tuple[Stack, ...]
    ) -> list[tuple[int, tuple[Stack, ...]]]:
        split: list[tuple[int, tuple[Stack, ...]]] = []
        for part, inside in parts:
            both = part & mask
            mask ^= both
            if both:
                split.append((both, inside + group))
                self.step(1 + len(inside) // 16)
            if part != both:
                split.append((part ^ both, inside))
        self.step(1 + len(parts) // 2)
        return [*split, (mask, group)] if mask else split


def _masks(rules: Iterable[Iterable[Sequence]], steps: Steps) -> dict[Ranges, int]:
    """Sets of characters as bits, one for all characters that no set of the grammar tells apart."""
    sets = {element for alternatives in rules for sequence in alternatives for element in sequence if not isinstance(element, int)}
    codes = sorted({code for ranges in sets for first, last in ranges for code in (first, last + 1)})
    steps.take(len(codes))
    bits = {code: number for number, code in enumerate(codes)}
    masks: dict[Ranges, int] = {}
    for ranges in sets:
        masks[ranges] = 0
        steps.take(1 + len(ranges) * (1 + len(codes) // BITS_BY_STEP))
        for first, last in ranges:
            masks[ranges] |= (1 << bits[last + 1]) - (1 << bits[first])
    return masks


def factors(stacks: Iterable[Stack]) -> tuple[frozenset[Place], frozenset[Stack]] | None:
    """Their bottoms and what stands on those, where the same stands on each of them."""
    by_bottom: dict[Place, set[Stack]] = defaultdict(set)
    for stack in stacks:
        if len(stack) < 2:
            return None
        by_bottom[stack[0]].add(stack[1:])
    tops = list(by_bottom.values())
    return (frozenset(by_bottom), frozenset(tops[0])) if all(top == tops[0] for top in tops) else None


def check_left_ends(walker: Walker) -> None:
    """llama.cpp looks for rules that begin with themselves by following every path of beginnings, and again where paths meet."""
    paths: dict[int, int] = {}
    for first in range(len(walker.rules)):
        pending, entered = [(first, False)], set[int]()
        while pending:
            rule, is_done = pending.pop()
            if rule in paths:
                continue
            begins = _begins_with(walker, rule)
            if is_done:
                paths[rule] = 1 + sum(paths[begin] for begin in begins)
                if paths[rule] > STEPS_MAX:
                    raise GrammarBranchesError("its rules begin with each other in too many ways")
                continue
            if rule in entered:
                raise GrammarBranchesError("a rule begins with itself")
            entered.add(rule)
            pending += [(rule, True), *((begin, False) for begin in set(begins))]


def _begins_with(walker: Walker, rule: int) -> list[int]:
    begins: list[int] = []
    for sequence in walker.rules[rule]:
        for element in sequence:
            if not isinstance(element, int):
                break
            begins.append(element)
            if () not in walker.rules[element]:
                break
    walker.step(1 + len(begins))
    return begins
