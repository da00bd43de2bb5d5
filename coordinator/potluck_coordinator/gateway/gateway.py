"""The gateway's composition root: three ports, `links` and `requests`, wired together and kept going.

Decides the order of starting and stopping, and how often nodes are judged and reported, queues served, and unfinished answers marked with
what they have earned (by `requests`). Leave to serve is asked of the directory once, at the start; then come snapshots: the catalogue for
`requests`, wishes and revocations for `links`, word of revoked keys for `key_cache`; while the directory is away, the last one holds. Keys,
sessions and money are asked of the directory's desks by those who need them. It must not know what any of it is for.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Collection, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import structlog

from potluck_coordinator.desks import DirectoryPort
from potluck_coordinator.gateway.account_servicer import AccountServicer
from potluck_coordinator.gateway.as_set import host_port, link_address, liveness_limits, request_limits
from potluck_coordinator.gateway.attempt_ids import new_attempt_id
from potluck_coordinator.gateway.dispatching import Books
from potluck_coordinator.gateway.draining import answers_left, drain
from potluck_coordinator.gateway.enrolment_servicer import EnrolmentServicer
from potluck_coordinator.gateway.forward_servicer import ForwardServicer
from potluck_coordinator.gateway.grpc_server import GrpcServer, build_grpc_server, build_link_server, build_peer_server
from potluck_coordinator.gateway.http_server import HttpServer
from potluck_coordinator.gateway.inference_servicer import InferenceServicer
from potluck_coordinator.gateway.interceptors import CallInterceptor
from potluck_coordinator.gateway.judging import LOOK_SECONDS
from potluck_coordinator.gateway.key_cache import KeyCache
from potluck_coordinator.gateway.keyed_requests import KeyedRequests
from potluck_coordinator.gateway.ledger_writer import LedgerWriter
from potluck_coordinator.gateway.link_servicer import LinkServicer
from potluck_coordinator.gateway.links import Links
from potluck_coordinator.gateway.parting import let_go
from potluck_coordinator.gateway.peers import Peers
from potluck_coordinator.gateway.pool_servicer import PoolServicer
from potluck_coordinator.gateway.process_load import ProcessLoad
from potluck_coordinator.gateway.requests import RequestService
from potluck_coordinator.metrics import Metrics, PoolReading
from potluck_coordinator.pool_desk import GatewayGrant
from potluck_coordinator.pool_snapshot import PoolNews, PoolSnapshot
from potluck_coordinator.settings import Settings
from potluck_protocol.circles import look_rarely
from potluck_protocol.clock import Clock
from potluck_protocol.connection import ConnectionDocument
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.version import PROTOCOL_VERSION

_log = structlog.get_logger()

REPORT_SECONDS: Final = 1.0
"""Between two reports of nodes, and two marks of what answers have earned: so much of an answer is unpaid if this process dies."""
RETRY_SECONDS: Final = 0.5
"""Between two tries to hear of a directory that is away; the last snapshot holds meanwhile."""
FAILURES_IN_A_ROW_MAX: Final = 20
"""Of a periodic work, that nobody foresaw: five seconds of looks at nodes and queues."""
MEET_SECONDS_MAX: Final = 3.0
"""How long a gateway that starts waits for the others' links and words, before it takes requests for which it knows no node."""
MEET_LOOK_SECONDS: Final = 0.02
HTTP_GRACE_SECONDS: Final = 1.0
"""For the last words of answers that were ended."""
DRAIN_SECONDS_MAX: Final = 3.0
"""How long a stop waits for the last settlements, and words on keys; what is left then is settled at its last mark by the next start."""


