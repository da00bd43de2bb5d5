"""A whole coordinator in this process: the real directory over a real database, the real gateway on three real ports of the loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from potluck_coordinator.directory.bootstrap import OPERATOR_ACCOUNT_ID
from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_coordinator.directory.directory import Directory
from potluck_coordinator.gateway.gateway import Endpoints, Gateway
from potluck_coordinator.settings import Settings
from potluck_protocol import identity
from potluck_protocol.channels import CHANNEL_OPTIONS
from potluck_protocol.clock import SystemClock
from potluck_protocol.values import AccountId, Inventory, NodeId
from tests.support.certificates import Credential


class ShiftedClock(SystemClock):
    """The machine's time and a little more, so that what expires does so without waiting."""

    def __init__(self) -> None:
        self.shift_seconds = 0.0

    def monotonic_seconds(self) -> float:
        return super().monotonic_seconds() + self.shift_seconds

    def unix_ms(self) -> int:
        return super().unix_ms() + int(self.shift_seconds * 1000)


@dataclass
class OpenPool:
    """What a test needs of it."""

    clock: ShiftedClock
    directory: Directory
    gateway: Gateway
    endpoints: Endpoints
    authority: CertificateAuthority
    operator_key: str

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.endpoints.http_port}"

    def grpc_channel(self, credential: Credential | None = None) -> grpc.aio.Channel:
        return self._channel(self.endpoints.grpc_port, credential)

    def link_channel(self, credential: Credential | None) -> grpc.aio.Channel:
        return self._channel(self.endpoints.link_port, credential)

    def _channel(self, port: int, credential: Credential | None) -> grpc.aio.Channel:
        key, chain = (credential.key_pem, credential.certificate_pem) if credential else (None, None)
        credentials = grpc.ssl_channel_credentials(self.authority.ca_certificate_pem.encode(), key, chain)
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=options)

    async def user_key(self, name: str) -> tuple[AccountId, str]:
        """A new person with a key."""
        account = await self.directory.accounts.create_account(name)
        _, key = await self.directory.accounts.create_key(account.account_id, "key", 0)
        return account.account_id, key

    async def joined_node(self, owner: AccountId = OPERATOR_ACCOUNT_ID) -> tuple[NodeId, Credential]:
        """A new node of the pool."""
        key_pem = identity.new_private_key()
        token, secret = await self.directory.accounts.create_join_token(owner, 0)
        request = identity.certificate_request(key_pem)
        enrolment = await self.directory.enrolment.join(request, token.token_id, secret, "box", Inventory())
        return enrolment.node_id, Credential(key_pem, enrolment.certificate_pem.encode())


@asynccontextmanager
async def open_pool(folder: Path) -> AsyncIterator[OpenPool]:
    """The pool, served until the block ends."""
    clock = ShiftedClock()
    settings = Settings(data_dir=folder, http_port=0, grpc_port=0, link_port=0)
    directory = await Directory.open(settings, clock)
    chores = asyncio.ensure_future(directory.run_background())
    gateway = Gateway(settings, directory, clock)
    try:
        endpoints = await gateway.start()
        _, operator_key = await directory.accounts.create_key(OPERATOR_ACCOUNT_ID, "test", 0)
        authority = CertificateAuthority.load_or_create(settings.certificate_authority_dir, clock.unix_ms())
        yield OpenPool(clock, directory, gateway, endpoints, authority, operator_key)
    finally:
        await gateway.stop()
        chores.cancel()
        await asyncio.gather(chores, return_exceptions=True)
        directory.close()
