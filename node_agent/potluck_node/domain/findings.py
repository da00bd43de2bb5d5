"""What `potluck node doctor` says: levels, findings, and what its checks are given.

Decides the words and the exit code. It must not know the checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from potluck_node.domain.hardware import Card, Hardware, Network

GIB: Final = 2**30


class Level(StrEnum):
    """How bad it is."""

    OK = "OK"
    WARN = "WARN"
    """It works, but worse than it could, or it will not for long; or nobody can tell, though drivers mostly do."""
    FAIL = "FAIL"
    """Something that the pool would use does not work."""


class CapRight(StrEnum):
    """By what this user may cap the power of cards."""

    ROOT = "root"
    PROGRAM = "program"
    """The owner's, which sudo starts as root without a word."""
    UNSAFE = "unsafe"
    """The same, but others than root may put something else in its place."""
    NONE = "none"


_EXIT_CODES: Final = {Level.OK: 0, Level.WARN: 1, Level.FAIL: 2}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line."""

    level: Level
    subject: str
    what: str
    fix: str = ""
    """A command or an action; with OK, how to learn more."""
    check: str = ""
    """Which of `doctor.CHECKS` says so, for programs: the other words may change."""


@dataclass(frozen=True, slots=True)
class OwnerWord:
    """What only the owner, or the agent's own installation, can say."""

    power_supply_watts: int | None = None
    engine_kinds: frozenset[str] = frozenset()
    """The engines that this node can run."""
    engine_kinds_named: frozenset[str] = frozenset()
    """Those whose environment the settings name, so that none which is installed counts."""
    engine_failure: str = ""
    """Why it is not known which those are: the owner names an environment that has no engine."""
    engine_cuda_versions: Mapping[str, str | None] = field(default_factory=dict)
    """By kind, of the engines in environments of their own: the CUDA they were built for, such as "13.0"; empty: they compute without;
    None: the environment does not tell."""
    group_allowed: bool = False
    """Whether this machine may be one of several that serve a model together, and so be reached by them."""
    group_address: str = ""
    """Where they reach it, if so."""
    group_ports: tuple[int, ...] = ()
    group_failure: str = ""
    """Why an agent with these settings would refuse to start: what they say of groups is half said, or names a public address."""
    power_limit_watts: int | None = None
    cap_right: CapRight | None = None
    """None: not looked at."""
    cap_right_command: str = ""
    """What gives the right, or gives it anew."""


@dataclass(frozen=True, slots=True)
class AgentSeen:
    """What is seen of the agent on this machine, from outside of it."""

    running: bool = False
    damage: str = ""
    """Why it cannot be its pool's node: what it keeps of itself is damaged, or hidden from who looks."""
    damage_fix: str = ""


@dataclass(frozen=True, slots=True)
class Examination:
    """All that the checks are given."""

    hardware: Hardware
    network: Network | None
    """None: the node has not joined a pool, or cannot tell which."""
    owner: OwnerWord = OwnerWord()
    agent: AgentSeen = AgentSeen()

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


def limit_milliwatts(card: Card) -> int | None:
    """The one in force, or the one it was made with."""
    if card.reading.power_limit_milliwatts is not None:
        return card.reading.power_limit_milliwatts
    return card.identity.power_limit_default_milliwatts


def limit_words(card: Card) -> str:
    """Such as "280 W"."""
    limit = limit_milliwatts(card)
    return "an unknown limit" if limit is None else watts(limit)


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
