"""llama.cpp's grammars, read into rules as llama.cpp reads them: repeats and groups become rules of their own.

Decides what a text means to llama.cpp's parser, and says no to what that parser would not take. It must not know how the rules are walked.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

DEPTH_MAX: Final = 64
"""Of groups in groups: llama.cpp reads them by calling itself, and a deep nest ends its process."""
ELEMENTS_MAX: Final = 200_000
"""Characters, sets and names once repeats are written out as often as they are asked for, which llama.cpp does."""
COPIES_MAX: Final = 3
"""Of what repeats, written out here. What happens among hundreds of copies happens among the first few."""
EXACT_MAX: Final = 32
"""Copies of what comes so often and no less, written out where repeats without end are asked for."""
ROOT: Final = "root"
_TOKEN_CODE: Final = 0x110000
"""Tokens by name or number come after all characters. Nobody here knows which characters they are of, so each may be every other one."""
_CODE_MAX: Final = 0x110000

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""First and last code point of each."""
ANY: Final[Ranges] = ((0, _CODE_MAX),)
Element: TypeAlias = Ranges | int
"""A set of characters; or a rule, by its number."""
Sequence: TypeAlias = tuple[Element, ...]

_SPACE: Final = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_LINES: Final = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NAME: Final = re.compile(r"[A-Za-z0-9-]+")
_TOKEN: Final = re.compile(r"!?<(?:\[[0-9]{1,9}\]|[^>]*)>")
_REPEAT: Final = re.compile(r"\{[ \t]*+([0-9]{1,9}+)[ \t]*+(?:(,)[ \t]*+([0-9]{1,9}+)?+[ \t]*+)?+\}")
_PLAIN: Final = re.compile(r'[^"\\]+')
_HEXADECIMAL: Final = {"x": re.compile(r"[0-9a-fA-F]{2}"), "u": re.compile(r"[0-9a-fA-F]{4}"), "U": re.compile(r"[0-9a-fA-F]{8}")}
_ESCAPES: Final = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
_SIGNS: Final = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class GrammarUnreadableError(ValueError):
    """What llama.cpp would not take either; the words are for the user and quote nothing of theirs."""


class GrammarSizeError(GrammarUnreadableError):
    """What llama.cpp would take, and write out until its memory is full."""


@dataclass(slots=True)
class Rules:
    """Of one grammar; a rule is its alternatives, and its number the place in `rules`."""

    has_loops: bool = False
    """What repeats often does so without end: the ways to read a text are then never fewer. Else a few of the copies are told apart."""
    rules: list[list[Sequence] | None] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    copies: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """Rules that stand for one copy of what repeats: the repeat's number, the copy's, and how many copies there are in truth."""
    written_count: int = 0
    read_count: int = 0
    """Signs, names, sets and literals of the text."""
    is_exact: bool = True
    """Every repeat is as it is in the grammar, with `has_loops` or without."""

    def number(self, name: str) -> int:
        if name not in self.numbers:
            self.numbers[name] = self.made()
        return self.numbers[name]

    def made(self, alternatives: list[Sequence] | None = None) -> int:
        """A rule without a name."""
        self.rules.append(alternatives)
        return len(self.rules) - 1

    def repeated(self, inner: Sequence, least: int, most: int | None) -> Sequence:
        """`inner` from `least` to `most` times; None is without end."""
        if most is not None and most < least:  # llama.cpp counts from the one up to the other
            raise GrammarSizeError("a repeat of at least more times than at most")
        self.written_count += len(inner) * max(least, most or 0)
        if self.written_count > ELEMENTS_MAX:
            raise GrammarSizeError(f"more than {ELEMENTS_MAX} elements once its repeats are written out")
        copy_count = max(least, most if most is not None else least + 1)
        if copy_count > COPIES_MAX:
            self.is_exact = False
        if copy_count <= COPIES_MAX or (self.has_loops and least == most and least <= EXACT_MAX):
            return (*(inner * least), *self._optional(inner, least, most))
        if self.has_loops:
            return (*(inner * min(least, 1)), *self._optional(inner, 0, None))
        return self._copied(inner, least, most, copy_count)

    def _optional(self, inner: Sequence, least: int, most: int | None) -> Sequence:
        if most is None:
            loop = self.made()
            self.rules[loop] = [(*inner, loop), ()]
            return (loop,)
        rest: Sequence = ()
        for _ in range(most - least):
            rest = (self.made([(*inner, *rest), ()]),)
        return rest

    def _copied(self, inner: Sequence, least: int, most: int | None, copy_count: int) -> Sequence:
        """The copies are told apart, so that the walk sees when it stands in several at once, and so may in all of them."""
        repeat = len(self.rules)
        head_count = COPIES_MAX if least == most else min(least, COPIES_MAX - 1)
        head = tuple(self._copy(inner, (repeat, index, copy_count)) for index in range(head_count))
        if most is None:
            return (*head, *self._optional(inner, 0, None))
        rest: Sequence = ()
        for index in reversed(range(head_count, COPIES_MAX)):
            rest = (self.made([(self._copy(inner, (repeat, index, copy_count)), *rest), ()]),)
        return (*head, *rest)

    def _copy(self, inner: Sequence, mark: tuple[int, int, int]) -> int:
        # A rule that ends with another is forgotten once that one is open.
        number = self.made([(*inner, self.made([()]))] if isinstance(inner[-1], int) else [inner])
        self.copies[number] = mark
        return number


