"""Whether this machine serves now, for how long not, and why: the owner's word over a node.

Decides from what the owner said, their hours, whether they use the machine, who else came to a card, and what other policies (heat) ask
for. The strictest reason wins; all are kept, for the owner to read. It must not know clocks, files, cards or engines: `resting` gathers the
facts, keeps what a decision has to remember, and carries the decision out.

What can flap waits: a card counts as taken from `TAKEN_BYTES` on and as left only below `LEFT_BYTES`, or what was held of it before, for
`LEFT_SECONDS` without a break. A look that tells nothing is made up for by the last one, for a while.
Hours do not flap: their edges are instants. Nor do idle minutes: they are counted from the last use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, tzinfo
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from potluck_node.domain.hours import Window, opening
from potluck_protocol.rest import RestCause

GIB: Final = 1 << 30
TAKEN_BYTES: Final = 2 * GIB
"""Of a card by programs that are not ours: a desktop with its browser holds about one, a game, a renderer or a training run holds more."""
LEFT_BYTES: Final = GIB
"""Below the other bound, so that a program at the edge of it does not start and stop engines."""
EDGE_BYTES: Final = GIB // 4
"""A card whose desktop alone holds much is as free as it can be once others hold hardly more than they did before: by less than so much,
and still by so much below what takes a card."""
LEFT_SECONDS: Final = 60.0
"""How long a card has to stay free: games load the next level, and a training run starts its next step."""
USE_KEPT_SECONDS: Final = 30.0
"""A session that ends while it is looked at, or a logind that starts anew, is over long before."""
WORD_KEPT_SECONDS: Final = 10.0
"""A file that cannot be opened for once, as where a process has too many open, says nothing new."""
RESUME_COMMAND: Final = "potluck node resume"


class Posture(StrEnum):
    """What the node does with requests."""

    SERVE = "serve"
    FINISH = "finish"
    """Take no more; answers under way go on to their end, within the owner's limit. Then as HAND_OVER."""
    HAND_OVER = "hand_over"
    """Take no more, let others continue what is under way, and give memory and cards back."""


STRICTNESS: Final = {Posture.SERVE: 0, Posture.FINISH: 1, Posture.HAND_OVER: 2}


@dataclass(frozen=True, slots=True)
class Reason:
    """Why the node does not serve, or not fully."""

    cause: RestCause
    posture: Posture
    words: str
    """For the owner, as the rest of a sentence that begins with the node."""
    until_unix_ms: int | None = None
    """When it ends by itself; None: nobody knows."""


@dataclass(frozen=True, slots=True)
class Word:
    """What the owner said last."""

    posture: Posture = Posture.SERVE
    until_unix_ms: int | None = None
    """From then on it counts no more; None: until the next word."""
    first_run: bool = False
    """It was not said but assumed: this machine has not served yet."""
    is_unreadable: bool = False
    """Something was said, and nobody can tell what."""


NO_WORD: Final = Word()
FIRST_WORD: Final = Word(Posture.HAND_OVER, first_run=True)
"""Of a machine that has just joined: its owner has not yet said that it is to serve."""
UNREADABLE_WORD: Final = Word(Posture.HAND_OVER, is_unreadable=True)
"""It may have been a pause: nobody's machine works against their word."""


@dataclass(frozen=True, slots=True)
class Use:
    """When the owner's hands were last on the machine, as far as that can be told."""

    idle_seconds: float | None = None
    """Since then; None: it cannot be told."""
    words: str = ""
    """By what it is told, or why it cannot be."""


@dataclass(frozen=True, slots=True)
class CardUse:
    """One card as others use it."""

    uuid: str
    foreign_bytes: int | None
    """Held by programs that are not this node's; None: it cannot be told now."""
    ours: bool
    """An engine of this node was given the card."""
    program_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rules:
    """The owner's settings that matter here."""

    hours: tuple[Window, ...] = ()
    """Empty: at all hours."""
    idle_minutes: int | None = None
    """None: also while the machine is in use."""
    zone: tzinfo = UTC
    others_expected: bool = False
    """The owner shares a server of their own, which holds memory of cards on purpose: only what comes beside it counts."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known now."""

    word: Word = NO_WORD
    use: Use = Use()
    cards: tuple[CardUse, ...] = ()
    others: tuple[Reason, ...] = ()
    """Of other policies."""


@dataclass(frozen=True, slots=True)
class Moment:
    """One instant on both clocks: dates by the one, durations by the other."""

    unix_ms: int
    monotonic_seconds: float


@dataclass(frozen=True, slots=True)
class TakenCard:
    """A card that another program came to while an engine of ours was there."""

    left_since_seconds: float | None = None
    """Since when it is seen free again without a break."""
    expected_bytes: int = 0
    left_bytes: int = LEFT_BYTES
    """Beside those: who holds less has left."""


