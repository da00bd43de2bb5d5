"""People: their accounts, API keys and join tokens.

Decides who a key speaks for, how long keys and tokens may live, and what a new person starts with. It must not know how a caller presented
its key, or whether it may name another's account: the edges judge that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Final

import structlog

from potluck_coordinator.desks import AccountRecord, JoinTokenRecord, KeyIdentity, KeyRecord
from potluck_coordinator.directory.credentials import (
    RandomBytes,
    checked_label,
    new_account_id,
    new_api_key,
    new_join_token,
    prefix_of_api_key,
    proves,
    secret_sha256,
)
from potluck_coordinator.domain import ledger
from potluck_coordinator.domain.fairness import EARNED_DAYS
from potluck_coordinator.domain.ledger import LedgerAccountKind
from potluck_coordinator.domain.quotas import NO_QUOTAS, KeyQuotas
from potluck_coordinator.storage.store import Store
from potluck_coordinator.storage.unit_of_work import UnitOfWork
from potluck_protocol.clock import Clock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, KeyPrefix, TokenId

JOIN_TOKEN_LIFETIME_SECONDS: Final = 3600
"""Where nobody says otherwise."""
EARNED_REMEMBERED_MS: Final = 600_000
EARNED_REMEMBERED_MAX: Final = 10_000
"""Accounts."""
QUOTA_MAX: Final = 2**53
"""Of any of a key's bounds."""
LIFETIME_SECONDS_MAX: Final = 10 * 365 * 24 * 3600

_log = structlog.get_logger()


