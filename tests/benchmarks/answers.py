"""Reads an answer's tokens: their numbers and stamps, or the text of an engine without stamps.

Decides when an answer is whole: it ends as it should, and has every token once and in order. Pure.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tests.benchmarks.load import Load, LoadFailedError

_TOKEN: Final = re.compile(rb" (\d+):(\d+)(?=[\" ])")
"""A stamped token within the text of a chunk."""
_DONE: Final = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Token:
    """One token as it came."""

    number: int
    sent_at_seconds: float
    came_at_seconds: float
    """Both by CLOCK_MONOTONIC."""


def tokens_of(pieces: Sequence[tuple[float, bytes]]) -> list[Token]:
    """The tokens of a streamed answer that came in these pieces, each with the moment at which it came."""
    ends, length = [], 0
    for _, data in pieces:
        length += len(data)
        ends.append(length)
    found = _TOKEN.finditer(b"".join(data for _, data in pieces))
    return [Token(int(match[1]), int(match[2]) / 1e9, pieces[bisect_left(ends, match.end())][0]) for match in found]


def check_numbers(numbers: Sequence[int], token_count: int) -> None:
    """Raises LoadFailedError unless every token came, once and in order."""
    if list(numbers) != list(range(token_count)):
        wrong = next((index for index, number in enumerate(numbers) if number != index), len(numbers))
        raise LoadFailedError(f"an answer of {token_count} tokens came as {len(numbers)}, wrong from number {wrong} on")


def check_streamed(load: Load, pieces: Sequence[tuple[float, bytes]]) -> list[Token]:
    """The tokens of a streamed answer; raises LoadFailedError where it is not whole."""
    body = b"".join(data for _, data in pieces)
    if not ended(body):
        raise LoadFailedError(f"a stream ended without [DONE]: {body[-300:].decode(errors='replace')}")
    tokens = tokens_of(pieces)
    check_numbers([token.number for token in tokens], load.token_count)
    return tokens


def ended(body: bytes) -> bool:
    """Whether a streamed answer said that it is over."""
    return body.rstrip().endswith(_DONE)


def check_whole(load: Load, body: bytes) -> None:
    """Raises LoadFailedError unless an answer in one piece has every token."""
    try:
        text = str(json.loads(body)["choices"][0]["message"]["content"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise LoadFailedError(f"not an answer: {body[:300].decode(errors='replace')}") from error
    check_numbers([int(token.split(":")[0]) for token in text.split()], load.token_count)
