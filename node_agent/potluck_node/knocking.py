"""Whether anything listens where the link is to be dialled, at next to no cost.

A dial over gRPC makes a channel, reads key and certificates and only then finds a closed port; a refused connection costs a twentieth
of that. A gateway that starts again on the machine of a thousand agents, or behind one home line, has the processor for itself meanwhile.
It must not know when to dial, nor what follows.
"""

from __future__ import annotations

import asyncio
from typing import Final

from potluck_node.enrolment import no_answer

KNOCK_SECONDS_MAX: Final = 2.5


async def knock(target: str) -> None:
    """Connects and goes away again.

    Args:
        target: "host:port".

    Raises:
        PotluckError: COORDINATOR_UNAVAILABLE where nobody takes the connection in time.
    """
    host, _, port = target.rpartition(":")
    try:
        async with asyncio.timeout(KNOCK_SECONDS_MAX):
            transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, host.strip("[]"), int(port))
    except TimeoutError:
        raise no_answer(target, f"nobody took the connection within {KNOCK_SECONDS_MAX} s") from None
    except OSError as error:
        raise no_answer(target, error.strerror or str(error)) from error
    transport.abort()