class Accounts:
    """The desk `desks.Accounts`.

    Args:
        store: the books.
        clock: for dates and lifetimes.
        random_bytes: makes ids and secrets.
        grant_micro_credits: what a new account starts with.
        key_was_revoked: told after each revocation, so that no gateway goes on trusting what it remembers.
    """

    def __init__(
        self, store: Store, clock: Clock, random_bytes: RandomBytes, *, grant_micro_credits: int, key_was_revoked: Callable[[], None]
    ) -> None:
        self._store = store
        self._clock = clock
        self._random_bytes = random_bytes
        self._grant_micro_credits = grant_micro_credits
        self._key_was_revoked = key_was_revoked
        self._earned_lately: dict[AccountId, tuple[int, int]] = {}

    async def authenticate(self, secret: str) -> KeyIdentity:
        """As `desks.Accounts.authenticate`. The reason for a refusal is told only to who holds the key."""
        prefix = prefix_of_api_key(secret)
        stored = None if prefix is None else await self._store.run(lambda work: work.keys.get(prefix))
        if stored is None or not proves(secret, stored.secret_sha256):
            raise PotluckError(ErrorCode.INVALID_API_KEY, "This API key is not one of this pool's.")
        record = stored.record
        if record.revoked:
            raise PotluckError(ErrorCode.INVALID_API_KEY, f"API key {prefix} has been revoked; ask the operator for another.")
        if 0 < record.expires_at_unix_ms <= self._clock.unix_ms():
            raise PotluckError(ErrorCode.INVALID_API_KEY, f"API key {prefix} has expired; ask the operator for another.")
        return KeyIdentity(
            key_prefix=record.key_prefix,
            account_id=record.account_id,
            operator=record.operator,
            expires_at_unix_ms=record.expires_at_unix_ms,
            quotas=record.quotas,
            earned_micro_credits=await self._earned(record.account_id),
        )

    async def _earned(self, account_id: AccountId) -> int:
        """Lately, by the account's nodes; looked up once in a while, for it may be the sum of a hundred thousand postings."""
        now = self._clock.unix_ms()
        known = self._earned_lately.get(account_id)
        if known is None or now - known[0] > EARNED_REMEMBERED_MS:
            since_unix_ms = now - EARNED_DAYS * 24 * 3600 * 1000
            earned = await self._store.run(lambda work: work.ledger.earned_since(account_id, since_unix_ms))
            self._earned_lately.pop(account_id, None)
            if len(self._earned_lately) >= EARNED_REMEMBERED_MAX:
                del self._earned_lately[next(iter(self._earned_lately))]
            known = self._earned_lately[account_id] = (now, earned)
        return known[1]

    async def create_account(self, name: str) -> AccountRecord:
        """A new person with the pool's grant.

        Raises:
            PotluckError: INVALID_REQUEST for a name that is none, ALREADY_EXISTS for one that is taken.
        """
        name = checked_label(name, "name")
        account = AccountRecord(new_account_id(self._random_bytes), name, operator=False, created_at_unix_ms=self._clock.unix_ms())

        def create(work: UnitOfWork) -> None:
            if work.accounts.named(name) is not None:
                raise PotluckError(ErrorCode.ALREADY_EXISTS, f"There is an account named {name!r}; choose another name.", param="name")
            open_account(work, account, self._grant_micro_credits)

        await self._store.run(create)
        _log.info("account_created", account_id=account.account_id)
        return account

    async def list_accounts(self) -> tuple[AccountRecord, ...]:
        return await self._store.run(lambda work: work.accounts.list_all())

    async def create_key(
        self, account_id: AccountId, name: str, lifetime_seconds: int, *, ends_by_unix_ms: int = 0, quotas: KeyQuotas = NO_QUOTAS
    ) -> tuple[KeyRecord, str]:
        """As `desks.Accounts.create_key`; raises NOT_FOUND for an unknown account, INVALID_REQUEST for a bad name, lifetime or bound."""
        name = checked_label(name, "name")
        _check_lifetime(lifetime_seconds)
        _check_quotas(quotas)
        now_ms = self._clock.unix_ms()
        expires_at_unix_ms = now_ms + lifetime_seconds * 1000 if lifetime_seconds else 0
        if ends_by_unix_ms and not 0 < expires_at_unix_ms <= ends_by_unix_ms:
            left_seconds = (ends_by_unix_ms - now_ms) // 1000
            raise PotluckError(
                ErrorCode.INVALID_REQUEST,
                f"Your own key ends in {left_seconds} s, and one made with it must end before it does: ask for a shorter lifetime.",
                param="lifetime_seconds",
            )
        prefix, api_key = new_api_key(self._random_bytes)

        def create(work: UnitOfWork) -> KeyRecord:
            account = _existing(work, account_id)
            record = KeyRecord(
                key_prefix=prefix,
                account_id=account_id,
                name=name,
                created_at_unix_ms=now_ms,
                expires_at_unix_ms=expires_at_unix_ms,
                revoked=False,
                operator=account.operator,
                quotas=quotas,
            )
            work.keys.add(record, secret_sha256(api_key))
            return record

        record = await self._store.run(create)
        _log.info("key_created", account_id=account_id, key_prefix=prefix)
        return record, api_key

    async def list_keys(self, account_id: AccountId) -> tuple[KeyRecord, ...]:
        return await self._store.run(lambda work: work.keys.list_of(_existing(work, account_id).account_id))

    async def set_key_quotas(self, key_prefix: KeyPrefix, account_id: AccountId | None, changes: Mapping[str, int]) -> KeyRecord:
        """As `desks.Accounts.set_key_quotas`; gateways ask anew whose keys are good, and learn of it so."""

        def change(work: UnitOfWork) -> KeyRecord:
            record = _owned_key(work, key_prefix, account_id)
            quotas = replace(record.quotas, **changes)
            _check_quotas(quotas)
            work.keys.set_quotas(key_prefix, quotas)
            return replace(record, quotas=quotas)

        record = await self._store.run(change)
        self._key_was_revoked()
        _log.info("key_quotas_set", key_prefix=key_prefix, **asdict(record.quotas))
        return record

    async def revoke_key(self, key_prefix: KeyPrefix, account_id: AccountId | None) -> None:
        """As `desks.Accounts.revoke_key`; a key revoked before stays so."""

        def revoke(work: UnitOfWork) -> None:
            _owned_key(work, key_prefix, account_id)
            work.keys.revoke(key_prefix)

        await self._store.run(revoke)
        self._key_was_revoked()
        _log.info("key_revoked", key_prefix=key_prefix)

    async def create_join_token(self, account_id: AccountId, lifetime_seconds: int) -> tuple[JoinTokenRecord, str]:
        """A token for one node, and its secret, which is not kept; 0 seconds means the usual hour."""
        _check_lifetime(lifetime_seconds)
        token_id, secret = new_join_token(self._random_bytes)
        now_ms = self._clock.unix_ms()
        record = JoinTokenRecord(
            token_id=token_id,
            account_id=account_id,
            created_at_unix_ms=now_ms,
            expires_at_unix_ms=now_ms + (lifetime_seconds or JOIN_TOKEN_LIFETIME_SECONDS) * 1000,
            used_by_node_id=None,
            revoked=False,
        )

        def create(work: UnitOfWork) -> None:
            _existing(work, account_id)
            work.join_tokens.add(record, secret_sha256(secret))

        await self._store.run(create)
        _log.info("join_token_created", account_id=account_id, token_id=token_id)
        return record, secret

    async def list_join_tokens(self, account_id: AccountId) -> tuple[JoinTokenRecord, ...]:
        return await self._store.run(lambda work: work.join_tokens.list_of(_existing(work, account_id).account_id))

    async def revoke_join_token(self, token_id: TokenId, account_id: AccountId | None) -> None:
        """Revokes it for good; the node that spent it stays. NOT_FOUND as with keys."""

        def revoke(work: UnitOfWork) -> None:
            stored = work.join_tokens.get(token_id)
            if stored is None or account_id not in (None, stored.record.account_id):
                raise PotluckError(
                    ErrorCode.NOT_FOUND, "There is no such join token on this account; see `potluck tokens list`.", param="token_id"
                )
            work.join_tokens.revoke(token_id)

        await self._store.run(revoke)
        _log.info("join_token_revoked", token_id=token_id)


