"""The two gRPC ports: one that people and joining nodes dial (TLS), one that nodes' links dial (mTLS, a node's certificate required).

Decides how they are secured and bounded. It must not know what the services do.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Final

import grpc

from potluck_coordinator.gateway.authorisation import check_table
from potluck_coordinator.gateway.interceptors import CallInterceptor
from potluck_coordinator.ports import GatewayGrant
from potluck_protocol.channels import SERVER_OPTIONS
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import account_pb2_grpc, inference_pb2_grpc, node_pb2_grpc, pool_pb2_grpc

CALLS_MAX: Final = 1024
"""Calls that the grpc port serves at a time; more are refused with RESOURCE_EXHAUSTED."""
LINKS_MAX: Final = 4096
BIND_SECONDS_MAX: Final = 10.0
"""A gateway that was killed may hold its ports for as long as its successor needs to start."""
BIND_RETRY_SECONDS: Final = 0.2


class GrpcServer:
    """One port. Made by `build_grpc_server` or `build_link_server`.

    Args:
        server: with its services added.
        credentials: of this port.
        port_setting: what an operator changes if the port is taken, such as "--grpc-port".
    """

    def __init__(self, server: grpc.aio.Server, credentials: grpc.ServerCredentials, port_setting: str) -> None:
        self._server = server
        self._credentials = credentials
        self._port_setting = port_setting

    async def start(self, host: str, port: int) -> int:
        """Serves on the port (0: any free one) and returns its number.

        Raises:
            PotluckError: COORDINATOR_UNAVAILABLE if the address cannot be had within 10 s, naming the reason.
        """
        bound = await self._bind(host, port)
        await self._server.start()
        return bound

    async def stop(self, grace_seconds: float) -> None:
        """Takes no new calls and ends those still running after the grace."""
        await self._server.stop(grace_seconds)

    async def _bind(self, host: str, port: int) -> int:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        for _ in range(round(BIND_SECONDS_MAX / BIND_RETRY_SECONDS)):
            try:
                return self._server.add_secure_port(address, self._credentials)
            except RuntimeError:
                # gRPC gives no errno, so the socket is asked why.
                reason = _why_not_bound(host, port)
                if reason not in {errno.EADDRINUSE, 0}:
                    raise self._cannot_listen(address, os.strerror(reason)) from None
            await asyncio.sleep(BIND_RETRY_SECONDS)
        raise self._cannot_listen(address, "another process holds the port")

    def _cannot_listen(self, address: str, reason: str) -> PotluckError:
        return PotluckError(
            ErrorCode.COORDINATOR_UNAVAILABLE, f"Cannot listen on {address}: {reason}. Free it or choose another with {self._port_setting}."
        )


def build_grpc_server(
    grant: GatewayGrant,
    interceptor: CallInterceptor,
    *,
    enrolment: node_pb2_grpc.EnrolmentServiceServicer,
    inference: inference_pb2_grpc.InferenceServiceServicer,
    account: account_pb2_grpc.AccountServiceServicer,
    pool: pool_pb2_grpc.PoolServiceServicer,
) -> GrpcServer:
    """The grpc port: the server proves itself, callers carry API keys or join tokens. Raises RuntimeError for an incomplete table."""
    check_table()
    server = grpc.aio.server(interceptors=(interceptor,), options=SERVER_OPTIONS, maximum_concurrent_rpcs=CALLS_MAX)
    node_pb2_grpc.add_EnrolmentServiceServicer_to_server(enrolment, server)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server)
    account_pb2_grpc.add_AccountServiceServicer_to_server(account, server)
    pool_pb2_grpc.add_PoolServiceServicer_to_server(pool, server)
    credentials = grpc.ssl_server_credentials([(grant.server.private_key_pem, grant.server.certificate_chain_pem)])
    return GrpcServer(server, credentials, "--grpc-port")


def build_link_server(grant: GatewayGrant, interceptor: CallInterceptor, node: node_pb2_grpc.NodeServiceServicer) -> GrpcServer:
    """The link port: nobody gets past its handshake without a certificate of the pool's CA. Raises RuntimeError for an incomplete table."""
    check_table()
    server = grpc.aio.server(interceptors=(interceptor,), options=SERVER_OPTIONS, maximum_concurrent_rpcs=LINKS_MAX)
    node_pb2_grpc.add_NodeServiceServicer_to_server(node, server)
    credentials = grpc.ssl_server_credentials(
        [(grant.server.private_key_pem, grant.server.certificate_chain_pem)],
        root_certificates=grant.server.ca_certificate_pem.encode(),
        require_client_auth=True,
    )
    return GrpcServer(server, credentials, "--link-port")


def _why_not_bound(host: str, port: int) -> int:
    """The errno of binding the address, or 0 if it went well (the port was freed in between)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno or errno.EADDRNOTAVAIL
    return 0
