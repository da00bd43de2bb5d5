"""A page of metrics, in Prometheus's text format: read with bounds, and written.

Decides how much of a page is looked at. It may be anybody's, an attached server's too: of one that is endless, broken or full of nonsense
the rest is still read. Lines are taken apart here, each character once: prometheus_client's parser looks at the characters of a label's
value over and over, which for one of escaped quotes is thousands of times. It must not know what any metric means.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final

LINES_MAX: Final = 256
"""Of those that were asked for. An engine has one for each of its processes, and of some for each model."""
LINE_CHARACTERS_MAX: Final = 4_096
"""vLLM tells its whole cache's configuration in the labels of one."""
_NAME: Final = re.compile(r"([A-Za-z_:][\w:]*+)[ \t]*+(\{?)", re.ASCII)
# Possessive, so that what does not match is not tried again in other ways.
_LABEL: Final = re.compile(r'[ \t]*+([A-Za-z_]\w*+)[ \t]*+=[ \t]*+"((?:[^"\\]|\\.)*+)"[ \t]*+(?:,|(?=\}))', re.ASCII)
_LABELS_END: Final = re.compile(r"[ \t]*+\}")


@dataclass(frozen=True, slots=True)
class Sample:
    """What one line tells."""

    name: str
    labels: Mapping[str, str]
    value: float


def samples_of(page: str, names: Iterable[str]) -> list[Sample]:
    """The samples of these metrics; a line that does not parse costs itself only."""
    return [sample for line in islice(_lines(page, names), LINES_MAX) if (sample := _parsed(line)) is not None]


def page_of(numbers: Mapping[str, float | None]) -> str:
    """The page that tells these metrics; what is None is not in it."""
    return "".join(f"{name} {number!r}\n" for name, number in numbers.items() if number is not None)


def _lines(page: str, names: Iterable[str]) -> Iterator[str]:
    """The lines of these metrics, one after the other: engines tell thousands of histograms', and to parse those too takes very long."""
    wanted = "|".join(re.escape(name) for name in sorted(names))
    return (found.group() for found in re.finditer(rf"^(?:{wanted})[{{ ][^\n]{{0,{LINE_CHARACTERS_MAX}}}$", page, re.MULTILINE))


def _parsed(line: str) -> Sample | None:
    """A name, labels where there are any, a number, and perhaps when that was; None for anything else."""
    named = _NAME.match(line)
    if named is None:
        return None
    labels: dict[str, str] | None = {}
    position = named.end()
    if named[2]:
        labels, position = _labels(line, position)
    try:
        value, *_time = map(_number, line[position:].split())
    except ValueError:
        return None
    return None if labels is None or len(_time) > 1 else Sample(named[1], labels, value)


def _labels(line: str, position: int) -> tuple[dict[str, str] | None, int]:
    """Those from this position on, and the position behind them; None where they are no labels, or one is there twice."""
    labels: dict[str, str] = {}
    while (label := _LABEL.match(line, position)) is not None:
        if label[1] in labels:
            return None, position
        labels[label[1]] = "\\".join(part.replace('\\"', '"').replace("\\n", "\n") for part in label[2].split("\\\\"))
        position = label.end()
    end = _LABELS_END.match(line, position)
    return (None, position) if end is None else (labels, end.end())


def _number(word: str) -> float:
    """Raises ValueError. Python's own digit groups are none of this format's."""
    if "_" in word:
        raise ValueError(word)
    return float(word)
