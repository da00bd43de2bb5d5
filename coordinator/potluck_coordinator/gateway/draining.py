"""How a gateway leaves without breaking an answer off: nobody new comes in, what runs goes on to its end, nodes go elsewhere.

Decides the order. The ports close first, and connections that stand are told to come again elsewhere. With other gateways beside this one
a share of its nodes each second get nothing new from then on, and each goes when it has nothing left to do; the others are used meanwhile,
by all gateways. The only gateway keeps its nodes until its last answer has ended. It must not know why it leaves, nor what comes after.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog

from potluck_coordinator.gateway.parting import leave, let_leavers_go
from potluck_coordinator.gateway.passing_relay import PassingRelay

if TYPE_CHECKING:
    from potluck_coordinator.gateway.grpc_server import GrpcServer
    from potluck_coordinator.gateway.http_server import HttpServer
    from potluck_coordinator.gateway.links import Links
    from potluck_coordinator.gateway.requests import RequestService

LOOK_SECONDS: Final = 0.1
GO_SECONDS: Final = 1.0
"""Between those that get nothing new: as long as a node may take to come to another gateway, so that few are on their way at a time."""
GO_SHARE: Final = 0.1
"""Of the nodes that are left."""
KEPT_ALIVE_SECONDS: Final = 1.0
"""How long a connection that stands may still bring a request, to be told with its answer that it was the last."""

_log = structlog.get_logger()


async def drain(
    *,
    http: HttpServer,
    people: GrpcServer,
    nodes: GrpcServer | None,
    links: Links,
    requests: RequestService,
    seconds_max: float,
) -> int:
    """Returns when nothing is left that a stop would break off, or after so long; how many answers are left then.

    Args:
        http: the http port.
        people: the grpc port.
        nodes: the link port; None where there is no other gateway that nodes could go to.
        links: the nodes.
        requests: the answers.
        seconds_max: for all of it.
    """
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + seconds_max
    _log.info("gateway_draining", node_count=len(links), in_flight_count=requests.in_flight_count)
    http.close_behind_answers()
    closing = [asyncio.ensure_future(port.stop(seconds_max)) for port in (people, nodes) if port is not None]
    await asyncio.sleep(min(KEPT_ALIVE_SECONDS, seconds_max))
    closing.append(asyncio.ensure_future(http.stop(seconds_max)))
    next_go_at = loop.time()
    while loop.time() < give_up_at:
        if nodes is not None:
            if loop.time() >= next_go_at:
                next_go_at = loop.time() + GO_SECONDS
                leave(links, max(1, int(len(links) * GO_SHARE)))
            let_leavers_go(links)
        if not answers_left(links, requests) and (nodes is None or not len(links)) and all(one.done() for one in closing):
            break
        await asyncio.sleep(LOOK_SECONDS)
    for one in closing:
        one.cancel()
    await asyncio.gather(*closing, return_exceptions=True)
    left_count = answers_left(links, requests)
    _log.info("gateway_drained", node_count=len(links), left_count=left_count)
    return left_count


def answers_left(links: Links, requests: RequestService) -> int:
    """What a stop would break off: answers to this gateway's clients, and what its nodes answer for other gateways."""
    passing_count = sum(isinstance(relay, PassingRelay) for session in links.sessions for relay in session.attempts.values())
    return requests.in_flight_count + passing_count
