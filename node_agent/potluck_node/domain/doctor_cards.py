"""Checks of the cards themselves: there at all, heat, clocks, power, memory, faults.

Decides what is too hot, too hungry or too full. A power cap at work is how a capped card works, and no alarm.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Final

from potluck_node.domain.findings import GIB, Examination, Finding, Level, by_card, card_subject, gib, listed, watts
from potluck_node.domain.hardware import Card, CardProcess, ThrottleReason, foreign_bytes
from potluck_node.domain.xid import meaning

HEADROOM_CELSIUS: Final = 10
"""To the card's own slowdown threshold, 95 °C on most 3090s: at 85 °C the pool that this one learns from had lost 40 % of its clocks."""
TRANSIENT_FACTOR: Final = 500 / 350
"""What a card takes for milliseconds, by what it is limited to: guides that go back to Igor's Lab's measurements of the 350 W RTX 3090
budget up to 500 W for it (unanswered.io/guide/rtx-3090-power-consumption-psu-requirements). The driver's limit does not bound such peaks,
and the cards of one model peak together (github.com/noonghunna/club-3090/issues/1019)."""
HOST_WATTS: Final = 100
"""The machine without its cards: 70 to 100 W at such work (research of the design, ecosystem §3.5)."""
CAP_STEP_WATTS: Final = 10
CLOCKS_BOUND_MHZ: Final = "210,1550"
"""What keeps the peaks of four 3090s below a 1500 W supply's protection: github.com/noonghunna/club-3090/issues/814."""
FOREIGN_BYTES: Final = GIB
"""Held by others before it is worth a word; a desktop alone holds about half of it."""
PROCESSES_NAMED: Final = 3

_SLOWED: Final = {
    ThrottleReason.HARDWARE_THERMAL: (Level.FAIL, "by its own protection against heat"),
    ThrottleReason.SOFTWARE_THERMAL: (Level.WARN, "by the driver, against heat"),
    ThrottleReason.POWER_BRAKE: (Level.FAIL, "by the power supply's brake signal"),
    ThrottleReason.HARDWARE_SLOWDOWN: (Level.FAIL, "by its own protection"),
}
"""The gravest that applies is told; the last says only that one of the others does, or none that has a name."""
COOLER_CAPS_WATTS: Final = (280, 250, 220)
"""280 W costs a 3090 less than 1 % of its decoding speed, and 220 W is the last before it falls off (research of the design, peers §2.11,
ecosystem §3.4)."""
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
    cards = [card for card in examination.live_cards if card.reading.temperature_celsius is not None]
    bad = [finding for card in cards if (finding := _heat_fault(card)) is not None]
    if bad or not examination.live_cards:
        return tuple(bad)
    if not cards:
        return (Finding(Level.OK, "heat", "the driver does not tell the temperature"),)
    return (Finding(Level.OK, "heat", by_card({card.index: f"{card.reading.temperature_celsius} °C" for card in cards})),)


def check_clocks(examination: Examination) -> tuple[Finding, ...]:
    """Cards that are slowed down now, by anything but their power cap."""
    cards = examination.live_cards
    bad = [finding for card in cards if (finding := _clock_fault(card)) is not None]
    if bad or not cards:
        return tuple(bad)
    if all(card.reading.throttle_reasons is None for card in cards):
        return (Finding(Level.OK, "clocks", "the driver does not tell what slows a card down"),)
    capped = [card for card in cards if ThrottleReason.POWER_CAP in (card.reading.throttle_reasons or ())]
    if not capped:
        return (Finding(Level.OK, "clocks", "no card is slowed down"),)
    caps = by_card({card.index: _limit_words(card) for card in capped})
    return (Finding(Level.OK, "clocks", f"at the power cap, as they should be under load: {caps}"),)


def check_power_supply(examination: Examination) -> tuple[Finding, ...]:
    """Whether the power supply carries what the cards may take together, and their peaks."""
    cards = examination.live_cards
    limits_milliwatts = [limit for card in cards if (limit := _limit_milliwatts(card)) is not None]
    if not limits_milliwatts or len(limits_milliwatts) < len(cards):
        return (Finding(Level.OK, "power", "the driver does not tell the cards' power limits"),) if cards else ()
    limits_watts = sum(limits_milliwatts) / 1000
    steady_watts = round(limits_watts + HOST_WATTS)
    peak_watts = round(limits_watts * TRANSIENT_FACTOR + HOST_WATTS)
    supply_watts = examination.owner.power_supply_watts
    load = f"the machine may take about {steady_watts} W, and {peak_watts} W for milliseconds"
    if supply_watts is None:
        return (Finding(Level.OK, "power", load, "set power_supply_watts in node.toml to have your power supply checked"),)
    if peak_watts <= supply_watts:
        return (Finding(Level.OK, "power", f"{load}; the power supply gives {supply_watts} W"),)
    level = Level.FAIL if steady_watts > supply_watts else Level.WARN
    what = f"{load}, but the power supply gives {supply_watts} W: it may switch off under load"
    return (Finding(level, "power", what, _power_fix(cards, supply_watts, peak_watts)),)


