"""The double-entry ledger's words and rules: which postings an event makes.

Decides the postings of every event; each event's postings sum to zero. It must not know tables: storage applies these, and the database
enforces the same rules again.

Every amount is a whole number of micro-credits; 1 credit is 1,000,000 of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from potluck_protocol.values import AccountId


class LedgerAccountKind(StrEnum):
    """Who an account of the ledger stands for. Only the issuer may be below zero: it is where credits come from."""

    ISSUER = "issuer"
    USER = "user"
    NODE_OWNER = "node_owner"
    FEE = "fee"


@dataclass(frozen=True, slots=True)
class OpenHold:
    """Sets aside what an attempt may cost at most, before anything of it reaches the client. The hold's id is the attempt's."""

    hold_id: str
    payer: AccountId
    payee: AccountId
    """The owner of the node that the attempt runs on."""
    amount_micro_credits: int
    expires_at_unix_ms: int
    gateway_epoch: int
    """The gateway run that will settle it; a later run's start settles what an earlier one left open."""


@dataclass(frozen=True, slots=True)
class MarkDelivered:
    """What an open hold has earned so far: paid if its gateway never comes back to settle it."""

    hold_id: str
    amount_micro_credits: int


@dataclass(frozen=True, slots=True)
class SettleHold:
    """Pays the payee for what was delivered, less the fee, and frees the rest. 0 frees all of it."""

    hold_id: str
    amount_micro_credits: int


LedgerCommand = OpenHold | MarkDelivered | SettleHold


class LedgerOutcome(StrEnum):
    """What became of a command. A repeated command answers as it did the first time."""

    APPLIED = "applied"
    INSUFFICIENT_CREDITS = "insufficient_credits"
    CONFLICT = "conflict"
    """The id is known with other values, the hold is closed with another amount, or there is no such hold."""


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
