"""What one transaction can reach: a repository for each part of the books.

Decides nothing; `Store` begins and ends the transaction around it.
"""

from __future__ import annotations

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
from potluck_coordinator.storage.state import StateRepository
from potluck_coordinator.storage.uptime import UptimeRepository


class UnitOfWork:
    """The repositories of one transaction; use them inside the work that `Store` was given, and nowhere else."""

    def __init__(self, session: Session, connection: Connection) -> None:
        self.accounts = AccountRepository(session)
        self.keys = KeyRepository(session)
        self.key_days = KeyDayRepository(session)
        self.join_tokens = JoinTokenRepository(session)
        self.nodes = NodeRepository(session)
        self.ledger = LedgerRepository(session, connection)
        self.holds = HoldRepository(connection)
        self.audit = Audit(connection)
        self.catalogue = CatalogueRepository(session)
        self.plan = PlanRepository(session)
        self.gateways = GatewayRepository(session, connection)
        self.groups = GroupRepository(session)
        self.lethal_requests = LethalRequestRepository(session)
        self.idempotency = IdempotencyRepository(session)
        self.uptime = UptimeRepository(session)
        self.promise = PromiseRepository(session)
        self.paces = PaceRepository(session)
        self.state = StateRepository(session)