@dataclass(frozen=True, slots=True)
class Held:
    """The least that others held of a card, beside what is expected, in this minute and in the one before."""

    least_bytes: int
    since_seconds: float
    least_before_bytes: int | None = None
    """None: there was none before."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What one decision has to know of those before it."""

    taken: Mapping[str, TakenCard] = field(default_factory=lambda: MappingProxyType({}))
    """By the cards' uuids."""
    expected_bytes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """What others held of a card while no engine of ours was there, where `others_expected`."""
    held: Mapping[str, Held] = field(default_factory=lambda: MappingProxyType({}))
    """Of cards that are not taken."""
    use: Use = Use()
    """The last that told anything."""
    use_at_seconds: float = 0.0
    word: Word = UNREADABLE_WORD
    """The last that could be read."""
    word_at_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Rest:
    """The decision."""

    posture: Posture = Posture.SERVE
    reasons: tuple[Reason, ...] = ()
    """The strictest first."""
    until_unix_ms: int | None = None
    """Not before then does the node serve again; None where nobody knows."""


SERVING: Final = Rest()


def decide(rules: Rules, facts: Facts, memory: Memory, now: Moment) -> tuple[Rest, Memory]:
    """What the node does now, and what the next decision has to remember."""
    memory = _after_telling(_after_look(rules, facts.cards, memory, now.monotonic_seconds), facts, now.monotonic_seconds)
    found = (
        *reasons_of_word(_word_now(memory, facts.word, now.monotonic_seconds), now.unix_ms),
        *_by_hours(rules, now.unix_ms),
        *_by_use(rules, _use_now(memory, facts.use, now.monotonic_seconds), now.unix_ms),
        *_by_programs(facts.cards, memory, now),
        *(reason for reason in facts.others if reason.posture is not Posture.SERVE),
    )
    reasons = tuple(sorted(found, key=lambda reason: -STRICTNESS[reason.posture]))
    if not reasons:
        return SERVING, memory
    ends = [reason.until_unix_ms for reason in reasons]
    until_unix_ms = None if None in ends else max(end for end in ends if end is not None)
    return Rest(reasons[0].posture, reasons, until_unix_ms), memory


def reasons_of_word(word: Word, now_unix_ms: int) -> tuple[Reason, ...]:
    """What the owner's word alone asks for; nothing once its time is over."""
    if word.posture is Posture.SERVE or (word.until_unix_ms is not None and now_unix_ms >= word.until_unix_ms):
        return ()
    if word.first_run:
        return (Reason(RestCause.FIRST_RUN, word.posture, f"has not served yet, and begins with `{RESUME_COMMAND}`"),)
    if word.is_unreadable:
        words = f"cannot read what its owner said last (control.json in its state folder), until `{RESUME_COMMAND}`"
        return (Reason(RestCause.OWNER, word.posture, words),)
    said = "pause" if word.posture is Posture.HAND_OVER else "finish"
    words = f"was told to {said}" + ("" if word.until_unix_ms is not None else f", until `{RESUME_COMMAND}`")
    return (Reason(RestCause.OWNER, word.posture, words, word.until_unix_ms),)


def _by_hours(rules: Rules, now_unix_ms: int) -> tuple[Reason, ...]:
    found = opening(rules.hours, now_unix_ms, rules.zone)
    if found.is_open:
        return ()
    # Nobody waits for the machine at that second, as they do who sit before it.
    return (Reason(RestCause.HOURS, Posture.FINISH, "is outside its hours", found.until_unix_ms),)


def _by_use(rules: Rules, use: Use, now_unix_ms: int) -> tuple[Reason, ...]:
    if rules.idle_minutes is None:
        return ()
    if use.idle_seconds is None:
        words = f"cannot tell whether somebody uses the machine ({use.words or 'nothing says so'}), and serves only while nobody does"
        return (Reason(RestCause.IN_USE, Posture.FINISH, f"{words}: take idle_minutes out of its settings to serve all the same"),)
    left_seconds = rules.idle_minutes * 60 - use.idle_seconds
    if left_seconds <= 0:
        return ()
    by = f" ({use.words})" if use.words else ""
    words = f"was used by its owner less than {rules.idle_minutes} min ago{by}"
    return (Reason(RestCause.IN_USE, Posture.HAND_OVER, words, now_unix_ms + round(left_seconds * 1000)),)


def _by_programs(cards: tuple[CardUse, ...], memory: Memory, now: Moment) -> tuple[Reason, ...]:
    looked_at = {card.uuid: card for card in cards}
    return tuple(_taken_words(uuid, looked_at.get(uuid), memory.taken[uuid], now) for uuid in sorted(memory.taken))


