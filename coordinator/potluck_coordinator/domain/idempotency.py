"""Idempotency keys: what becomes of a request that names one, by what is known of that key.

Decides when a key is free, when a request is the first one again, and when it is another; how long a key is remembered; when a first run
has spent its key; and what of the kept answers is let go when they become too much. A key is its account's own. It must not know answers,
sockets or tables: `gateway.keyed_requests` keeps the answers, in memory only, and `directory.idempotency` that a key was spent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from potluck_protocol.values import AccountId, RequestId

KEY_KEPT_MS: Final = 24 * 3600 * 1000
"""From its first use; after that the same key is a new one."""
IN_FLIGHT_RETRY_SECONDS: Final = 2.0


class KeyState(StrEnum):
    """How far a key's request has come."""

    CLAIMED = "claimed"
    """It may be running."""
    SPENT = "spent"
    """It was answered, in whole or in part, and charged."""
    ABANDONED = "abandoned"
    """It was running when its gateway died. The books never say so: it follows from whose the gateway's epoch is."""


@dataclass(frozen=True, slots=True)
class KeyUse:
    """A request that names a key. The hashes are keyed with a secret of the pool's: they lead back to neither."""

    account_id: AccountId
    key_hash: bytes
    body_hash: bytes
    request_id: RequestId
    """Clients may give two requests the same."""
    claim_id: str
    """The gateway's own, of this one use: two uses never have the same."""
    gateway_epoch: int


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is kept of a key's first use."""

    use: KeyUse
    state: KeyState
    charge_micro_credits: int
    claimed_at_unix_ms: int


class Standing(StrEnum):
    """What a request with a key is, by what is known of the key."""

    FREE = "free"
    """The first one: it is run."""
    SAME = "same"
    """The first one again: it gets what the first one got."""
    OTHER = "other"
    """Another request: it is refused."""


def standing(record: KeyRecord | None, use: KeyUse, now_unix_ms: int) -> Standing:
    """What the request is; `record` is of the same account and key."""
    if record is None or now_unix_ms - record.claimed_at_unix_ms >= KEY_KEPT_MS:
        return Standing.FREE
    return Standing.SAME if record.use.body_hash == use.body_hash else Standing.OTHER


def has_claimed(record: KeyRecord | None, use: KeyUse) -> bool:
    """Whether the record is of this very use: its claim was made, and is only told again."""
    return record is not None and record.use.claim_id == use.claim_id and record.state is KeyState.CLAIMED


def has_spent(*, answer_bytes: int, charge_micro_credits: int) -> bool:
    """Whether a run that is over has spent its key: the client may have seen something of it, or pays for it."""
    return answer_bytes > 0 or charge_micro_credits > 0


def as_known_now(record: KeyRecord, gateway_epochs: AbstractSet[int]) -> KeyRecord:
    """The record as it stands while these are the gateways that there are."""
    abandoned = record.state is KeyState.CLAIMED and record.use.gateway_epoch not in gateway_epochs
    return replace(record, state=KeyState.ABANDONED) if abandoned else record


def other_request(record: KeyRecord) -> PotluckError:
    """The refusal of another request under a key that is taken."""
    message = f"This idempotency key was used for another request, {record.use.request_id}, within a day. Give this one a key of its own."
    return PotluckError(ErrorCode.IDEMPOTENCY_KEY_REUSED, message, param="Idempotency-Key")


def not_kept(record: KeyRecord, gateway_epoch: int) -> PotluckError:
    """The refusal of the first request again, where its answer is not here, at this gateway, to be given again. It is never run twice."""
    first = record.use.request_id
    if record.state is KeyState.SPENT:
        message = (
            f"This request was answered and charged {record.charge_micro_credits} micro-credits as request {first}; "
            "its answer is not kept here any more. To have it made again, and charged, send it with another idempotency key."
        )
        return PotluckError(ErrorCode.IDEMPOTENCY_KEY_SPENT, message, param="Idempotency-Key")
    if record.state is KeyState.ABANDONED:
        message = (
            f"This request was begun as request {first}, and its gateway stopped before it was over: what had reached you by then is "
            "charged. To have it made again, send it with another idempotency key."
        )
        return PotluckError(ErrorCode.IDEMPOTENCY_KEY_SPENT, message, param="Idempotency-Key")
    why = (
        "and its answer is too large to be kept for another reader."
        if record.use.gateway_epoch == gateway_epoch
        else "by another of the pool's gateways: ask again, until it is over or your connection leads there."
    )
    message = f"This request is being answered as request {first}, {why}"
    return PotluckError(ErrorCode.IDEMPOTENCY_KEY_IN_FLIGHT, message, param="Idempotency-Key", retry_after_seconds=IN_FLIGHT_RETRY_SECONDS)


@dataclass(frozen=True, slots=True)
class KeptBounds:
    """How much of answers is kept for those who ask again: in memory, and no longer than this process lives."""

    answer_bytes_max: int = 8 * 1024 * 1024
    """Of one answer; a longer one is passed on and not kept."""
    account_bytes_max: int = 32 * 1024 * 1024
    account_count_max: int = 1024
    bytes_max: int = 256 * 1024 * 1024
    count_max: int = 16_384


@dataclass(frozen=True, slots=True)
class Kept:
    """What the answers of one account, or of all, come to."""

    count: int
    size_bytes: int


def is_too_much(account: Kept, everyone: Kept, bounds: KeptBounds) -> tuple[bool, bool]:
    """Whether the oldest answer has to go: of the account's own, and of all."""
    return (
        account.count > bounds.account_count_max or account.size_bytes > bounds.account_bytes_max,
        everyone.count > bounds.count_max or everyone.size_bytes > bounds.bytes_max,
    )


class WhenGone(StrEnum):
    """What becomes of a run when nobody reads it any more; whoever sends the request says so."""

    FINISH = "finish"
    """It goes on to its end, for the client who comes back: what a client who names a key of its own wants."""
    CANCEL = "cancel"
    """It ends once the client knows its place: the SDK's own keys, under which it only asks again before that."""


LINGER_SECONDS: Final = 3.0
"""A run without a place yet goes on so long for an SDK that lost its connection to ask again."""


def linger_seconds(when_gone: WhenGone, *, placed: bool) -> float | None:
    """How long a run goes on without a reader; None: to its end."""
    if when_gone is WhenGone.FINISH:
        return None
    return 0.0 if placed else LINGER_SECONDS
