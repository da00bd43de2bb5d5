"""How much of a peer's words is taken.

Decides the bounds of names, lists and counts: what a node says of itself is kept and shown to everyone, so a word that is not in an enum, a
name or a list longer than one node needs, is refused with INVALID_REQUEST, never turned into a wrong value. It must not know messages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from enum import StrEnum

TEXT_CHARACTERS_MAX: Final = 256
"""Of an id, a name or a version."""
CATALOGUE_CHARACTERS_MAX: Final = 256 * 1024
"""Of a catalogue file's text: some hundred models."""
REPLICAS_MAX: Final = 10_000
"""Of one deployment."""

_Word = TypeVar("_Word", bound="StrEnum")
_Item = TypeVar("_Item")


def word(numbers: Mapping[_Word, int], number: int, field: str) -> _Word:
    """The word of an enum's number."""
    for known, its_number in numbers.items():
        if its_number == number:
            return known
    raise PotluckError(ErrorCode.INVALID_REQUEST, f"{field} has the unknown value {number}", param=field)


def text(value: str, field: str) -> str:
    """A short text without control characters."""
    if len(value) > TEXT_CHARACTERS_MAX:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"{field} has more than {TEXT_CHARACTERS_MAX} characters", param=field)
    return printable(value)


def count(value: int, field: str) -> int:
    """How many of something there are: not less than none."""
    if value < 0:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"{field} is {value}, and cannot be negative", param=field)
    return value


def printable(value: str, kept: str = "") -> str:
    """A peer's words are shown on other people's terminals: what would act there becomes a blank."""
    return value if value.isprintable() else "".join(letter if letter.isprintable() or letter in kept else " " for letter in value)


def items(values: Sequence[_Item], count_max: int, field: str) -> Sequence[_Item]:
    """A list of no more items than that."""
    if len(values) > count_max:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"{field} has more than {count_max} items", param=field)
    return values
