"""Amounts as people read them.

Decides how many micro-credits a credit is and how an amount is written. It must not know who pays whom.
"""

from __future__ import annotations

from typing import Final

MICRO_CREDITS_PER_CREDIT: Final = 1_000_000


def credits_text(micro_credits: int) -> str:
    """An amount in credits, exact: 1500000 is "1.5"."""
    whole, rest = divmod(abs(micro_credits), MICRO_CREDITS_PER_CREDIT)
    sign = "-" if micro_credits < 0 else ""
    decimals = f"{rest:06d}".rstrip("0")
    return f"{sign}{whole:,}.{decimals}" if decimals else f"{sign}{whole:,}"
