"""The way to the coordinator: whether its ports are reached, how far it is, what its clock says.

Decides what is looked at without being one of the pool's nodes, and how. It must not know what is good: `domain.doctor_host` judges. How
much the line carries is `line_measurement`'s, for which the coordinator wants to see the node's certificate.

A round trip is the time of a TCP connection's start, which any port answers without being asked for anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import os
import socket
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import psutil

from potluck_node.domain.hardware import Network, Reach
from potluck_protocol.connection import is_loopback_host

CONNECT_LIMIT_SECONDS: Final = 4.0
CONNECT_COUNT: Final = 3
"""Connections to each port; their median is told, so that one lost packet does not look like a far coordinator."""
_PORTS: Final = {"http": 80, "https": 443}


async def read_network(*, link_target: str, grpc_target: str, url: str, listening: tuple[str, ...] | None) -> Network:
    """What is seen of the coordinator from here. Blocks for some seconds at most; never raises.

    Args:
        link_target: host and port of the coordinator's link.
        grpc_target: the same of its gRPC port.
        url: the coordinator's HTTP URL.
        listening: what the agent's own processes listen on.
    """
    services = {"link": link_target, "grpc": grpc_target}
    unreadable: tuple[Reach, ...] = ()
    try:
        services["http"] = _http_target(url)
    except ValueError as error:
        unreadable = (Reach("http", url, failure=f"that is no URL ({error})"),)
    reaches = (*await asyncio.gather(*(reach(service, target) for service, target in services.items())), *unreadable)
    http_reached = any(seen.service == "http" and not seen.failure for seen in reaches)
    skew_seconds = await asyncio.to_thread(read_clock_skew, url) if http_reached else None
    return Network(reaches, skew_seconds, listening=listening)


def read_clock_skew(url: str, unix_seconds: Callable[[], float] = time.time) -> float | None:
    """This machine's clock less that of whoever answers at the URL, in seconds, by the Date header; None where there is none.

    The header has whole seconds, cut off: half a second is added. The answer is taken to be made halfway between question and answer.
    """
    address = urlsplit(url)
    health_url = urlunsplit(address._replace(path=address.path.rstrip("/") + "/health", fragment=""))
    # No other machine takes part in what stays on this one; a proxy would.
    proxies = urllib.request.ProxyHandler({} if is_loopback_host(address.hostname or "") else None)
    opener = urllib.request.build_opener(proxies)
    asked_at = unix_seconds()
    try:
        with opener.open(health_url, timeout=CONNECT_LIMIT_SECONDS) as response:
            date = response.headers.get("Date")
    except urllib.error.HTTPError as error:
        # A coordinator that is not healthy has a clock nevertheless.
        date = error.headers.get("Date")
        error.close()
    except (OSError, HTTPException, ValueError):
        return None
    answered_at = unix_seconds()
    try:
        coordinator_at = email.utils.parsedate_to_datetime(date or "").timestamp() + 0.5
    except ValueError:
        return None
    return (asked_at + answered_at) / 2 - coordinator_at


def listening_beyond_loopback(process_ids: frozenset[int]) -> tuple[str, ...] | None:
    """Addresses with ports, other than loopback's, on which these processes listen; None where the system does not say."""
    found: set[str] = set()
    for pid in process_ids:
        try:
            connections = psutil.Process(pid).net_connections(kind="inet")
        except psutil.NoSuchProcess:
            continue
        except psutil.Error:
            return None
        found |= {
            _with_port(connection.laddr.ip, connection.laddr.port)
            for connection in connections
            if connection.status == psutil.CONN_LISTEN and not is_loopback_host(connection.laddr.ip)
        }
    return tuple(sorted(found))


async def reach(service: str, target: str) -> Reach:
    """One of the coordinator's ports: how far it is, or why it is not reached. Never raises."""
    host, _, port = target.rpartition(":")
    times_ms: list[float] = []
    for _ in range(CONNECT_COUNT):
        begun_seconds = time.monotonic()
        try:
            async with asyncio.timeout(CONNECT_LIMIT_SECONDS):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except TimeoutError:
            return Reach(service, target, failure=f"no answer in {CONNECT_LIMIT_SECONDS:.0f} s")
        except (OSError, ValueError) as error:
            return Reach(service, target, failure=_reason(error))
        times_ms.append((time.monotonic() - begun_seconds) * 1000)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return Reach(service, target, round_trip_ms=round(statistics.median(times_ms), 2))


def _reason(error: OSError | ValueError) -> str:
    """In the system's words, without the addresses that asyncio adds."""
    if isinstance(error, socket.gaierror):
        return error.strerror or "its name is not known"
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else "it cannot be reached"


def _http_target(url: str) -> str:
    """Raises ValueError for what is no URL."""
    address = urlsplit(url)
    return _with_port(address.hostname or "", address.port or _PORTS.get(address.scheme, 443))


def _with_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
