"""A pool's books for tests: a store, the desks on it, a clock that only tests move, and bytes that come out the same each time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, text

from potluck_coordinator.desks import AccountRecord
from potluck_coordinator.directory.accounts import Accounts, open_account
from potluck_coordinator.directory.bootstrap import found_pool
from potluck_coordinator.directory.enrolment import Enrolments
from potluck_coordinator.directory.ledger import LedgerDesk
from potluck_coordinator.domain.gateways import GatewayRecord
from potluck_coordinator.domain.ledger import LedgerAccountKind, OpenHold
from potluck_coordinator.domain.payees import PayeeShare
from potluck_coordinator.storage import schema
from potluck_coordinator.storage.audit import AuditRun
from potluck_coordinator.storage.store import Store, _Unit
from potluck_protocol.values import AccountId

BOB_ALONE = MappingProxyType({"bob": 1})
START_UNIX_MS = 1_750_000_000_000
FEE_BASIS_POINTS = 500
GRANT = 1_000


def keep_books_of_version(url: str, revision: str, *statements: str, **values: object) -> None:
    """Writes into an empty database what an earlier version left; the statements may name the values, as `:name`."""
    config = Config()
    config.set_main_option("script_location", str(Path(schema.__file__).with_name("migrations")))
    engine = create_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        for statement in statements:
            connection.execute(text(statement), values)
    engine.dispose()


class MovableClock:
    def __init__(self) -> None:
        self.now_ms = START_UNIX_MS

    def monotonic_seconds(self) -> float:
        return self.now_ms / 1000

    def unix_ms(self) -> int:
        return self.now_ms

    def advance(self, seconds: float) -> None:
        self.now_ms += int(seconds * 1000)


class CountingAuthority:
    """Says which key it was asked to certify; real certificates are tested with the real authority."""

    def __init__(self) -> None:
        self.issued: list[bytes] = []

    def issue_node_certificate(self, public_key_spki_der: bytes, now_unix_ms: int) -> str:
        self.issued.append(public_key_spki_der)
        return f"certificate {len(self.issued)} at {now_unix_ms}"


class Books:
    """Everything that the desks need, on one store."""

    def __init__(self, url: str, grant: int = GRANT) -> None:
        self.clock = MovableClock()
        self.random_bytes = random.Random(7).randbytes
        self.grant = grant
        self.revocations = 0
        self.joins = 0
        self.is_sqlite = url.startswith("sqlite")
        self.store = Store(url)
        try:
            self.store.migrate()
            self.gateways_are(1)
        except BaseException:
            self.store.close()
            raise
        self.authority = CountingAuthority()
        self.ledger = LedgerDesk(self.store, self.clock, fee_basis_points=FEE_BASIS_POINTS)
        self.accounts = Accounts(
            self.store, self.clock, self.random_bytes, grant_micro_credits=grant, key_was_revoked=self._key_was_revoked
        )
        self.enrolment = Enrolments(self.store, self.clock, self.authority, node_has_joined=self._node_has_joined)

    async def found(self) -> str:
        return await found_pool(self.store, self.clock, self.random_bytes, grant_micro_credits=self.grant)

    def add_people(self, *names: str, grant: int = GRANT) -> None:
        """Opens accounts whose ids are the names, for threads and machines that have no event loop."""

        def add(work) -> None:
            work.ledger.open_account(LedgerAccountKind.ISSUER)
            work.ledger.open_account(LedgerAccountKind.FEE)
            for name in names:
                record = AccountRecord(AccountId(name), name, operator=False, created_at_unix_ms=self.clock.now_ms)
                open_account(work, record, grant)

        self.run_now(add)

    def gateways_are(self, *epochs: int) -> None:
        """The gateways 0, 1, ... have these epochs now, and nobody has any other."""

        def put(work) -> None:
            work.gateways.retire(len(epochs))
            for number, epoch in enumerate(epochs):
                work.gateways.put(GatewayRecord(number, epoch))

        self.run_now(put)

    def run_now(self, work):
        """As `Store.run`, for threads and machines that have no event loop; the coordinator has one wherever it uses its store."""
        return self.store._submit(_Unit(work)).result()

    def apply_now(self, *commands):
        return self.run_now(self.ledger.work_for(commands))

    def audit_now(self):
        run = AuditRun(self.clock.now_ms)
        while (report := self.run_now(lambda work: run.advance(work.audit))) is None:
            pass
        return report

    def execute(self, *statements: str) -> None:
        """Runs them in one transaction, past everything that the coordinator would do instead."""
        self.run_now(lambda work: [work.audit._connection.execute(text(statement)) for statement in statements])

    def rows(self, query: str):
        return self.run_now(lambda work: work.audit._connection.execute(text(query)).all())

    def execute_despite(self, trigger: str, *statements: str) -> None:
        """As `execute`, but for one trigger that would refuse it."""
        if self.is_sqlite:
            self.execute(f"DROP TRIGGER {trigger}", *statements)
        else:
            ((table,),) = self.rows(f"SELECT tgrelid::regclass::text FROM pg_trigger WHERE tgname = '{trigger}'")
            self.execute(f"ALTER TABLE {table} DISABLE TRIGGER {trigger}", *statements)

    def _key_was_revoked(self) -> None:
        self.revocations += 1

    async def _node_has_joined(self) -> None:
        self.joins += 1


@contextmanager
def open_books(url: str = "sqlite://", grant: int = GRANT) -> Iterator[Books]:
    """Books in a database, or in memory."""
    books = Books(url, grant)
    try:
        yield books
    finally:
        books.store.close()


def open_hold(
    hold_id: str,
    *,
    payer: str = "ann",
    payees: Mapping[str, int] = BOB_ALONE,
    amount: int = 100,
    expires_in_ms: int = 60_000,
    epoch: int = 1,
) -> OpenHold:
    """`payees` are weights by account id."""
    shares = tuple(PayeeShare(AccountId(account_id), weight) for account_id, weight in payees.items())
    return OpenHold(hold_id, AccountId(payer), shares, amount, START_UNIX_MS + expires_in_ms, epoch)
