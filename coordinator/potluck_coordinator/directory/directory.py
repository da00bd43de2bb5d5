"""The directory's composition root: the books, eight desks over them, and the chores that time brings.

Decides what is made at a start, in which order, and how often chores run: overdue holds settled (`ledger`), ended minutes judged (`nodes`).
It must not know Ray, gRPC or HTTP.
"""

from __future__ import annotations

import asyncio
import gc
import secrets
from typing import Final

import structlog

from potluck_coordinator.catalogue_file import built_in_catalogue, read_catalogue
from potluck_coordinator.directory.absences import Absences
from potluck_coordinator.directory.accounts import Accounts
from potluck_coordinator.directory.board import SnapshotBoard
from potluck_coordinator.directory.bootstrap import found_pool, offer, operator_key
from potluck_coordinator.directory.catalogue import Catalogue
from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_coordinator.directory.enrolment import Enrolments
from potluck_coordinator.directory.gateways import Gateways
from potluck_coordinator.directory.hub import Hub
from potluck_coordinator.directory.idempotency import IdempotencyKeys
from potluck_coordinator.directory.ledger import LedgerDesk
from potluck_coordinator.directory.lethal_requests import LethalRequests, load_or_create_key
from potluck_coordinator.directory.nodes import Nodes
from potluck_coordinator.directory.operator_file import known_operator_key, local_url, write_operator_file
from potluck_coordinator.directory.paces import Paces
from potluck_coordinator.directory.pool import Pool
from potluck_coordinator.settings import Settings
from potluck_coordinator.storage.state import StateName
from potluck_coordinator.storage.store import OWN_ERRORS, Store
from potluck_protocol.clock import Clock
from potluck_protocol.connection import certificate_hash
from potluck_protocol.errors import ErrorCode, PotluckError

CHORES_SECONDS: Final = 1.0
COLLECT_SECONDS: Final = 3600.0
"""Garbage that went round in circles for longer than a few seconds stays for so long."""
SETTLEMENTS_SECONDS: Final = 30.0
"""After an absence of the database's or of our own, gateways have so long to settle before holds that ran out end at their marks."""
_NEVER: Final = 2**31 - 1
SNAPSHOT_VERSIONS_PER_START: Final = 1_000_000
"""Versions must grow over restarts, and are not worth a commit each."""

_log = structlog.get_logger()


def spare_collections() -> None:
    """For the directory's own process: a collection over all that a large pool's plans hold stops every thread for a tenth of a second.

    So what is young is collected as ever, in steps of some milliseconds, and all of it once an hour, in `Directory.run_background`.
    """
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _NEVER)


async def _board(store: Store) -> SnapshotBoard:
    """Whose versions are higher than those of any earlier run."""
    return SnapshotBoard(await store.run(lambda work: work.state.advance(StateName.SNAPSHOT_VERSION)) * SNAPSHOT_VERSIONS_PER_START)


async def _tell_operator(settings: Settings, accounts: Accounts, authority: CertificateAuthority) -> None:
    api_key = await operator_key(accounts, known_operator_key(settings.operator_file))
    write_operator_file(settings.operator_file, local_url(settings, certificate_hash(authority.ca_certificate_pem)), api_key)


async def _offer(store: Store, settings: Settings) -> None:
    own = read_catalogue(settings.catalogue_file) if settings.catalogue_file is not None else ()
    await offer(store, built_in_catalogue(), own)


