"""The README's fenced blocks and what their marks ask for.

A mark is the HTML comment on the line before a block:

    <!-- run -->                              in order, by bash or Python, in one folder and one environment
    <!-- run when a model is ready -->        the same, once the pool answers
    <!-- run in the background: NAME -->      until the test ends
    <!-- tested by tests/… -->                run by that test
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    mark: str
    language: str
    text: str


def blocks(document: Path) -> list[Block]:
    """Every fenced block of a Markdown file, in order."""
    return [Block(found["mark"] or "", found["language"], found["text"]) for found in _BLOCK.finditer(document.read_text())]
