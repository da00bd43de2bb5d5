"""What `potluck node doctor` says: levels, findings, and what its checks are given.

Decides the words and the exit code. It must not know the checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from potluck_node.domain.hardware import Card, Hardware, Network

GIB: Final = 2**30


class Level(StrEnum):
    """How bad it is."""

    OK = "OK"
    WARN = "WARN"
    """It works, but worse than it could, or it will not for long."""
    FAIL = "FAIL"
    """Something that the pool would use does not work."""


_EXIT_CODES: Final = {Level.OK: 0, Level.WARN: 1, Level.FAIL: 2}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line."""

    level: Level
    subject: str
    what: str
    fix: str = ""
    """A command or an action; with OK, how to learn more."""


@dataclass(frozen=True, slots=True)
class OwnerWord:
    """What only the owner, or the agent's own installation, can say."""

    power_supply_watts: int | None = None
    engine_kinds: frozenset[str] = frozenset()
    """The engines that this node can run."""
    group_allowed: bool = False
    """Whether this machine may be one of several that serve a model together, and so be reached by them."""


@dataclass(frozen=True, slots=True)
class Examination:
    """All that the checks are given."""

    hardware: Hardware
    network: Network | None
    """None: the node has not joined a pool."""
    owner: OwnerWord = OwnerWord()

    @property
    def live_cards(self) -> tuple[Card, ...]:
        """The cards that the driver reaches."""
        return tuple(card for card in self.hardware.cards if not card.lost)


Check = Callable[[Examination], tuple[Finding, ...]]


def exit_code(findings: Iterable[Finding]) -> int:
    """0 where all is well, 1 with a warning, 2 with a failure."""
    return max((_EXIT_CODES[finding.level] for finding in findings), default=0)


def card_subject(card: Card) -> str:
    """How a card is called in a line."""
    return f"card {card.index}"


def gib(size_bytes: int) -> str:
    """Such as "24.0 GiB"."""
    return f"{size_bytes / GIB:.1f} GiB"


def watts(power_milliwatts: int) -> str:
    """Such as "350 W"."""
    return f"{power_milliwatts / 1000:.0f} W"


def listed(words: Iterable[str]) -> str:
    """Such as "a, b and c", of one word at least."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def by_card(words: Mapping[int, str]) -> str:
    """What is the same is said once: "x16 (cards 0 and 1), x8 (card 2)"."""
    indexes: dict[str, list[str]] = {}
    for index, text in words.items():
        indexes.setdefault(text, []).append(str(index))
    return ", ".join(f"{text} ({'card' if len(cards) == 1 else 'cards'} {listed(cards)})" for text, cards in indexes.items())
