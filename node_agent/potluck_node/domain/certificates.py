"""When a node's certificate must be replaced, and what its dates say when the link will not open.

Decides from dates and a given `now`, in Unix milliseconds. It must not know how certificates are read or fetched. A handshake refused for
its dates looks like a broken network, so the agent asks here before each dial.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

RENEW_AT_LIFE_SHARE: Final = 2 / 3
RENEW_JITTER_LIFE_SHARE: Final = 0.1
"""The pool's nodes spread their renewals over a tenth of a life to both sides."""


@dataclass(frozen=True, slots=True)
class CertificateDates:
    """From when to when a certificate is good."""

    not_before_unix_ms: int
    not_after_unix_ms: int


class Standing(StrEnum):
    """What a certificate is good for now."""

    VALID = "valid"
    NOT_YET_VALID = "not_yet_valid"
    LAPSED = "lapsed"


def standing(dates: CertificateDates, now_unix_ms: int) -> Standing:
    """Whether a handshake with this certificate can succeed at all."""
    if now_unix_ms < dates.not_before_unix_ms:
        return Standing.NOT_YET_VALID
    if now_unix_ms >= dates.not_after_unix_ms:
        return Standing.LAPSED
    return Standing.VALID


def renew_again_at_unix_ms(dates: CertificateDates, jitter: float, now_unix_ms: int) -> int:
    """As `renew_at_unix_ms` for a certificate that has just come, but never before a tenth of its life from now.

    To a clock that runs far ahead of the coordinator's every new certificate looks due; without a pause it would renew without end.
    """
    pause_ms = int((dates.not_after_unix_ms - dates.not_before_unix_ms) * RENEW_JITTER_LIFE_SHARE)
    return max(renew_at_unix_ms(dates, jitter), now_unix_ms + pause_ms)


def renew_at_unix_ms(dates: CertificateDates, jitter: float) -> int:
    """When to ask for the next certificate: two thirds into this one's life, a tenth of the life earlier or later.

    Args:
        dates: the present certificate's.
        jitter: a random number from 0 to 1.
    """
    life_ms = dates.not_after_unix_ms - dates.not_before_unix_ms
    share = RENEW_AT_LIFE_SHARE + RENEW_JITTER_LIFE_SHARE * (2 * jitter - 1)
    return dates.not_before_unix_ms + int(life_ms * share)
