"""Checks of the cards themselves: there at all, heat, clocks, memory, faults.

Decides what is too hot, too slow or too full. A power cap at work is how a capped card works, and no alarm. What a driver does not tell is
not judged, and said to be so.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from potluck_node.domain.findings import (
    GIB,
    Examination,
    Finding,
    Level,
    by_card,
    card_subject,
    gib,
    limit_milliwatts,
    limit_words,
    listed,
    watts,
)
from potluck_node.domain.hardware import Card, CardProcess, ThrottleReason, foreign_bytes
from potluck_node.domain.thermal import HEADROOM_CELSIUS
from potluck_node.domain.thermal_ladder import CAP_SHARES
from potluck_node.domain.xid import meaning

FOREIGN_BYTES: Final = GIB
"""Held by others before it is worth a word; a desktop alone holds about half of it."""
PROCESSES_NAMED: Final = 3
USUAL_LIMIT_MILLIWATTS: Final = 350_000
"""Of a 3090."""

_SLOWED: Final = {
    ThrottleReason.HARDWARE_THERMAL: (Level.FAIL, "by its own protection against heat"),
    ThrottleReason.SOFTWARE_THERMAL: (Level.WARN, "by the driver, against heat"),
    ThrottleReason.POWER_BRAKE: (Level.FAIL, "by the power supply's brake signal"),
    ThrottleReason.HARDWARE_SLOWDOWN: (Level.FAIL, "by its own protection"),
}
"""The gravest that applies is told; the last says only that one of the others does, or none that has a name."""
CAP_STEP_WATTS: Final = 10
_SLOWED_FIXES: Final = {
    ThrottleReason.POWER_BRAKE: "check its power cables, one for each socket, and the power supply",
    ThrottleReason.HARDWARE_SLOWDOWN: "check its power cables and its heat",
}


def check_presence(examination: Examination) -> tuple[Finding, ...]:
    """One line for each card."""
    if examination.hardware.driver.absence is None and not examination.hardware.cards:
        return (Finding(Level.WARN, "cards", "the driver shows no card: this is a CPU node", "reseat the cards, then: nvidia-smi -L"),)
    return tuple(_presence(card) for card in examination.hardware.cards)


def check_heat(examination: Examination) -> tuple[Finding, ...]:
    """Cards near the temperature at which they slow down by themselves."""
    cards = examination.live_cards
    bad = [finding for card in cards if (finding := _heat_fault(card)) is not None]
    if unknown := {card.index: _unjudged_heat(card) for card in cards if _headroom_celsius(card) is None}:
        what = f"not judged, for want of the driver's word: {by_card(unknown)}"
        bad.append(Finding(Level.WARN, "heat", what, "nvidia-smi -q -d TEMPERATURE"))
    if bad or not cards:
        return tuple(bad)
    return (Finding(Level.OK, "heat", by_card({card.index: _heat_words(card) for card in cards})),)


def check_clocks(examination: Examination) -> tuple[Finding, ...]:
    """Cards that are slowed down now, by anything but their power cap."""
    cards = examination.live_cards
    bad = [finding for card in cards if (finding := _clock_fault(card)) is not None]
    if unknown := {card.index: "what slows it down" for card in cards if card.reading.throttle_reasons is None}:
        bad.append(Finding(Level.WARN, "clocks", f"the driver does not tell {by_card(unknown)}", "nvidia-smi -q -d PERFORMANCE"))
    if bad or not cards:
        return tuple(bad)
    capped = [card for card in cards if ThrottleReason.POWER_CAP in (card.reading.throttle_reasons or ())]
    if not capped:
        return (Finding(Level.OK, "clocks", "no card is slowed down"),)
    caps = by_card({card.index: limit_words(card) for card in capped})
    return (Finding(Level.OK, "clocks", f"at the power cap, as they should be under load: {caps}"),)


def check_foreign_memory(examination: Examination) -> tuple[Finding, ...]:
    """Memory of the cards that programs other than this node's hold."""
    cards = examination.live_cards
    held = {card.index: foreign_bytes(card.reading.memory_used_bytes, card.processes, engine_here=card.engine_here) for card in cards}
    bad = [_foreign_fault(examination, card, size) for card in cards if (size := held[card.index]) is not None and size >= FOREIGN_BYTES]
    bad += _unknown_holders([card for card in cards if held[card.index] is None])
    if bad or not cards:
        return tuple(bad)
    return (Finding(Level.OK, "vram", f"others hold {gib(max(size or 0 for size in held.values()))} of a card at most"),)


def check_faults(examination: Examination) -> tuple[Finding, ...]:
    """Faults that the kernel's log holds."""
    xids = examination.hardware.xids
    if not examination.hardware.cards:
        return ()
    if xids is None:
        return (Finding(Level.OK, "faults", "not looked at: the kernel's log may not be read by you", "sudo dmesg | grep -i xid"),)
    if not xids:
        return (Finding(Level.OK, "faults", "none since the machine was started"),)
    indexes = {card.identity.bus_id: card.index for card in examination.hardware.cards if card.identity.bus_id is not None}
    findings = []
    for event, count in sorted(Counter(xids).items(), key=lambda item: (item[0].bus_id or "", item[0].xid)):
        said = meaning(event.xid)
        subject = f"card {indexes[event.bus_id]}" if event.bus_id in indexes else f"bus {(event.bus_id or 'unknown').removeprefix('0000:')}"
        times = "once" if count == 1 else f"{count} times"
        level = Level.FAIL if said.of_hardware else Level.WARN
        findings.append(Finding(level, subject, f"Xid {event.xid}, {times} since the machine was started: {said.what}", said.fix))
    return tuple(findings)


