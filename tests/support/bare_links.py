"""`python -m tests.support.bare_links FOLDER`: the least that can take nodes' links, to compare a gateway with.

The same port, certificates, options and messages as a gateway's (`gateway.grpc_server`), and a handler that answers the hello with a
welcome and then only stores each message. It prints its port.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_protocol.channels import LINK_SERVER_OPTIONS
from potluck_protocol.clock import SystemClock
from potluck_protocol.codec import welcome_message
from potluck_protocol.v1 import node_pb2, node_pb2_grpc
from potluck_protocol.values import DesiredState, Welcome
from potluck_protocol.version import PROTOCOL_VERSION

LEASE_MS = 3_600_000
"""Nobody renews it."""


class BareLinks(node_pb2_grpc.NodeServiceServicer):
    """Keeps the last message of each stream."""

    def __init__(self) -> None:
        self.last: dict[str, node_pb2.NodeFrame] = {}

    async def Link(self, request_iterator: Any, context: Any) -> None:  # noqa: N802
        del request_iterator
        hello = await context.read()
        node_id = hello.hello.node_id
        welcome = Welcome(PROTOCOL_VERSION, 1, LEASE_MS, 1000, 5000, DesiredState(), {}, takes_brief_heartbeats=True)
        await context.write(node_pb2.CoordinatorFrame(welcome=welcome_message(welcome)))
        del hello
        while (frame := await context.read()) is not grpc.aio.EOF:
            self.last[node_id] = frame


async def serve(folder: Path) -> None:
    authority = CertificateAuthority.load_or_create(folder, SystemClock().unix_ms())
    own = authority.issue_server_certificate(SystemClock().unix_ms())
    server = grpc.aio.server(options=[*LINK_SERVER_OPTIONS, ("grpc.max_concurrent_streams", 16)])
    node_pb2_grpc.add_NodeServiceServicer_to_server(BareLinks(), server)
    credentials = grpc.ssl_server_credentials(
        [(own.private_key_pem, own.certificate_chain_pem)], root_certificates=own.ca_certificate_pem.encode(), require_client_auth=True
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    gc.collect()
    gc.freeze()
    print(port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    await server.stop(0)


def main(arguments: Sequence[str]) -> int:
    import uvloop

    uvloop.run(serve(Path(arguments[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