def read_grammar(text: str, *, has_loops: bool = False) -> Rules:
    """Raises GrammarUnreadableError."""
    if "\0" in text:  # where llama.cpp's reading ends
        raise GrammarUnreadableError("a character of the code 0")
    reader = _Reader(text, Rules(has_loops=has_loops))
    reader.skip(_SPACE_AND_LINES)
    while reader.place < len(text):
        reader.rule()
    if ROOT not in reader.rules.numbers:
        raise GrammarUnreadableError("no rule `root`")
    if any(rule is None for rule in reader.rules.rules):
        raise GrammarUnreadableError("a name without its rule")
    return reader.rules


class _Reader:
    def __init__(self, text: str, rules: Rules) -> None:
        self.text = text
        self.place = 0
        self.rules = rules
        self.element_by_sign: dict[str, Callable[[bool, int], Sequence]] = {
            '"': self._literal,
            "[": self._set,
            "(": self._group,
            ".": self._any,
            "<": self._token,
            "!": self._token,
        }

    def skip(self, what: re.Pattern[str]) -> None:
        if (found := what.match(self.text, self.place)) is not None:
            self.place = found.end()

    def rule(self) -> None:
        number = self.rules.number(self._taken(_NAME, "the name of a rule"))
        self.skip(_SPACE)
        if not self.text.startswith("::=", self.place):
            raise self._unreadable("`::=`")
        self.place += 3
        self.skip(_SPACE_AND_LINES)
        self.rules.rules[number] = self._alternatives(is_nested=False, depth=0)
        if self.place < len(self.text) and self._sign() not in "\r\n":
            raise self._unreadable("a new line")
        self.skip(_SPACE_AND_LINES)

    def _alternatives(self, *, is_nested: bool, depth: int) -> list[Sequence]:
        if depth > DEPTH_MAX:
            raise GrammarSizeError(f"groups nested more than {DEPTH_MAX} deep")
        alternatives = [self._sequence(is_nested=is_nested, depth=depth)]
        while self._sign() == "|":
            self.place += 1
            self.skip(_SPACE_AND_LINES)
            alternatives.append(self._sequence(is_nested=is_nested, depth=depth))
        return alternatives

    def _sequence(self, *, is_nested: bool, depth: int) -> Sequence:
        done: list[Element] = []
        last: Sequence | None = None
        space = _SPACE_AND_LINES if is_nested else _SPACE
        while sign := self._sign():
            self.rules.read_count += 1
            if sign in "*+?{":
                if not last:
                    raise self._unreadable("something that can be repeated")
                last = self.rules.repeated(last, *self._times(sign))
            elif sign in self.element_by_sign or _NAME.match(sign):
                done += last or ()
                last = self.element_by_sign.get(sign, self._name)(is_nested, depth)
            else:
                break
            self.skip(space)
        done += last or ()
        self.rules.written_count += len(done)
        return tuple(done)

    def _times(self, sign: str) -> tuple[int, int | None]:
        if sign in _SIGNS:
            self.place += 1
            return _SIGNS[sign]
        found = _REPEAT.match(self.text, self.place)
        if found is None:
            raise self._unreadable("how often, in braces")
        self.place = found.end()
        least = int(found[1])
        return least, int(found[3]) if found[3] else None if found[2] else least

    def _literal(self, _is_nested: bool, _depth: int) -> Sequence:
        self.place += 1
        characters: list[Element] = []
        while self._sign() != '"':
            found = _PLAIN.match(self.text, self.place)
            if found is not None:
                characters += [((code, code),) for code in map(ord, found[0])]
                self.place = found.end()
                continue
            code = self._character()
            characters.append(((code, code),))
        self.place += 1
        return tuple(characters)

    def _set(self, _is_nested: bool, _depth: int) -> Sequence:
        self.place += 1
        is_negated = self._sign() == "^"
        self.place += is_negated
        ranges: list[tuple[int, int]] = []
        while self._sign() != "]":
            first = last = self._character()
            if self._sign() == "-" and self.text[self.place + 1 : self.place + 2] != "]":
                self.place += 1
                last = self._character()
            if last < first:  # which llama.cpp keeps, and nothing fits
                raise self._unreadable("a range that goes up")
            ranges.append((first, last))
        self.place += 1
        if not ranges:  # llama.cpp writes nothing for either
            return ()
        return (_others(ranges) if is_negated else tuple(ranges),)

    def _group(self, _is_nested: bool, depth: int) -> Sequence:
        self.place += 1
        self.skip(_SPACE_AND_LINES)
        number = self.rules.made()
        self.rules.rules[number] = self._alternatives(is_nested=True, depth=depth + 1)
        if self._sign() != ")":
            raise self._unreadable("`)`")
        self.place += 1
        return (number,)

    def _any(self, _is_nested: bool, _depth: int) -> Sequence:
        self.place += 1
        return (ANY,)

    def _token(self, _is_nested: bool, _depth: int) -> Sequence:
        self._taken(_TOKEN, "a token")
        return (ANY,)

    def _name(self, _is_nested: bool, _depth: int) -> Sequence:
        return (self.rules.number(self._taken(_NAME, "the name of a rule")),)

    def _character(self) -> int:
        sign = self._sign()
        if not sign:
            raise self._unreadable("the end of a literal or set")
        self.place += 1
        if sign != "\\":
            return ord(sign)
        kind = self._sign()
        self.place += 1
        if kind in _HEXADECIMAL:
            return int(self._taken(_HEXADECIMAL[kind], "hexadecimal digits"), 16)
        if kind not in _ESCAPES:
            raise self._unreadable("an escape that llama.cpp knows")
        return ord(_ESCAPES[kind])

    def _sign(self) -> str:
        return self.text[self.place : self.place + 1]

    def _taken(self, what: re.Pattern[str], called: str) -> str:
        found = what.match(self.text, self.place)
        if found is None:
            raise self._unreadable(called)
        self.place = found.end()
        return found[0]

    def _unreadable(self, wanted: str) -> GrammarUnreadableError:
        return GrammarUnreadableError(f"it does not read on as a grammar: {wanted} should stand at character {self.place}")


def _others(ranges: list[tuple[int, int]]) -> Ranges:
    """All characters but these."""
    others: list[tuple[int, int]] = []
    begin = 0
    for first, last in sorted(ranges):
        if first > begin:
            others.append((begin, first - 1))
        begin = max(begin, last + 1)
    if begin <= _CODE_MAX:
        others.append((begin, _CODE_MAX))
    return tuple(others)
