"""Whether the agent may cap the cards' power, which is what it does first when one gets hot.

Decides what is worth a word: without the right a hot card loses slots instead, which is worse and no fault, but for an owner who set watts.
It must not know how the right is given: whoever looked brings the command.
"""

from __future__ import annotations

from potluck_node.domain.findings import CapRight, Examination, Finding, Level, card_subject, watts


def check_caps(examination: Examination) -> tuple[Finding, ...]:
    """One line on the right, and one for each card that takes more than its owner allows."""
    owner = examination.owner
    cards = [card for card in examination.live_cards if card.identity.power_limit_min_milliwatts is not None]
    if not cards or owner.cap_right is None:
        return ()
    found = [_right(owner.cap_right, owner.cap_right_command, wanted=owner.power_limit_watts is not None)]
    for card in cards:
        lowest_milliwatts = card.identity.power_limit_min_milliwatts or 0
        if owner.power_limit_watts is not None and owner.power_limit_watts * 1000 < lowest_milliwatts:
            what = f"takes no cap below {watts(lowest_milliwatts)}, and power_limit_watts is {owner.power_limit_watts}"
            found.append(Finding(Level.WARN, card_subject(card), what, f"set power_limit_watts to {lowest_milliwatts // 1000} or more"))
    return tuple(found)


def _right(right: CapRight, command: str, *, wanted: bool) -> Finding:
    if right is CapRight.UNSAFE:
        what = "others than root may change the program that caps the cards' power as root: whoever does is root"
        return Finding(Level.FAIL, "caps", what, command)
    if right is not CapRight.NONE:
        return Finding(Level.OK, "caps", "a card that gets hot gets less power first, and only then fewer answers")
    if wanted:
        return Finding(Level.WARN, "caps", "power_limit_watts is set, and you may not cap the cards' power", command)
    return Finding(Level.OK, "caps", "a card that gets hot gets fewer answers at once: you may not cap its power", command)
