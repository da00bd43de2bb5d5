"""Binds the http port, tries the gRPC ones before gRPC binds them, and says why one cannot be had and what changes that.

Decides how long a dying predecessor's port is waited for, and keeps coordinators that start together from finding the same one. A port
that several gateways of one machine share is the kernel's to divide: each new connection is some gateway's. Only processes of one user can
share, and only with each other. It must not know who listens there.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Final

from potluck_protocol.errors import ErrorCode, PotluckError

PREDECESSOR_SECONDS_MAX: Final = 10.0
"""Who was killed may hold its ports for as long as its successor needs to start."""
RETRY_SECONDS: Final = 0.2


def bind(host: str, port: int, flag: str, *, shared: bool = False) -> socket.socket:
    """A socket on the address that does not listen yet; port 0 is any free one.

    Raises:
        PotluckError: COORDINATOR_UNAVAILABLE for an address that cannot be had, with the reason and the flag that changes it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, _reason(error, host, port, flag)) from error
    return bound


async def bind_patiently(host: str, port: int, flag: str, *, shared: bool = False) -> socket.socket:
    """As `bind`, but waits up to 10 s for a port that is taken."""
    give_up_at = asyncio.get_running_loop().time() + PREDECESSOR_SECONDS_MAX
    while True:
        try:
            return bind(host, port, flag, shared=shared)
        except PotluckError as error:
            taken = isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE
            if not taken or asyncio.get_running_loop().time() >= give_up_at:
                raise
        await asyncio.sleep(RETRY_SECONDS)


def claim(host: str, port: int) -> socket.socket | None:
    """Keeps a port of an address from the other coordinators of this machine until it is closed; none if one of them has it.

    The port itself stays free for whoever shall listen there. The name is the kernel's, in this network alone, and goes with its process.
    """
    claimed = socket.socket(socket.AF_UNIX)
    try:
        claimed.bind(f"\0potluck-coordinator-{host}-{port}")
    except OSError:
        claimed.close()
        return None
    return claimed


def _reason(error: OSError, host: str, port: int, flag: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} of {host} is taken by another process; stop that, or choose another with {flag} (0: any free one)."
    if error.errno == errno.EACCES:
        return f"Port {port} needs privileges that this user lacks; choose one above 1023 with {flag}."
    return f"Cannot listen on {host}: {error.strerror or error}; --host takes an address of this machine, or 0.0.0.0 for all."
