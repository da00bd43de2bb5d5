"""Which requests are refused for good: those that had two engines to themselves, and both died.

Decides by deaths at which nobody else was with the engine: whoever shared an engine that died may have been there by chance, or have been
put there by somebody who kills engines with requests of his own. One node's word is not enough while other owners' nodes can be asked: the
second death has to be another owner's. As a word is all that a suspicion rests on, suspects are few to each node and owner, and end by
themselves; what is refused is not. It must not know what was asked, only its keyed hash.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from potluck_protocol.culprits import Fingerprint
    from potluck_protocol.values import AccountId, AttemptId

LETHAL_MAX: Final = 4096
"""Requests that are kept. One more, and one that is only suspected makes room, else one that is refused; of each the oldest."""
SUSPECTS_PER_OWNER_MAX: Final = 256
"""By deaths on one owner's nodes: whoever claims more of them pushes out his own."""
SUSPECT_KEPT_MS: Final = 7 * 24 * 3600 * 1000
"""From the death: one that kills engines and is sent again meets the second within days."""
DEATHS_HEARD_MAX: Final = 8
DEATHS_HEARD_SECONDS: Final = 600.0
"""Of one node, so many are heard in so long; its own breaker lets an engine have five."""


@dataclass(frozen=True, slots=True)
class LoneDeath:
    """An engine that died while it worked on one request and no other."""

    attempt_id: AttemptId
    fingerprint: Fingerprint
    owner_account_id: AccountId
    """Of the node."""
    is_only_owner: bool
    """Nobody else's node can take the request, so that there is no second opinion to be had."""


@dataclass(frozen=True, slots=True)
class LethalRequest:
    """What is kept of a request with which engines died."""

    fingerprint: Fingerprint
    attempt_id: AttemptId
    """Of the first death, so that it counts once, however often it is told."""
    owner_account_id: AccountId
    died_at_unix_ms: int
    refused_at_unix_ms: int | None = None
    """None while it is only suspected."""


def after_death(known: LethalRequest | None, death: LoneDeath, now_unix_ms: int) -> LethalRequest:
    """What is known of a request after an engine died with it alone."""
    if known is None or has_lapsed(known, now_unix_ms):
        return LethalRequest(death.fingerprint, death.attempt_id, death.owner_account_id, now_unix_ms)
    is_told_again = known.attempt_id == death.attempt_id
    is_second_opinion = death.is_only_owner or known.owner_account_id != death.owner_account_id
    if is_told_again or known.refused_at_unix_ms is not None or not is_second_opinion:
        return known
    return replace(known, refused_at_unix_ms=now_unix_ms)


def has_lapsed(known: LethalRequest, now_unix_ms: int) -> bool:
    """Whether it was suspected only, and too long ago."""
    return known.refused_at_unix_ms is None and now_unix_ms - known.died_at_unix_ms >= SUSPECT_KEPT_MS


def is_heard(heard_at_seconds: Sequence[float], now_seconds: float) -> bool:
    """Whether another death on a node counts, by when earlier ones did."""
    return sum(now_seconds - at < DEATHS_HEARD_SECONDS for at in heard_at_seconds) < DEATHS_HEARD_MAX


def forgotten(known: Iterable[LethalRequest], now_unix_ms: int) -> tuple[Fingerprint, ...]:
    """Who is not kept any more: suspects whose time is over, those too many of one owner, and what is then too much."""
    newest_first = sorted(known, key=lambda one: (one.refused_at_unix_ms is None, -(one.refused_at_unix_ms or one.died_at_unix_ms)))
    kept_count, gone = 0, []
    suspect_counts: Counter[AccountId] = Counter()
    for one in newest_first:
        is_suspect = one.refused_at_unix_ms is None
        if (
            kept_count >= LETHAL_MAX
            or has_lapsed(one, now_unix_ms)
            or (is_suspect and suspect_counts[one.owner_account_id] >= SUSPECTS_PER_OWNER_MAX)
        ):
            gone.append(one.fingerprint)
            continue
        kept_count += 1
        suspect_counts[one.owner_account_id] += is_suspect
    return tuple(gone)
