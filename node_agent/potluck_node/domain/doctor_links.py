"""Checks of what joins the cards: PCIe lanes, NVLink bridges, memory nodes.

Decides what is slower than it should be. A link's generation drops while a card is idle and is judged under load only; its width is judged
always. An active NVLink port is a fact of one card: that two cards are joined is proved by the driver's peer status alone.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from potluck_node.domain.findings import Examination, Finding, Level, by_card, card_subject, listed
from potluck_node.domain.hardware import Card, joined_pairs

WIDTH_GOOD: Final = 8
"""Lanes from which on nothing is said: boards for two cards share 16 lanes between them."""
WIDTH_POOR: Final = 4
"""Below it a card is nearly cut off. Owners found 3090s at x4, and at times x1; one four-card box went from 11 to 25 tokens a second by
setting its slots right (research of the design, peers §2.11; such a card: github.com/noonghunna/club-3090/issues/222)."""
GENERATION_DROP: Final = 2
"""Generations below the best that count as collapsed. One is often set on purpose, for the sake of a riser."""
GRANTED_BY: Final = "update the driver, turn the IOMMU off in the BIOS, restart; then: nvidia-smi topo -p2p n"
LINK_SHOWN_BY: Final = 'sudo lspci -vv -d 10de: | grep -E "^[0-9a-f]|LnkCap:|LnkSta:"'
"""The kernel's own word for each card's link, what it can and how it is."""
LOAD_PERCENT: Final = 20
"""Utilisation from which on a link has left its idle speed."""


def check_pcie(examination: Examination) -> tuple[Finding, ...]:
    """Lanes that are missing, and a generation that stays down under load."""
    cards = examination.live_cards
    bad = [finding for card in cards if (finding := _pcie_fault(card)) is not None]
    untold = {card.index: what for card in cards if (what := _untold_link(card))}
    if untold:
        bad.append(Finding(Level.WARN, "pcie", f"the driver does not tell {by_card(untold)}", LINK_SHOWN_BY))
    if bad or not cards:
        return tuple(bad)
    widths = by_card({card.index: f"x{card.reading.pcie_width} of x{_capable_width(card)}" for card in cards})
    if all(_under_load(card) for card in cards):
        return (Finding(Level.OK, "pcie", f"{widths}; generation holds under load"),)
    return (Finding(Level.OK, "pcie", f"{widths}; generation not judged while idle", "run it again while a model answers"),)


def check_nvlink(examination: Examination) -> tuple[Finding, ...]:
    """Bridges that are there and not in use."""
    cards = examination.live_cards
    if len(cards) < 2:
        return ()
    joined = joined_pairs(examination.hardware.pairs)
    bad = [*_half_seated(cards), *_not_granted(examination, joined), *_leading_nowhere(examination, joined)]
    if bad:
        return tuple(bad)
    if joined:
        return (Finding(Level.OK, "nvlink", f"joins cards {listed(f'{first}-{second}' for first, second in joined)}"),)
    if all(pair.nvlink is None for pair in examination.hardware.pairs) and not any(card.nvlinks for card in cards):
        return (Finding(Level.OK, "nvlink", "the driver tells nothing of a bridge between the cards", "nvidia-smi topo -p2p n"),)
    return (Finding(Level.OK, "nvlink", "no bridge seen: the cards talk over PCIe, so one model a card is the best use of them"),)


def check_numa(examination: Examination) -> tuple[Finding, ...]:
    """Cards far from their partner, or from the processors that serve them."""
    cards = [card for card in examination.live_cards if card.slot.numa_node is not None]
    bad = [*_split_pairs(examination, cards), *_lonely_cards(cards), *_far_cards(examination, cards)]
    if bad or not cards:
        return tuple(bad)
    known = examination.hardware.host.numa_nodes_allowed is not None
    together = (
        "cards and their processors are together" if known else "it is not known which processors the agent may use; cards are together"
    )
    nodes = sorted({card.slot.numa_node for card in cards if card.slot.numa_node is not None})
    return (Finding(Level.OK, "numa", f"{together} on node {listed(str(node) for node in nodes)}"),)


def _pcie_fault(card: Card) -> Finding | None:
    width, capable = card.reading.pcie_width, _capable_width(card)
    if width is not None and capable is not None and width < min(capable, WIDTH_GOOD):
        level = Level.WARN if width >= WIDTH_POOR else Level.FAIL
        slot_width = card.slot.slot_width_max
        fix = (
            f"its slot has {slot_width} lanes only: move the card to an x16 slot"
            if slot_width is not None and slot_width <= width
            else "power off, reseat the card or change its riser, and look at the slot's lanes in the BIOS"
        )
        what = f"PCIe x{width}, the card has x{capable}: models load slowly, and splitting one over cards does not pay"
        return Finding(level, card_subject(card), what, fix)
    generation, best = card.reading.pcie_generation, card.identity.pcie_generation_max
    if _under_load(card) and generation is not None and best is not None and generation <= best - GENERATION_DROP:
        what = f"PCIe generation {generation} at {card.reading.utilization_percent} % load, {best} is possible"
        return Finding(Level.WARN, card_subject(card), what, "set the slot's PCIe speed in the BIOS by hand, or change the riser")
    return None


def _untold_link(card: Card) -> str:
    """What would have to be known to judge the card's link as it is now; empty: nothing."""
    if card.reading.pcie_width is None:
        return "how many lanes are in use"
    if _capable_width(card) is None:
        return "how many lanes it has"
    generations = (card.reading.pcie_generation, card.identity.pcie_generation_max)
    return "the generation under load" if _under_load(card) and None in generations else ""


