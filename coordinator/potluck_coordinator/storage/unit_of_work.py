"""What one transaction can reach: a repository for each part of the books.

Decides only that no session is made for what needs none: a payment, which has a connection's statements alone. `Store` begins and ends the
transaction around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from types import TracebackType
from typing import Self

from sqlalchemy import Connection
from sqlmodel import Session

from potluck_coordinator.storage.accounts import AccountRepository
from potluck_coordinator.storage.audit import Audit
from potluck_coordinator.storage.catalogue import CatalogueRepository
from potluck_coordinator.storage.gateways import GatewayRepository
from potluck_coordinator.storage.groups import GroupRepository
from potluck_coordinator.storage.holds import HoldRepository
from potluck_coordinator.storage.idempotency import IdempotencyRepository
from potluck_coordinator.storage.join_tokens import JoinTokenRepository
from potluck_coordinator.storage.key_days import KeyDayRepository
from potluck_coordinator.storage.keys import KeyRepository
from potluck_coordinator.storage.ledger import LedgerRepository
from potluck_coordinator.storage.lethal_requests import LethalRequestRepository
from potluck_coordinator.storage.nodes import NodeRepository
from potluck_coordinator.storage.paces import PaceRepository
from potluck_coordinator.storage.plan import PlanRepository
from potluck_coordinator.storage.promise import PromiseRepository
from potluck_coordinator.storage.schema import migrate
from potluck_coordinator.storage.state import StateName, StateRepository
from potluck_coordinator.storage.uptime import UptimeRepository


class UnitOfWork:
    """The repositories of one transaction; use them inside the work that `Store` was given, and nowhere else."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.ledger = LedgerRepository(connection)
        self.holds = HoldRepository(connection)
        self.gateways = GatewayRepository(connection)
        self.audit = Audit(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Writes what is left to write, unless the work failed."""
        if "_session" not in self.__dict__:
            return
        with self._session as session:
            if error is None:
                session.flush()

    def migrate(self) -> None:
        """Brings the schema up to date; nothing else may then be in the unit."""
        migrate(self._connection)

    @property
    def advanced(self) -> Mapping[StateName, int]:
        """How far it has counted: the counters that it moved."""
        return self.state.advanced if "state" in self.__dict__ else {}

    @cached_property
    def _session(self) -> Session:
        # populate_existing: triggers and bulk updates change rows behind the session's back
        return Session(self._connection, join_transaction_mode="rollback_only", execution_options={"populate_existing": True})

    @cached_property
    def accounts(self) -> AccountRepository:
        return AccountRepository(self._session)

    @cached_property
    def keys(self) -> KeyRepository:
        return KeyRepository(self._session)

    @cached_property
    def key_days(self) -> KeyDayRepository:
        return KeyDayRepository(self._session)

    @cached_property
    def join_tokens(self) -> JoinTokenRepository:
        return JoinTokenRepository(self._session)

    @cached_property
    def nodes(self) -> NodeRepository:
        return NodeRepository(self._session)

    @cached_property
    def catalogue(self) -> CatalogueRepository:
        return CatalogueRepository(self._session)

    @cached_property
    def plan(self) -> PlanRepository:
        return PlanRepository(self._session)

    @cached_property
    def groups(self) -> GroupRepository:
        return GroupRepository(self._session)

    @cached_property
    def lethal_requests(self) -> LethalRequestRepository:
        return LethalRequestRepository(self._session)

    @cached_property
    def idempotency(self) -> IdempotencyRepository:
        return IdempotencyRepository(self._session)

    @cached_property
    def uptime(self) -> UptimeRepository:
        return UptimeRepository(self._session)

    @cached_property
    def promise(self) -> PromiseRepository:
        return PromiseRepository(self._session)

    @cached_property
    def paces(self) -> PaceRepository:
        return PaceRepository(self._session)

    @cached_property
    def state(self) -> StateRepository:
        return StateRepository(self._session)