def _taken_words(uuid: str, card: CardUse | None, taken: TakenCard, now: Moment) -> Reason:
    if taken.left_since_seconds is not None:
        left_seconds = LEFT_SECONDS - (now.monotonic_seconds - taken.left_since_seconds)
        words = f"waits {LEFT_SECONDS:.0f} s for another program that left card {uuid} to stay away"
        return Reason(RestCause.OTHER_PROGRAM, Posture.HAND_OVER, words, now.unix_ms + round(left_seconds * 1000))
    held = "" if card is None or card.foreign_bytes is None else f" {card.foreign_bytes / GIB:.1f} GiB of"
    names = f" ({', '.join(card.program_names)})" if card is not None and card.program_names else ""
    return Reason(RestCause.OTHER_PROGRAM, Posture.HAND_OVER, f"gives way to another program{names}, which holds{held} card {uuid}")


def _after_look(rules: Rules, cards: tuple[CardUse, ...], memory: Memory, now_seconds: float) -> Memory:
    looked_at = {card.uuid: card for card in cards}
    expected, held = dict(memory.expected_bytes), dict(memory.held)
    for card in cards:
        if rules.others_expected and card.foreign_bytes is not None and not card.ours and card.uuid not in memory.taken:
            expected[card.uuid] = card.foreign_bytes
    taken: dict[str, TakenCard] = {}
    for uuid, before in memory.taken.items():
        after = _still_taken(before, looked_at.get(uuid), now_seconds)
        if after is not None:
            taken[uuid] = after
    for card in cards:
        if card.uuid in memory.taken or card.foreign_bytes is None:
            continue
        beside_bytes = card.foreign_bytes - expected.get(card.uuid, 0)
        if card.ours and beside_bytes >= TAKEN_BYTES:
            left_bytes = _left_bytes(held.pop(card.uuid, None))
            taken[card.uuid] = TakenCard(expected_bytes=expected.get(card.uuid, 0), left_bytes=left_bytes)
        else:
            held[card.uuid] = _held(held.get(card.uuid), beside_bytes, now_seconds)
    return replace(memory, taken=MappingProxyType(taken), expected_bytes=MappingProxyType(expected), held=MappingProxyType(held))


def _held(before: Held | None, beside_bytes: int, now_seconds: float) -> Held:
    if before is None:
        return Held(beside_bytes, now_seconds)
    if now_seconds - before.since_seconds >= LEFT_SECONDS:
        return Held(beside_bytes, now_seconds, before.least_bytes)
    return replace(before, least_bytes=min(before.least_bytes, beside_bytes))


def _left_bytes(held: Held | None) -> int:
    """Below which a card that is taken now will have been left. A program takes less than a minute to take what it needs."""
    if held is None:
        return LEFT_BYTES
    before_bytes = held.least_bytes if held.least_before_bytes is None else held.least_before_bytes
    return max(LEFT_BYTES, min(before_bytes + EDGE_BYTES, TAKEN_BYTES - EDGE_BYTES))


def _still_taken(taken: TakenCard, card: CardUse | None, now_seconds: float) -> TakenCard | None:
    """None once it has been free for long enough. A card that is not there any more is nobody's; one that tells nothing is as it was."""
    if card is not None and card.foreign_bytes is None:
        return taken
    if card is not None and card.foreign_bytes is not None and card.foreign_bytes - taken.expected_bytes >= taken.left_bytes:
        return replace(taken, left_since_seconds=None)
    since_seconds = now_seconds if taken.left_since_seconds is None else taken.left_since_seconds
    return None if now_seconds - since_seconds >= LEFT_SECONDS else replace(taken, left_since_seconds=since_seconds)


def _after_telling(memory: Memory, facts: Facts, now_seconds: float) -> Memory:
    if facts.use.idle_seconds is not None:
        memory = replace(memory, use=facts.use, use_at_seconds=now_seconds)
    return memory if facts.word.is_unreadable else replace(memory, word=facts.word, word_at_seconds=now_seconds)


def _word_now(memory: Memory, word: Word, now_seconds: float) -> Word:
    return memory.word if word.is_unreadable and now_seconds - memory.word_at_seconds <= WORD_KEPT_SECONDS else word


def _use_now(memory: Memory, use: Use, now_seconds: float) -> Use:
    """As it is told; where nothing tells just now, the last that did, with what has passed since."""
    passed_seconds = now_seconds - memory.use_at_seconds
    if use.idle_seconds is not None or memory.use.idle_seconds is None or passed_seconds > USE_KEPT_SECONDS:
        return use
    return replace(memory.use, idle_seconds=memory.use.idle_seconds + passed_seconds)
