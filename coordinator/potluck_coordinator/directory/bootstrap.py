"""What a pool needs before its first request: an id, the ledger's own accounts, its operator, and a catalogue.

Decides that id, ledger accounts and operator are founded once, in one transaction; that each start offers the catalogue anew, without
undoing a wish for a model that is still offered, or what the operator added or withdrew; and that an operator's key which is lost or
revoked is replaced at the next start. It must not know where the operator's key is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from potluck_coordinator.desks import AccountRecord
from potluck_coordinator.directory.accounts import Accounts, open_account
from potluck_coordinator.directory.credentials import RandomBytes, new_pool_id
from potluck_coordinator.domain.catalogue import CatalogueEntry, Deployment
from potluck_coordinator.domain.ledger import LedgerAccountKind
from potluck_coordinator.storage.catalogue import Origin
from potluck_coordinator.storage.state import StateName
from potluck_coordinator.storage.store import Store
from potluck_coordinator.storage.unit_of_work import UnitOfWork
from potluck_protocol.clock import Clock
from potluck_protocol.errors import PotluckError
from potluck_protocol.values import AccountId

OPERATOR_ACCOUNT_ID: Final = AccountId("acct_operator")
OPERATOR_NAME: Final = "operator"


async def found_pool(store: Store, clock: Clock, random_bytes: RandomBytes, *, grant_micro_credits: int) -> str:
    """Makes what is missing; the pool's id."""
    fresh_pool_id, now_ms = new_pool_id(random_bytes), clock.unix_ms()

    def found(work: UnitOfWork) -> str:
        pool_id = work.state.get(StateName.POOL_ID)
        if pool_id is not None:
            return pool_id
        work.state.put(StateName.POOL_ID, fresh_pool_id)
        work.ledger.open_account(LedgerAccountKind.ISSUER)
        work.ledger.open_account(LedgerAccountKind.FEE)
        operator = AccountRecord(OPERATOR_ACCOUNT_ID, OPERATOR_NAME, operator=True, created_at_unix_ms=now_ms)
        open_account(work, operator, grant_micro_credits)
        return fresh_pool_id

    return await store.run(found)


async def operator_key(accounts: Accounts, known_key: str | None) -> str:
    """The key that the operator's file holds, if it is still good, else a new one that never ends.

    So the file may be lost, and the operator may revoke the key: the next start makes another.
    """
    if known_key is not None:
        try:
            identity = await accounts.authenticate(known_key)
        except PotluckError:
            pass
        else:
            if identity.account_id == OPERATOR_ACCOUNT_ID:
                return known_key
    _, api_key = await accounts.create_key(OPERATOR_ACCOUNT_ID, "operator", 0)
    return api_key


async def offer(store: Store, built_in: Iterable[CatalogueEntry], own: Iterable[CatalogueEntry] = ()) -> None:
    """Makes the catalogue the given entries beside those that the operator added by command.

    The operator's word wins over a built-in entry of the same name: an entry of the catalogue file over all others, an added one over what
    ships. A model that is new here and can be served is deployed on every node that may serve it; a wish that was withdrawn stays so.
    """
    files = {entry.model_id: entry for entry in own}
    shipped = {entry.model_id: entry for entry in built_in if entry.model_id not in files}

    def write(work: UnitOfWork) -> None:
        origins = work.catalogue.origins()
        added = {model_id for model_id, origin in origins.items() if origin is Origin.ADDED}
        for gone in origins.keys() - files.keys() - shipped.keys() - added:
            work.catalogue.remove(gone)
        wished = {deployment.model_id for deployment in work.catalogue.deployments()}
        work.catalogue.put(files.values(), Origin.FILE)
        work.catalogue.put((entry for entry in shipped.values() if entry.model_id not in added), Origin.BUILT_IN)
        for entry in (*files.values(), *shipped.values()):
            if entry.model_id not in origins.keys() | wished and entry.file is not None:
                work.catalogue.deploy(Deployment(entry.model_id))

    await store.run(write)