def _capable_width(card: Card) -> int | None:
    # The driver lowers its figure to what the slot has; the kernel tells what the card has.
    return card.slot.card_width_max or card.identity.pcie_width_max


def _under_load(card: Card) -> bool:
    return (card.reading.utilization_percent or 0) >= LOAD_PERCENT


def _half_seated(cards: tuple[Card, ...]) -> list[Finding]:
    findings = []
    for card in cards:
        active_count = sum(link.active for link in card.nvlinks)
        if 0 < active_count < len(card.nvlinks):
            what = f"{active_count} of {len(card.nvlinks)} NVLink ports are up"
            findings.append(Finding(Level.WARN, card_subject(card), what, "power off, clean and reseat the NVLink bridge"))
    return findings


def _not_granted(examination: Examination, joined: tuple[tuple[int, int], ...]) -> list[Finding]:
    """Pairs with a bridge between them, by the bus ids at the ends of their ports, that the driver does not let talk."""
    indexes = {card.identity.bus_id: card.index for card in examination.live_cards if card.identity.bus_id is not None}
    bridged = {
        (min(card.index, indexes[link.remote_bus_id]), max(card.index, indexes[link.remote_bus_id]))
        for card in examination.live_cards
        for link in card.nvlinks
        if link.active and link.remote_bus_id in indexes
    }
    statuses = {(pair.first, pair.second): pair for pair in examination.hardware.pairs}
    findings = []
    for first, second in sorted(bridged - set(joined)):
        pair = statuses.get((first, second))
        answer = "nothing" if pair is None or pair.nvlink is None else str(pair.nvlink if pair.nvlink != "ok" else pair.read)
        what = f"the NVLink bridge is up but not in use: the driver answers {answer} for peer access"
        findings.append(Finding(Level.WARN, f"cards {first}-{second}", what, GRANTED_BY))
    return findings


def _leading_nowhere(examination: Examination, joined: tuple[tuple[int, int], ...]) -> list[Finding]:
    """Cards whose ports are up, of which the driver says neither where they lead nor that they join it with any other."""
    return [
        Finding(Level.WARN, card_subject(card), "its NVLink ports are up but not in use: the driver joins it with no card", GRANTED_BY)
        for card in examination.live_cards
        if any(link.active for link in card.nvlinks)
        and all(link.remote_bus_id is None for link in card.nvlinks)
        and not any(card.index in pair for pair in joined)
    ]


def _split_pairs(examination: Examination, cards: list[Card]) -> list[Finding]:
    nodes = {card.index: card.slot.numa_node for card in cards}
    return [
        Finding(
            Level.WARN,
            f"cards {first}-{second}",
            f"joined by NVLink, but on memory nodes {nodes[first]} and {nodes[second]}",
            "move one of them to a slot of the other's processor",
        )
        for first, second in joined_pairs(examination.hardware.pairs)
        if first in nodes and second in nodes and nodes[first] != nodes[second]
    ]


def _lonely_cards(cards: list[Card]) -> list[Finding]:
    """Cards without a neighbour on their memory node: whatever they share crosses from one processor to the other."""
    counts = Counter(card.slot.numa_node for card in cards)
    lonely = [card for card in cards if len(counts) > 1 and counts[card.slot.numa_node] == 1]
    if not lonely:
        return []
    places = by_card({card.index: f"node {card.slot.numa_node}" for card in lonely})
    what = f"alone on their memory node: {places}; a model over several cards crosses between processors"
    return [Finding(Level.WARN, "numa", what, "put the cards into slots of one processor, or run one model a card")]


def _far_cards(examination: Examination, cards: list[Card]) -> list[Finding]:
    allowed = examination.hardware.host.numa_nodes_allowed
    return [
        Finding(
            Level.WARN,
            card_subject(card),
            f"on memory node {card.slot.numa_node}, of which the agent may use no processor",
            "let the agent's container or service use that node's processors (cpuset)",
        )
        for card in cards
        if allowed is not None and card.slot.numa_node not in allowed
    ]
