"""`potluck tiers`: what the two tiers are here, what you have left of the default one, and how its promise was kept.

Decides how that is laid out. It must not know how it was counted.
"""

from __future__ import annotations

import math
from typing import Final

from potluck import tier_calls
from potluck.commands.session import KeyFileOption, UrlOption, connected
from potluck.commands.terminal import JsonOption, show, show_json, show_table
from potluck.tier_calls import PromiseKept

SPAN_SECONDS_MAX: Final = 120
"""From there on in minutes."""


def tiers(as_json: JsonOption = False, url: UrlOption = None, api_key_file: KeyFileOption = None) -> None:
    """Show the two tiers: what you have left of the default one, and how its promise was kept.

    Ask with the field service_tier: "default" is limited and promises a first token in time; "flex" takes what is left; "auto", or no
    field, is default while you have requests left, then flex.
    """
    with connected(url, api_key_file) as transport:
        found = transport.unary(tier_calls.get_tiers())
    if as_json:
        show_json(found)
        return
    left = f"{found.remaining_request_count} of {found.default_request_count_max} requests left"
    more = f", one more in {_span(found.reset_seconds)}" if found.remaining_request_count < found.default_request_count_max else ""
    show(f"default  {left} in {_span(found.window_seconds)}{more}; first token within {found.first_token_seconds:g} s")
    show(f"flex     as best as can be; leaves {found.reserve_percent} % of each model's room to default")
    rows = [_row(name, kept) for name, kept in (("1 h", found.hour), ("24 h", found.day), ("30 d", found.thirty_days))]
    show_table(("DEFAULT TIER", "REQUESTS", "FIRST TOKEN IN TIME"), rows)


def _span(seconds: float) -> str:
    """As people say it; rounded up, so that nobody comes too early."""
    if seconds < SPAN_SECONDS_MAX:
        return f"{math.ceil(seconds)} s"
    return f"{math.ceil(seconds / 60)} min"


def _row(window: str, kept: PromiseKept) -> tuple[str, str, str]:
    return window, str(kept.request_count), "-" if kept.share is None else f"{100 * kept.share:.1f} %"