class ReplacedError(Exception):
    """Another process serves under this gateway's number."""


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The ports that a gateway serves."""

    http_port: int
    grpc_port: int
    link_port: int
    own_link_port: int
    """Where nodes find this very gateway; where there is but one, the link port."""


class Gateway:
    """One data-plane process.

    Args:
        settings: the operator's.
        directory: where the pool's state is.
        clock: for leases, deadlines and dates.
        number: which of the coordinator's gateways it is, from 0.
        peer_host: the address of this machine by which gateways on others reach it.
    """

    def __init__(self, settings: Settings, directory: DirectoryPort, clock: Clock, number: int = 0, peer_host: str = "127.0.0.1") -> None:
        self._number = number
        self._peer_host = peer_host
        self._settings = settings
        self._directory = directory
        self._clock = clock
        self._metrics = Metrics(number if settings.gateways > 1 else None)
        self._snapshot = PoolSnapshot()
        self._links = Links(directory, liveness_limits(settings), clock, self._serve_queues)
        self._links.measures.token_seconds_max = settings.answer_token_seconds_max
        self._ledger = LedgerWriter(directory.ledger, self._metrics.observe_ledger_commit_seconds)
        self._keys = KeyCache(directory.accounts.authenticate, lambda: self._snapshot.key_generation, clock)
        self._epoch = 0
        self._peers: Peers | None = None
        self._requests: RequestService | None = None
        self._keyed: KeyedRequests | None = None
        self._ports: list[GrpcServer] = []
        self._people_port: GrpcServer | None = None
        self._node_port: GrpcServer | None = None
        self._http: HttpServer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._load = ProcessLoad()

    @property
    def requests(self) -> RequestService:
        """The request path of a started gateway."""
        assert self._requests is not None, "start comes first"
        return self._requests

    async def start(self) -> Endpoints:
        """Registers with the directory, learns the pool, and serves. Raises PotluckError if the directory is away or a port is taken."""
        grant = await self._directory.pool.register_gateway(self._number)
        self._epoch = grant.epoch
        self._links.registered(grant.epoch, grant.fingerprint_key)
        peers = self._peers = Peers(grant.epoch, grant.peer, self._links, self._clock, self._serve_queues)
        self._take(await self._directory.pool.watch(self._snapshot.version))
        books = Books(
            ledger=self._ledger,
            replica_payees=lambda: self._snapshot.replica_payees,
            new_attempt_id=lambda: new_attempt_id(self._clock.unix_ms()),
            gateway_epoch=grant.epoch,
        )
        requests = self._requests = RequestService(
            links=self._links,
            books=books,
            catalogue=lambda: self._snapshot.models,
            limits=request_limits(self._settings),
            clock=self._clock,
            draw=random.random,
            flex_models=lambda: self._snapshot.flex_models,
            on_hedge=self._metrics.observe_hedge,
        )
        requests.gate.remember(grant.gate_counts)
        self._metrics.watch_pool(lambda: self._reading(requests))
        self._tasks = [
            asyncio.ensure_future(work)
            for work in (
                self._ledger.run(),
                self._watch(),
                _every(LOOK_SECONDS, self._tick),
                _every(REPORT_SECONDS, self._mark_delivered),
                _every(REPORT_SECONDS, self._report),
            )
        ]
        interceptor = CallInterceptor(self._keys, lambda: self._links.outcasts, self._links.is_enrolled, self._clock, self._gateway_epochs)
        link_port, own_link_port = await self._serve_nodes(grant, interceptor)
        await self._join_others(grant, interceptor, peers, own_link_port)
        http_port, grpc_port = await self._serve_people(grant, interceptor, requests, link_port)
        look_rarely()
        _log.info("gateway_serving", number=self._number, epoch=grant.epoch, pool_id=grant.pool_id)
        return Endpoints(http_port, grpc_port, link_port, own_link_port)

    async def run(self) -> None:
        """Waits for as long as everything behind the ports is at work; raises what ended a part of it."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        raise RuntimeError("a part of the gateway ended by itself")

    async def drain(self, seconds_max: float) -> int:
        """Lets what runs go on to its end, and everybody else go elsewhere; how many answers are left after so long. `stop` comes next."""
        assert self._http is not None, "start comes first"
        assert self._people_port is not None
        return await drain(
            http=self._http,
            people=self._people_port,
            nodes=self._node_port if len(self._snapshot.gateways) > 1 else None,
            links=self._links,
            requests=self.requests,
            seconds_max=seconds_max,
        )

    @property
    def load(self) -> tuple[int, int]:
        """The answers under way, other gateways' on these nodes included, and the nodes."""
        return answers_left(self._links, self.requests), len(self._links)

    async def stop(self) -> None:
        """Ends answers with an error, says goodbye to the nodes, hands the last settlements over and closes the ports."""
        if self._requests is not None:
            await self._requests.stop()
        if self._keyed is not None:
            await self._keyed.stop()
        await self._links.stop()
        if self._peers is not None:
            await self._peers.stop()
        if self._requests is not None:
            with suppress(PotluckError):
                await self._note_counts()
        # Before the ports: nothing new is dispatched without links, and closing them may take as long as a client cares to.
        await self._drain_books()
        if self._http is not None:
            await self._http.stop(HTTP_GRACE_SECONDS)
        for port in self._ports:
            await port.stop(grace_seconds=0.5)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _drain_books(self) -> None:
        """Settlements and words on keys beside each other: they wait for the same books."""
        keys = [] if self._keyed is None else [self._keyed.drain(DRAIN_SECONDS_MAX)]
        ledger_drained, *_ = await asyncio.gather(self._ledger.drain(DRAIN_SECONDS_MAX), *keys)
        if not ledger_drained:
            _log.error("ledger_not_drained", meaning="open holds are settled at their last mark by the next start")

    async def _serve_nodes(self, grant: GatewayGrant, interceptor: CallInterceptor) -> tuple[int, int]:
        """Opens the link port, and the one beside it that is this gateway's own, where there are several."""
        settings = self._settings
        servicer = LinkServicer(self._links, self._directory, self._clock)
        nodes = self._node_port = build_link_server(grant, interceptor, servicer, shared=settings.gateways > 1)
        self._ports.append(nodes)
        own_link_port = settings.own_link_port_of(self._number)
        if own_link_port is not None:
            own_link_port = await nodes.add_own_port(settings.host, own_link_port)
        link_port = await nodes.start(settings.host, settings.link_port)
        return link_port, own_link_port or link_port

    async def _join_others(self, grant: GatewayGrant, interceptor: CallInterceptor, peers: Peers, own_link_port: int) -> None:
        """Says where this gateway is reached, and waits a little until it has heard of the others' nodes: people come only then."""
        peer_address = ""
        if self._settings.gateways > 1:
            server = build_peer_server(grant, interceptor, ForwardServicer(self._links, peers, self._clock, self._serve_queues))
            self._ports.append(server)
            peer_address = host_port(self._peer_host, await server.start(self._peer_host, 0))
        nodes_address = link_address(self._settings, self._peer_host, own_link_port)
        await self._directory.pool.announce_gateway(grant.epoch, peer_address, nodes_address)
        if not peer_address:
            return
        others = (_every(LOOK_SECONDS, partial(self._meet_others, peers)), peers.follow(self._directory.pool))
        self._tasks += [asyncio.ensure_future(work) for work in others]
        give_up_at = self._clock.monotonic_seconds() + MEET_SECONDS_MAX
        while not peers.has_met(self._snapshot.gateways) and self._clock.monotonic_seconds() < give_up_at:  # noqa: ASYNC110 - two know
            await asyncio.sleep(MEET_LOOK_SECONDS)

    async def _serve_people(
        self, grant: GatewayGrant, interceptor: CallInterceptor, requests: RequestService, link_port: int
    ) -> tuple[int, int]:
        """Opens the http and the grpc port."""
        settings = self._settings
        shared = settings.gateways > 1
        keyed = self._keyed = KeyedRequests(
            requests, self._directory.idempotency, self._clock, hash_key=grant.fingerprint_key, gateway_epoch=grant.epoch
        )
        people = self._people_port = build_grpc_server(
            grant,
            interceptor,
            enrolment=EnrolmentServicer(self._directory.enrolment),
            inference=InferenceServicer(requests, keyed, self._metrics, self._clock),
            account=AccountServicer(self._directory.accounts, self._directory.ledger),
            pool=PoolServicer(self._directory.nodes, self._directory.catalogue, requests, self._links, self._clock),
            shared=shared,
        )
        self._ports.append(people)
        grpc_port = await people.start(settings.host, settings.grpc_port)
        document = ConnectionDocument(
            PROTOCOL_VERSION, grant.pool_id, grpc_port, link_port, settings.public_host, grant.server.ca_certificate_pem
        )
        self._http = HttpServer(
            requests,
            self._keys,
            document.to_json(),
            self._metrics,
            self._clock,
            keyed=keyed,
            tls_certificate=settings.http_tls_certificate,
            tls_key=settings.http_tls_key,
        )
        return await self._http.start(settings.host, settings.http_port, shared=shared), grpc_port

    def _gateway_epochs(self) -> Collection[int]:
        return self._snapshot.gateways.keys()

    async def _meet_others(self, peers: Peers) -> None:
        await peers.meet(self._snapshot.gateways)
        await peers.tell(self._directory.pool)

    async def _watch(self) -> None:
        """Follows the directory's snapshots for ever; while it is away, the last one holds."""
        while True:
            try:
                self._take(await self._directory.pool.watch(self._snapshot.version))
            except PotluckError as error:
                _log.warning("directory_unreachable", code=error.code)
                await asyncio.sleep(RETRY_SECONDS)

    def _reading(self, requests: RequestService) -> PoolReading:
        queued = {model_id: requests.queues.queued_count(model_id) for model_id in self._snapshot.models}
        return PoolReading(
            queued, len(self._links), requests.in_flight_count, len(self._links.refused_requests), requests.gate.compliance()
        )

    def _take(self, news: PoolNews) -> None:
        if news.version != self._snapshot.version:
            self._snapshot = self._snapshot.with_news(news)
            self._links.take_snapshot(self._snapshot)

    def _serve_queues(self) -> None:
        if self._requests is not None:
            self._requests.queues.serve_soon()

    async def _tick(self) -> None:
        self._links.tick()
        self.requests.queues.serve_all()

    async def _mark_delivered(self) -> None:
        """Beside the report, which may wait for the directory's plan."""
        self.requests.mark_delivered()

    async def _report(self) -> None:
        self._links.leases.adapt(len(self._links), self._load.note(time.process_time(), self._clock.monotonic_seconds()))
        try:
            surplus_count = await self._links.report(self.requests.waiting_counts)
        except PotluckError as error:
            if error.code is ErrorCode.ALREADY_EXISTS:
                # A ghost's clients would wait for holds that nobody grants it.
                raise ReplacedError(error.message) from error
            raise
        # The directory takes a gateway that was killed for there a while longer; nodes sent to it would come back, again and again.
        if self._peers is not None and self._peers.has_met(self._snapshot.gateways):
            let_go(self._links, surplus_count)
        await self._note_counts()

    async def _note_counts(self) -> None:
        """Hands what the gate has counted to the books and to other gateways', and hears theirs; what is not taken is told again."""
        gate = self.requests.gate
        untold = gate.take_untold()
        if not untold and not gate.limits.is_shared:
            return
        try:
            others = await self._directory.pool.note_counts(untold, gate.others_version, gateway_epoch=self._epoch)
        except PotluckError:
            gate.put_back(untold)
            raise
        if gate.limits.is_shared:
            gate.learn(others)


async def _every(seconds: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Repeats the work until cancelled; a `PotluckError` costs that one turn.

    So does anything unforeseen, for the answers of all nodes are under way in this process; what comes again and again ends it.
    """
    failure_count = 0
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
            failure_count = 0
        except PotluckError as error:
            _log.warning("periodic_work_failed", code=error.code)
        except ReplacedError:
            raise
        except Exception:
            failure_count += 1
            if failure_count > FAILURES_IN_A_ROW_MAX:
                raise
            _log.exception("periodic_work_failed_unexpectedly", failure_count=failure_count)
