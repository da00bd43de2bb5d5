"""Things in the order of a number of seconds, roughly, where finding the least costs the same however many there are.

Decides that two things whose seconds differ by less than 2 % are equal, and gives equals in an order drawn by chance. It is a row of
buckets, each wider than the last by that much, and one number whose bits say which of them hold anything; adding, taking out and drawing
look at one bucket. It must not know what is ordered. Like a `dict`, it changes; it knows no clock, and chance is passed in.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

BUCKET_RATIO: Final = 1.02
SECONDS_MIN: Final = 1e-3
"""Less is as good as this."""
BUCKETS_MAX: Final = 1024
"""The last one begins at some twenty days, and holds everything beyond."""
_LOG_RATIO: Final = math.log(BUCKET_RATIO)

_Thing = TypeVar("_Thing", bound="Hashable")


def bucket_of(seconds: float) -> int:
    """Which bucket so many seconds fall into."""
    return min(int(math.log(seconds / SECONDS_MIN) / _LOG_RATIO), BUCKETS_MAX - 1) if seconds > SECONDS_MIN else 0


class DrainOrder(Generic[_Thing]):
    """Each thing once."""

    __slots__ = ("_buckets", "_filled", "_places")

    def __init__(self) -> None:
        self._buckets: dict[int, list[_Thing]] = {}
        self._filled = 0
        """Bit b is set where bucket b holds anything."""
        self._places: dict[_Thing, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def put(self, thing: _Thing, seconds: float) -> None:
        """Adds it, or moves it to where it belongs now."""
        number, place = bucket_of(seconds), self._places.get(thing)
        if place is not None:
            if place[0] == number:
                return
            self.drop(thing)
        bucket = self._buckets.setdefault(number, [])
        self._filled |= 1 << number
        self._places[thing] = (number, len(bucket))
        bucket.append(thing)

    def drop(self, thing: _Thing) -> None:
        """Takes it out; again is harmless."""
        place = self._places.pop(thing, None)
        if place is None:
            return
        number, index = place
        bucket = self._buckets[number]
        last = bucket.pop()
        if index < len(bucket):
            bucket[index] = last
            self._places[last] = place
        elif not bucket:
            del self._buckets[number]
            self._filled &= ~(1 << number)

    def least(self) -> int:
        """The first bucket that holds anything; `BUCKETS_MAX` where none does."""
        return (self._filled & -self._filled).bit_length() - 1 if self._filled else BUCKETS_MAX

    def ascending(self, chance: Callable[[], float]) -> Iterator[tuple[int, _Thing]]:
        """Everything with its bucket, the least first and equals by chance; costs what is taken of it.

        Args:
            chance: a number in [0, 1).
        """
        filled = self._filled
        while filled:
            lowest = filled & -filled
            filled ^= lowest
            number = lowest.bit_length() - 1
            bucket = self._buckets[number]
            # Beginning anywhere and going round: as even as shuffling for whoever takes one, and free.
            begin = int(chance() * len(bucket))
            for index in range(len(bucket)):
                yield number, bucket[(begin + index) % len(bucket)]

    def any(self, chance: float) -> _Thing:
        """One of the first bucket that holds anything, by chance; there is one."""
        bucket = self._buckets[self.least()]
        return bucket[int(chance * len(bucket))]