def _presence(card: Card) -> Finding:
    if card.lost:
        what = "lost: the driver no longer reaches it"
        return Finding(Level.FAIL, card_subject(card), what, "check its power cables and riser, then restart the machine")
    identity = card.identity
    words = [identity.name or "a card without a name"]
    if identity.memory_bytes is not None:
        words.append(gib(identity.memory_bytes))
    if identity.compute_capability is not None:
        words.append(f"compute capability {identity.compute_capability}")
    if (limit := limit_milliwatts(card)) is not None:
        lowest, highest = identity.power_limit_min_milliwatts, identity.power_limit_max_milliwatts
        allowed = "" if lowest is None or highest is None else f" ({watts(lowest)} to {watts(highest)} allowed)"
        words.append(f"limit {watts(limit)}{allowed}")
    return Finding(Level.OK, card_subject(card), ", ".join(words))


def _headroom_celsius(card: Card) -> int | None:
    """How far the card is from slowing down by itself; newer cards tell it as such, and no threshold."""
    celsius, slowdown = card.reading.temperature_celsius, card.identity.slowdown_celsius
    return card.reading.thermal_margin_celsius if celsius is None or slowdown is None else slowdown - celsius


def _heat_words(card: Card) -> str:
    celsius, slowdown = card.reading.temperature_celsius, card.identity.slowdown_celsius
    if celsius is not None and slowdown is not None:
        return f"{celsius} °C, it slows down at {slowdown} °C"
    margin = f"{card.reading.thermal_margin_celsius} °C below where it slows down"
    return margin if celsius is None else f"{celsius} °C, {margin}"


def _unjudged_heat(card: Card) -> str:
    celsius = card.reading.temperature_celsius
    return "no temperature" if celsius is None else f"{celsius} °C, but not where it slows down"


def _heat_fault(card: Card) -> Finding | None:
    headroom = _headroom_celsius(card)
    if headroom is None or headroom >= HEADROOM_CELSIUS:
        return None
    return Finding(Level.WARN if headroom > 0 else Level.FAIL, card_subject(card), _heat_words(card), _cooling(card))


def _clock_fault(card: Card) -> Finding | None:
    for reason, (level, words) in _SLOWED.items():
        if reason in (card.reading.throttle_reasons or ()):
            clock, best = card.reading.clock_sm_mhz, card.identity.clock_sm_max_mhz
            speed = "" if clock is None or best is None else f", to {clock} of {best} MHz"
            return Finding(level, card_subject(card), f"slowed down {words}{speed}", _SLOWED_FIXES.get(reason) or _cooling(card))
    return None


def _cooling(card: Card) -> str:
    limit, made_for, lowest = (
        limit_milliwatts(card),
        card.identity.power_limit_default_milliwatts or USUAL_LIMIT_MILLIWATTS,
        card.identity.power_limit_min_milliwatts or 0,
    )
    for share in CAP_SHARES:
        cap_watts = round(made_for * share / 1000 / CAP_STEP_WATTS) * CAP_STEP_WATTS
        if lowest <= cap_watts * 1000 and (limit is None or cap_watts * 1000 < limit):
            return f"clean fans and filters, give it air, or cap it: sudo nvidia-smi -i {card.index} -pl {cap_watts}"
    return "clean fans and filters, and give it air"


def _foreign_fault(examination: Examination, card: Card, held_bytes: int) -> Finding:
    total = "" if card.identity.memory_bytes is None else f" of {gib(card.identity.memory_bytes)}"
    what = f"others hold {gib(held_bytes)}{total}: {_process_words(card.processes or ())}"
    fix = "close them" if examination.network is None else "close them, or run `potluck node pause` while you use the card"
    if "attach" in examination.owner.engine_kinds:
        fix = f"leave the server that you share, and {fix}"
    return Finding(Level.WARN, card_subject(card), what, fix)


def _unknown_holders(cards: list[Card]) -> list[Finding]:
    untold = [card for card in cards if card.reading.memory_used_bytes is None]
    hidden = [card for card in cards if card.reading.memory_used_bytes is not None and not _may_hold_nothing_yet(card)]
    early = [card for card in cards if card.reading.memory_used_bytes is not None and _may_hold_nothing_yet(card)]
    findings = []
    if untold:
        what = f"the driver does not tell {by_card({card.index: 'how much is in use' for card in untold})}"
        findings.append(Finding(Level.WARN, "vram", what, "nvidia-smi -q -d MEMORY"))
    if hidden:
        which = by_card({card.index: "the driver does not show what this node's engine holds" for card in hidden})
        fix = "in a container, start it with --pid=host; else nvidia-smi shows all"
        findings.append(Finding(Level.WARN, "vram", f"what others hold is not known: {which}", fix))
    if early:
        which = by_card({card.index: "this node's engine starts or ends there, and the driver shows nothing of it" for card in early})
        findings.append(Finding(Level.OK, "vram", f"what others hold is not known yet: {which}", "look again when it is ready"))
    return findings


def _may_hold_nothing_yet(card: Card) -> bool:
    """Whether the driver may show no memory of our engine because there is none: it still reads its own code, or has ended."""
    return card.engine_here and not card.engine_serves and not any(process.own for process in card.processes or ())


def _process_words(processes: tuple[CardProcess, ...]) -> str:
    foreign = sorted((process for process in processes if not process.own), key=lambda process: -(process.memory_bytes or 0))
    if not foreign:
        return "processes that are not shown here, as of other containers"
    words = [f"{process.name} (pid {process.pid})" if process.name else f"pid {process.pid}" for process in foreign[:PROCESSES_NAMED]]
    more_count = len(foreign) - len(words)
    return listed([*words, f"{more_count} more"] if more_count else words)
