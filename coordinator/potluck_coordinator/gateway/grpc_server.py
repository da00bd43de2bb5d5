"""The gRPC ports: one for people and joining nodes (TLS), one for nodes' links, and of several gateways one for the others (both mTLS).

Nodes whose certificate has lapsed dial the first, too, for another. Decides how the ports are secured and bounded. It must not know what
the services do.
"""

from __future__ import annotations

import contextlib
from typing import Final

import grpc

from potluck_coordinator.gateway.authorisation import check_table
from potluck_coordinator.gateway.interceptors import CallInterceptor
from potluck_coordinator.gateway.peer_link import FRAME_BYTES_MAX
from potluck_coordinator.listening import bind_patiently
from potluck_coordinator.pool_desk import GatewayGrant
from potluck_protocol.channels import LINK_SERVER_OPTIONS, SERVER_OPTIONS, Options, options_with
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import account_pb2_grpc, gateway_pb2_grpc, inference_pb2_grpc, node_pb2_grpc, pool_pb2_grpc

CALLS_MAX: Final = 1024
"""Calls that the grpc port serves at a time; more are refused with RESOURCE_EXHAUSTED."""
LINKS_MAX: Final = 16_384
"""Links at a time, as a node has one, and for a moment two while it moves; more are refused with RESOURCE_EXHAUSTED."""
PEERS_MAX: Final = 512
"""Links of other gateways: one of each, and for a moment two while it is made anew."""
CALLS_PER_CONNECTION_MAX: Final = 256
"""Calls at a time on one connection to the grpc port: a quarter of all, so that no one client can take them all by mistake. gRPC's clients
keep what is over it back until another call ends, so a job of thousands of prompts on one connection is slowed down, not refused."""
LINKS_PER_CONNECTION_MAX: Final = 16
"""A node has one link, and moves it to a new connection; the rest is for those that are still ending."""
BIND_TRIES: Final = 3
"""Another process may take a port in the moment in which it was seen to be free."""


class GrpcServer:
    """One port, or two with the same services. Made by `build_grpc_server`, `build_link_server` or `build_peer_server`.

    Args:
        server: with its services added.
        credentials: of this port.
        port_flag: what an operator changes if the port cannot be had, such as "--grpc-port".
        shared: whether other gateways of this machine listen on the same port.
    """

    def __init__(self, server: grpc.aio.Server, credentials: grpc.ServerCredentials, port_flag: str, *, shared: bool) -> None:
        self._server = server
        self._credentials = credentials
        self._port_flag = port_flag
        self._shared = shared

    async def start(self, host: str, port: int) -> int:
        """Serves on the port (0: any free one) and returns its number.

        Raises:
            PotluckError: COORDINATOR_UNAVAILABLE if the address cannot be had within 10 s, naming the reason.
        """
        bound = await self._bind(host, port, shared=self._shared)
        await self._server.start()
        return bound

    async def add_own_port(self, host: str, port: int) -> int:
        """As `start`, for one port more, which nobody shares; called before it."""
        return await self._bind(host, port, shared=False)

    async def stop(self, grace_seconds: float) -> None:
        """Takes no new calls and ends those still running after the grace."""
        await self._server.stop(grace_seconds)

    async def _bind(self, host: str, port: int, *, shared: bool) -> int:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        for _ in range(BIND_TRIES):
            # gRPC takes no socket and does not say what is wrong with an address. So the address is tried before: this probe waits for it,
            # or says why it cannot be had, and lets go of it again.
            (await bind_patiently(host, port, self._port_flag, shared=shared)).close()
            with contextlib.suppress(RuntimeError):
                return self._server.add_secure_port(address, self._credentials)
        raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, f"gRPC cannot listen on {address}; choose another with {self._port_flag}.")


def build_grpc_server(
    grant: GatewayGrant,
    interceptor: CallInterceptor,
    *,
    enrolment: node_pb2_grpc.EnrolmentServiceServicer,
    inference: inference_pb2_grpc.InferenceServiceServicer,
    account: account_pb2_grpc.AccountServiceServicer,
    pool: pool_pb2_grpc.PoolServiceServicer,
    shared: bool = False,
) -> GrpcServer:
    """The grpc port: the server proves itself, callers carry API keys or join tokens. Raises RuntimeError for an incomplete table."""
    check_table()
    server = _server(interceptor, CALLS_MAX, CALLS_PER_CONNECTION_MAX, shared=shared)
    node_pb2_grpc.add_EnrolmentServiceServicer_to_server(enrolment, server)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server)
    account_pb2_grpc.add_AccountServiceServicer_to_server(account, server)
    pool_pb2_grpc.add_PoolServiceServicer_to_server(pool, server)
    credentials = grpc.ssl_server_credentials([(grant.server.private_key_pem, grant.server.certificate_chain_pem)])
    return GrpcServer(server, credentials, "--grpc-port", shared=shared)


def build_link_server(
    grant: GatewayGrant, interceptor: CallInterceptor, node: node_pb2_grpc.NodeServiceServicer, *, shared: bool = False
) -> GrpcServer:
    """The link port: nobody gets past its handshake without a certificate of the pool's CA. Raises RuntimeError for an incomplete table."""
    check_table()
    server = _server(interceptor, LINKS_MAX, LINKS_PER_CONNECTION_MAX, shared=shared, options=LINK_SERVER_OPTIONS)
    node_pb2_grpc.add_NodeServiceServicer_to_server(node, server)
    return GrpcServer(server, _mutual(grant), "--link-port", shared=shared)


def build_peer_server(grant: GatewayGrant, interceptor: CallInterceptor, forward: gateway_pb2_grpc.GatewayServiceServicer) -> GrpcServer:
    """The port for other gateways, secured as the link port is; `authorisation` tells a gateway's certificate from a node's."""
    check_table()
    frames = {"grpc.max_receive_message_length": FRAME_BYTES_MAX, "grpc.max_send_message_length": FRAME_BYTES_MAX}
    server = _server(interceptor, PEERS_MAX, LINKS_PER_CONNECTION_MAX, shared=False, options=options_with(SERVER_OPTIONS, frames))
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(forward, server)
    return GrpcServer(server, _mutual(grant), "--ray-address", shared=False)


def _mutual(grant: GatewayGrant) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials(
        [(grant.server.private_key_pem, grant.server.certificate_chain_pem)],
        root_certificates=grant.server.ca_certificate_pem.encode(),
        require_client_auth=True,
    )


def _server(
    interceptor: CallInterceptor,
    calls_max: int,
    calls_per_connection_max: int,
    *,
    shared: bool,
    options: Options = SERVER_OPTIONS,
) -> grpc.aio.Server:
    changes = {"grpc.max_concurrent_streams": calls_per_connection_max, "grpc.so_reuseport": int(shared)}
    return grpc.aio.server(interceptors=(interceptor,), options=options_with(options, changes), maximum_concurrent_rpcs=calls_max)
