"""The double-entry ledger's words and rules: which postings an event makes.

Decides the postings of every event, which sum to zero, and what a repeated or late command answers. To settle nothing voids a hold. It must
not know tables: `directory.ledger` and storage apply these, and the database enforces again that sums are zero and a hold ends once.

Every amount is a whole number of micro-credits; 1 credit is 1,000,000 of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final, NamedTuple, NewType

from potluck_coordinator.domain.payees import PayeeShare, merged, split
from potluck_protocol.values import AccountId

AMOUNT_MICRO_CREDITS_MAX: Final = 10**15
"""The most that one command may move: a billion credits. It keeps every sum far from the end of 64 bits."""

LedgerAccountId = NewType("LedgerAccountId", str)
"""An account of the ledger: "issuer", "fee", or a kind and its owner."""


class LedgerAccountKind(StrEnum):
    """Who an account of the ledger stands for. Only the issuer may be below zero: it is where credits come from."""

    ISSUER = "issuer"
    USER = "user"
    NODE_OWNER = "node_owner"
    FEE = "fee"


@lru_cache(maxsize=16_384)
def ledger_account_id(kind: LedgerAccountKind, owner: AccountId | None = None) -> LedgerAccountId:
    """The id of a person's account of that kind, or, without an owner, of one of the pool's own two.

    Kept, for each payment names the same few several times.
    """
    return LedgerAccountId(kind.value if owner is None else f"{kind}:{owner}")


ISSUER: Final = ledger_account_id(LedgerAccountKind.ISSUER)
FEE: Final = ledger_account_id(LedgerAccountKind.FEE)


@dataclass(frozen=True, slots=True)
class OpenHold:
    """Sets aside what an attempt may cost at most, before anything of it reaches the client. The hold's id is the attempt's."""

    hold_id: str
    payer: AccountId
    payees: tuple[PayeeShare, ...]
    """The owner of the node that the attempt runs on, or of several nodes that answer it together their owners; kept `merged`."""
    amount_micro_credits: int
    expires_at_unix_ms: int
    gateway_epoch: int
    """The gateway run that will settle it; the next run of the same gateway settles, at its start, what this one left open."""

    def __post_init__(self) -> None:
        _check_amount(self.amount_micro_credits)
        object.__setattr__(self, "payees", merged(self.payees))


@dataclass(frozen=True, slots=True)
class MarkDelivered:
    """What an open hold has earned so far: paid if its gateway never comes back to settle it."""

    hold_id: str
    amount_micro_credits: int

    def __post_init__(self) -> None:
        _check_amount(self.amount_micro_credits)


@dataclass(frozen=True, slots=True)
class SettleHold:
    """Pays the payees for what was delivered, less the fee, and frees the rest. 0 frees all of it."""

    hold_id: str
    amount_micro_credits: int

    def __post_init__(self) -> None:
        _check_amount(self.amount_micro_credits)


def _check_amount(amount_micro_credits: int) -> None:
    if not 0 <= amount_micro_credits <= AMOUNT_MICRO_CREDITS_MAX:
        raise ValueError(f"an amount is from 0 to {AMOUNT_MICRO_CREDITS_MAX} micro-credits, not {amount_micro_credits}")


LedgerCommand = OpenHold | MarkDelivered | SettleHold


class LedgerOutcome(StrEnum):
    """What became of a command. A repeated command answers as it did the first time."""

    APPLIED = "applied"
    INSUFFICIENT_CREDITS = "insufficient_credits"
    """The hold was not opened and left no trace; the same command may be applied once there are credits."""
    CONFLICT = "conflict"
    """The id is known with other values, the hold is closed with another amount, there is no such hold, or its gateway was replaced."""


@dataclass(frozen=True, slots=True)
class Balance:
    """One person's position."""

    account_id: AccountId
    available_micro_credits: int
    held_micro_credits: int
    earned_micro_credits: int


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What re-deriving every balance from the postings found; no findings means that the books balance."""

    findings: tuple[str, ...]
    account_count: int
    transaction_count: int
    posting_count: int
    open_hold_count: int
    issued_micro_credits: int


class HoldState(StrEnum):
    """Where a hold stands. It leaves `OPEN` once."""

    OPEN = "open"
    SETTLED = "settled"
    EXPIRED = "expired"
    """Settled at its delivered mark, because whoever opened it did not come back in time."""


@dataclass(frozen=True, slots=True)
class Hold:
    """One hold as the ledger knows it."""

    hold_id: str
    payer: AccountId
    payees: tuple[PayeeShare, ...]
    amount_micro_credits: int
    delivered_micro_credits: int
    settled_micro_credits: int
    state: HoldState
    gateway_epoch: int
    expires_at_unix_ms: int


class TransactionKind(StrEnum):
    """Which event a transaction records."""

    GRANT = "grant"
    SETTLE = "settle"
    CLAIM = "claim"


class Posting(NamedTuple):
    """One line of a transaction; below zero it leaves the account."""

    ledger_account_id: LedgerAccountId
    amount_micro_credits: int


@dataclass(frozen=True, slots=True)
class Transaction:
    """One event's postings under an id that names the event, so that the same event cannot be booked twice."""

    transaction_id: str
    kind: TransactionKind
    postings: tuple[Posting, ...]

    def __post_init__(self) -> None:
        amounts = [posting.amount_micro_credits for posting in self.postings]
        if len(amounts) < 2 or 0 in amounts or sum(amounts) != 0:
            raise ValueError(f"transaction {self.transaction_id} needs two or more postings, none of them zero, that sum to zero")

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of what the transaction says; the same id with another fingerprint is a conflict."""
        lines = "".join([f"\n{account_id} {amount}" for account_id, amount in self.postings])
        return hashlib.sha256(f"{self.transaction_id}\n{self.kind}{lines}".encode()).hexdigest()


def judge(hold: Hold | None, command: LedgerCommand, gateway_epochs: AbstractSet[int]) -> LedgerOutcome | None:
    """What becomes of a command by the hold's state and the epochs of today's gateways; None: it is new and is to be carried out.

    A mark never falls: a late, smaller one is a repetition. After the end a mark or settlement answers as it did while the hold was open.
    A replaced gateway opens nothing: its last commands may still arrive, and what it left open has been settled already.
    """
    match command:
        case OpenHold():
            if hold is not None:
                return _judge_repeated_open(hold, command)
            return None if command.gateway_epoch in gateway_epochs else LedgerOutcome.CONFLICT
        case MarkDelivered(amount_micro_credits=amount):
            if hold is None or amount > hold.amount_micro_credits:
                return LedgerOutcome.CONFLICT
            if amount <= hold.delivered_micro_credits:
                return LedgerOutcome.APPLIED
            return None if hold.state is HoldState.OPEN else LedgerOutcome.CONFLICT
        case SettleHold(amount_micro_credits=amount):
            if hold is None or amount > hold.amount_micro_credits:
                return LedgerOutcome.CONFLICT
            if hold.state is HoldState.OPEN:
                return None
            return LedgerOutcome.APPLIED if amount == hold.settled_micro_credits else LedgerOutcome.CONFLICT


def _judge_repeated_open(hold: Hold, command: OpenHold) -> LedgerOutcome:
    same = (
        hold.payer == command.payer
        and hold.payees == command.payees
        and hold.amount_micro_credits == command.amount_micro_credits
        and hold.expires_at_unix_ms == command.expires_at_unix_ms
        and hold.gateway_epoch == command.gateway_epoch
    )
    return LedgerOutcome.APPLIED if same else LedgerOutcome.CONFLICT


def grant(account_id: AccountId, amount_micro_credits: int) -> Transaction | None:
    """What a new account starts with, out of the issuer; None for nothing. Each account gets it once."""
    user = ledger_account_id(LedgerAccountKind.USER, account_id)
    postings = Posting(ISSUER, -amount_micro_credits), Posting(user, amount_micro_credits)
    return _transfer(f"grant:{account_id}", TransactionKind.GRANT, *postings)


def settlement(hold: Hold, amount_micro_credits: int, fee_micro_credits: int) -> Transaction | None:
    """The payer pays the amount; the payees get it less the fee, by their shares. None for an amount of nothing."""
    if not 0 <= fee_micro_credits <= amount_micro_credits <= hold.amount_micro_credits:
        raise ValueError(
            f"hold {hold.hold_id} of {hold.amount_micro_credits} cannot settle {amount_micro_credits}, fee {fee_micro_credits}"
        )
    parts = split(amount_micro_credits - fee_micro_credits, [share.weight for share in hold.payees])
    earned = [
        Posting(ledger_account_id(LedgerAccountKind.NODE_OWNER, share.account_id), part)
        for share, part in zip(hold.payees, parts, strict=True)
    ]
    paid = Posting(ledger_account_id(LedgerAccountKind.USER, hold.payer), -amount_micro_credits)
    return _transfer(f"settle:{hold.hold_id}", TransactionKind.SETTLE, paid, *earned, Posting(FEE, fee_micro_credits))


def claim(account_id: AccountId, claim_id: str, amount_micro_credits: int) -> Transaction | None:
    """Moves what a person's nodes earned to the account that pays for requests; None for nothing earned."""
    return _transfer(
        claim_transaction_id(account_id, claim_id),
        TransactionKind.CLAIM,
        Posting(ledger_account_id(LedgerAccountKind.NODE_OWNER, account_id), -amount_micro_credits),
        Posting(ledger_account_id(LedgerAccountKind.USER, account_id), amount_micro_credits),
    )


def claim_transaction_id(account_id: AccountId, claim_id: str) -> str:
    """Claim ids are the caller's, so one person's never meet another's."""
    return f"claim:{account_id}:{claim_id}"


def _transfer(transaction_id: str, kind: TransactionKind, *postings: Posting) -> Transaction | None:
    """Without those of nothing."""
    moving = tuple([posting for posting in postings if posting.amount_micro_credits != 0])
    return Transaction(transaction_id, kind, moving) if moving else None