def open_account(work: UnitOfWork, account: AccountRecord, grant_micro_credits: int) -> None:
    """Writes a new person with both ledger accounts and the grant."""
    work.accounts.add(account)
    work.ledger.open_account(LedgerAccountKind.USER, account.account_id)
    work.ledger.open_account(LedgerAccountKind.NODE_OWNER, account.account_id)
    granted = ledger.grant(account.account_id, grant_micro_credits)
    if granted is not None:
        work.ledger.post(granted, account.created_at_unix_ms)


def _existing(work: UnitOfWork, account_id: AccountId) -> AccountRecord:
    account = work.accounts.get(account_id)
    if account is None:
        raise PotluckError(ErrorCode.NOT_FOUND, f"There is no account {account_id}; see `potluck accounts list`.", param="account_id")
    return account


def _owned_key(work: UnitOfWork, key_prefix: KeyPrefix, account_id: AccountId | None) -> KeyRecord:
    """A key that the account may change; None may change any."""
    stored = work.keys.get(key_prefix)
    if stored is None or account_id not in (None, stored.record.account_id):
        raise PotluckError(ErrorCode.NOT_FOUND, "There is no such API key on this account; see `potluck keys list`.", param="key_prefix")
    return stored.record


def _check_quotas(quotas: KeyQuotas) -> None:
    for name, bound in asdict(quotas).items():
        if not 0 <= bound <= QUOTA_MAX:
            raise PotluckError(ErrorCode.INVALID_REQUEST, f"{name} must be from 0, which is no bound, to {QUOTA_MAX}.", param=name)


def _check_lifetime(lifetime_seconds: int) -> None:
    if not 0 <= lifetime_seconds <= LIFETIME_SECONDS_MAX:
        raise PotluckError(
            ErrorCode.INVALID_REQUEST, f"lifetime_seconds must be from 0 to {LIFETIME_SECONDS_MAX}.", param="lifetime_seconds"
        )
