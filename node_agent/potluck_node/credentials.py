"""What the node shows at the link port of a gateway, and where the coordinator is.

Keeps key and certificate, says when the next one is due by `domain.certificates`, renews a lapsed one through `enrolment`, and opens the
channel to wherever the coordinator is now. Decides how long a request may stay unanswered, and that a full disk does not end an agent that
serves. It must not know the link's frames.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import grpc
import grpc.aio
import structlog

from potluck_node import enrolment
from potluck_node.domain.certificates import CertificateDates, Standing, renew_again_at_unix_ms, renew_at_unix_ms, standing
from potluck_node.gateway_ways import GatewayWays
from potluck_node.identity_store import NodeIdentity, StateFolder
from potluck_node.knocking import knock
from potluck_protocol.channels import LINK_CHANNEL_OPTIONS, PATIENT_LINK_CHANNEL_OPTIONS
from potluck_protocol.clock import Clock
from potluck_protocol.connection import fetch_connection, pinned_url
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.identity import certificate_life, certificate_request

REQUEST_REPEATED_MS: Final = 60_000
"""How long a certificate request may stay without an answer before it is made again."""

_log = structlog.get_logger()


class Credentials:
    """The node's key and certificate, in memory and in its folder.

    Args:
        folder: a folder that has joined.
        clock: time.
        jitter: random numbers from 0 to 1.

    Raises:
        PotluckError: as `StateFolder.identity` and `StateFolder.proof`, where key or identity is missing or damaged.
    """

    def __init__(self, folder: StateFolder, clock: Clock, jitter: Callable[[], float]) -> None:
        self._folder = folder
        self._clock = clock
        self._jitter = jitter
        self.identity: NodeIdentity = folder.identity()
        self.gateways = GatewayWays(folder.path, lambda: self.identity.connection, clock)
        self._private_key_pem, certificate_pem = folder.proof(self.identity)
        self._certificate_pem = b""
        # Those of a certificate that lapsed long ago: then one is fetched before anything is dialled. gRPC must see no empty one.
        self._dates = CertificateDates(0, 0)
        self._ask_at_unix_ms = 0
        if certificate_pem is not None:
            self._take(certificate_pem)

    @property
    def valid_until_unix_ms(self) -> int:
        """When the present certificate lapses."""
        return self._dates.not_after_unix_ms

    def renewal_due(self) -> bool:
        """Whether to ask for a new certificate now; asking counts, and the answer has a minute."""
        now = self._clock.unix_ms()
        if now < self._ask_at_unix_ms:
            return False
        self._ask_at_unix_ms = now + REQUEST_REPEATED_MS
        return True

    def request_der(self) -> bytes:
        """A certificate request for the node's key."""
        return certificate_request(self._private_key_pem)

    def accept(self, certificate_pem: str) -> None:
        """Keeps a new certificate; raises PotluckError(INVALID_CERTIFICATE) for one that is not ours."""
        enrolment.check_certificate(certificate_pem, self.identity.node_id, self._clock)
        with self._kept_in_memory_at_least():
            self._folder.write_certificate(certificate_pem)
        self._take(certificate_pem.encode())
        self._ask_at_unix_ms = renew_again_at_unix_ms(self._dates, self._jitter(), self._clock.unix_ms())

    async def make_ready(self, *, knocks: bool) -> None:
        """Makes sure that a handshake can succeed: a certificate that lapsed, or is none, is renewed by proof of the key.

        Args:
            knocks: first it is looked whether anything listens there, as nothing did before.

        Raises:
            PotluckError: INVALID_CERTIFICATE where the coordinator refuses this node or this machine's clock is ahead,
                COORDINATOR_UNAVAILABLE where it does not answer or the clock is behind.
        """
        if knocks:
            await knock(self.gateways.target)
        now = self._clock.unix_ms()
        match standing(self._dates, now):
            case Standing.VALID:
                return
            case Standing.LAPSED:
                await self.renew()
            case Standing.NOT_YET_VALID:
                behind_seconds = (self._dates.not_before_unix_ms - now) // 1000
                raise PotluckError(
                    ErrorCode.COORDINATOR_UNAVAILABLE,
                    f"The node's certificate begins {behind_seconds} s from now: this machine's clock is behind. "
                    "To set it right: sudo timedatectl set-ntp true",
                )

    async def renew(self) -> None:
        """A new certificate by proof of the enrolled key, off the link."""
        self.accept(await enrolment.renew(self.identity, self._private_key_pem, self._clock))
        _log.info("certificate_renewed", node_id=self.identity.node_id, way="enrolment")

    async def find_coordinator(self) -> None:
        """Asks the coordinator's HTTP port again where its other ports are; failing changes nothing."""
        with contextlib.suppress(PotluckError):
            await self.move_to(self.identity.url)

    async def move_to(self, url: str) -> None:
        """Looks for the coordinator behind a URL, and dials there from now on.

        Raises:
            PotluckError: COORDINATOR_UNAVAILABLE where none answers, INVALID_CERTIFICATE where it is not this node's pool.
        """
        ca_hash = self.identity.connection.ca_hash
        connection = await asyncio.to_thread(fetch_connection, url, ca_hash)
        moved = replace(self.identity, url=pinned_url(url, ca_hash), connection=connection)
        if moved != self.identity:
            self.identity = moved
            self.gateways.moved()
            with self._kept_in_memory_at_least():
                self._folder.write_identity(moved)
            _log.info("coordinator_moved", link_target=connection.link_target)

    def open_channel(self, *, patient: bool = True) -> grpc.aio.Channel:
        """A new channel to a gateway's link port, under the present certificate. Certificates cannot be changed on a channel: open another.

        Whichever gateway it is, its certificate is checked for the pool's name and CA. Not `patient`: its handshake
        has half a second, for packets may be lost on the way; where a gateway is known to listen it has as long as it takes.
        """
        connection = self.identity.connection
        credentials = grpc.ssl_channel_credentials(
            root_certificates=connection.ca_certificate_pem.encode(),
            private_key=self._private_key_pem,
            certificate_chain=self._certificate_pem,
        )
        options = PATIENT_LINK_CHANNEL_OPTIONS if patient else LINK_CHANNEL_OPTIONS
        return grpc.aio.secure_channel(self.gateways.target, credentials, options=options)

    @contextlib.contextmanager
    def _kept_in_memory_at_least(self) -> Iterator[None]:
        """A full disk does not end an agent that serves: what could not be written is asked for again after a restart."""
        try:
            yield
        except OSError as error:
            _log.error("state_folder_not_written", folder=str(self._folder.path), reason=error.strerror)

    def _take(self, certificate_pem: bytes) -> None:
        life = certificate_life(certificate_pem)
        self._certificate_pem = certificate_pem
        self._dates = CertificateDates(life.valid_from_unix_ms, life.valid_until_unix_ms)
        self._ask_at_unix_ms = renew_at_unix_ms(self._dates, self._jitter())