def check_foreign_memory(examination: Examination) -> tuple[Finding, ...]:
    """Memory of the cards that programs other than this node's hold."""
    cards = examination.live_cards
    held = {card.index: foreign_bytes(card.reading.memory_used_bytes, card.processes) for card in cards}
    bad = [_foreign_fault(card, size) for card in cards if (size := held[card.index]) is not None and size >= FOREIGN_BYTES]
    if bad or not cards:
        return tuple(bad)
    if all(size is None for size in held.values()):
        return (Finding(Level.OK, "vram", "the driver does not tell who uses the cards' memory"),)
    return (Finding(Level.OK, "vram", f"others hold {gib(max(size or 0 for size in held.values()))} of a card at most"),)


def check_faults(examination: Examination) -> tuple[Finding, ...]:
    """Faults that the kernel's log holds."""
    xids = examination.hardware.xids
    if not examination.hardware.cards:
        return ()
    if xids is None:
        return (Finding(Level.OK, "faults", "the kernel's log may not be read by you", "sudo dmesg | grep -i xid"),)
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
    if (limit := _limit_milliwatts(card)) is not None:
        lowest, highest = identity.power_limit_min_milliwatts, identity.power_limit_max_milliwatts
        allowed = "" if lowest is None or highest is None else f" ({watts(lowest)} to {watts(highest)} allowed)"
        words.append(f"limit {watts(limit)}{allowed}")
    return Finding(Level.OK, card_subject(card), ", ".join(words))


def _heat_fault(card: Card) -> Finding | None:
    celsius, slowdown = card.reading.temperature_celsius, card.identity.slowdown_celsius
    if celsius is None or slowdown is None or slowdown - celsius >= HEADROOM_CELSIUS:
        return None
    level = Level.WARN if celsius < slowdown else Level.FAIL
    return Finding(level, card_subject(card), f"{celsius} °C, it slows down at {slowdown} °C", _cooling(card))


def _clock_fault(card: Card) -> Finding | None:
    for reason, (level, words) in _SLOWED.items():
        if reason in (card.reading.throttle_reasons or ()):
            clock, best = card.reading.clock_sm_mhz, card.identity.clock_sm_max_mhz
            speed = "" if clock is None or best is None else f", to {clock} of {best} MHz"
            return Finding(level, card_subject(card), f"slowed down {words}{speed}", _SLOWED_FIXES.get(reason) or _cooling(card))
    return None


def _cooling(card: Card) -> str:
    limit = _limit_milliwatts(card)
    for cap_watts in COOLER_CAPS_WATTS:
        if limit is None or cap_watts * 1000 < limit:
            return f"clean fans and filters, give it air, or cap it: sudo nvidia-smi -i {card.index} -pl {cap_watts}"
    return "clean fans and filters, and give it air"


def _foreign_fault(card: Card, held_bytes: int) -> Finding:
    total = "" if card.identity.memory_bytes is None else f" of {gib(card.identity.memory_bytes)}"
    what = f"others hold {gib(held_bytes)}{total}: {_process_words(card.processes or ())}"
    return Finding(Level.WARN, card_subject(card), what, "close them, or run `potluck node pause` while you use the card")


def _process_words(processes: tuple[CardProcess, ...]) -> str:
    foreign = sorted((process for process in processes if not process.own), key=lambda process: -(process.memory_bytes or 0))
    if not foreign:
        return "processes that are not shown here, as of other containers"
    words = [f"{process.name} (pid {process.pid})" if process.name else f"pid {process.pid}" for process in foreign[:PROCESSES_NAMED]]
    more_count = len(foreign) - len(words)
    return listed([*words, f"{more_count} more"] if more_count else words)


def _power_fix(cards: tuple[Card, ...], supply_watts: int, peak_watts: int) -> str:
    cap_watts = math.floor((supply_watts - HOST_WATTS) / TRANSIENT_FACTOR / len(cards) / CAP_STEP_WATTS) * CAP_STEP_WATTS
    lowest_watts = max((card.identity.power_limit_min_milliwatts or 0) / 1000 for card in cards)
    if cap_watts < max(lowest_watts, CAP_STEP_WATTS):
        return f"use a power supply of {math.ceil(peak_watts / 50) * 50} W, or fewer cards"
    return f"sudo nvidia-smi -pl {cap_watts}; if it still switches off, bound the clocks too: sudo nvidia-smi -lgc {CLOCKS_BOUND_MHZ}"


def _limit_milliwatts(card: Card) -> int | None:
    if card.reading.power_limit_milliwatts is not None:
        return card.reading.power_limit_milliwatts
    return card.identity.power_limit_default_milliwatts


def _limit_words(card: Card) -> str:
    limit = _limit_milliwatts(card)
    return "an unknown limit" if limit is None else watts(limit)