class Directory:
    """`DirectoryPort` in this process; `open` makes one."""

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        accounts: Accounts,
        ledger: LedgerDesk,
        enrolment: Enrolments,
        nodes: Nodes,
        catalogue: Catalogue,
        lethal: LethalRequests,
        idempotency: IdempotencyKeys,
        absences: Absences,
        paces: Paces,
        gateways: Gateways,
        pool: Pool,
        term: int,
    ) -> None:
        self._store = store
        self._clock = clock
        self.term: Final = term
        """Of this run of the coordinator on its database."""
        self.accounts: Final = accounts
        self.ledger: Final = ledger
        self.enrolment: Final = enrolment
        self.nodes: Final = nodes
        self.catalogue: Final = catalogue
        self.lethal: Final = lethal
        self.idempotency: Final = idempotency
        self.pool: Final = pool
        self._absences = absences
        self._paces = paces
        self._gateways = gateways
        nodes.on_reports = paces.take
        nodes.gateway_speaks = gateways.hear

    @classmethod
    async def open(cls, settings: Settings, clock: Clock, term: int | None = None) -> Directory:
        """Opens the books, making what a first start needs, and writes the operator's file.

        Args:
            settings: the operator's.
            clock: for dates.
            term: of the run that this directory is started again for; None at a coordinator's start.

        Raises:
            PotluckError: for a database, CA folder or catalogue that cannot be used, saying why; also where another coordinator has it.
        """
        authority = CertificateAuthority.load_or_create(settings.certificate_authority_dir, clock.unix_ms())
        fingerprint_key = load_or_create_key(settings.fingerprint_key_file)
        store = Store(settings.database_url)
        try:
            store.migrate()
            term = store.begin_term(term)
            grant = settings.grant_micro_credits
            pool_id = await found_pool(store, clock, secrets.token_bytes, grant_micro_credits=grant)
            await _offer(store, settings)
            board = await _board(store)
            accounts = Accounts(store, clock, secrets.token_bytes, grant_micro_credits=grant, key_was_revoked=board.forget_keys)
            ledger = LedgerDesk(store, clock, fee_basis_points=settings.fee_basis_points)
            gateways = Gateways(store, board, clock, settings.gateways)
            nodes = Nodes(store, board, clock, settings.lease_ttl_ms / 1000)
            lethal = LethalRequests(store, board, clock)
            pool = Pool(
                pool_id=pool_id,
                store=store,
                board=board,
                authority=authority,
                gateways=gateways,
                ledger=ledger,
                nodes=nodes,
                fingerprint_key=fingerprint_key,
                clock=clock,
            )
            await pool.load()
            await lethal.load()
            await nodes.refresh()
            await _tell_operator(settings, accounts, authority)
        except BaseException:
            store.close()
            raise
        return cls(
            store=store,
            clock=clock,
            accounts=accounts,
            ledger=ledger,
            enrolment=Enrolments(store, clock, authority, node_has_joined=nodes.refresh),
            nodes=nodes,
            catalogue=Catalogue(store, nodes, built_in_catalogue(), lambda stop: Hub(None, stop)),
            lethal=lethal,
            idempotency=IdempotencyKeys(store, clock),
            absences=Absences(store, board, clock),
            paces=Paces(store, board, clock),
            gateways=gateways,
            pool=pool,
            term=term,
        )

    async def run_background(self) -> None:
        """Settles overdue holds, books judged minutes and plans anew, until cancelled.

        Raises:
            EndedError: once another coordinator has taken the database over, or it has come back with older books.
        """
        collected_at = self._clock.monotonic_seconds()
        while True:
            await asyncio.sleep(CHORES_SECONDS)
            self._store.check()
            if self._clock.monotonic_seconds() - collected_at >= COLLECT_SECONDS:
                collected_at = self._clock.monotonic_seconds()
                gc.collect()
            self._gateways.look()
            await self.do_chores()

    async def do_chores(self) -> None:
        """Each of them once. One that fails is tried again the next time, and keeps none of the others from being done."""
        for chore in (
            self._settle_expired,
            self.nodes.judge_minutes,
            self.nodes.refresh_old_plan,
            self.lethal.forget_old,
            self.idempotency.forget_old,
            self._absences.foresee,
            self._paces.judge_minute,
        ):
            try:
                await chore()
            except (PotluckError, *OWN_ERRORS) as error:
                code = error.code if isinstance(error, PotluckError) else type(error).__name__
                _log.warning("chore_failed", chore=chore.__qualname__, code=code)
                if code == ErrorCode.COORDINATOR_UNAVAILABLE:
                    return  # the database is away, and the others would say the same

    async def _settle_expired(self) -> None:
        if self._store.there_seconds >= SETTLEMENTS_SECONDS:
            await self.ledger.settle_expired(self._clock.unix_ms())

    def close(self) -> None:
        """Finishes what waits and lets go of the database."""
        self.catalogue.close()
        self._store.close()
