"""Measures the line to the coordinator: how far it is, and how much it carries either way.

Decides the order and the words for what failed. When it is measured is `line_watch`'s or the owner's business; what rate arrivals make,
`domain.line`'s. It must not know what the figures are for.

Each direction has a connection of its own, and the upload is last: what is still queued of it, which on a slow line takes seconds to leave
this machine and its router, is in nobody's way any more.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable
from typing import Final

import grpc
import grpc.aio

from potluck_node.credentials import Credentials
from potluck_node.domain.line import AGAIN_SECONDS, LineReading, bytes_per_second
from potluck_node.enrolment import rpc_failure
from potluck_node.probe.network import reach
from potluck_protocol.arrivals import take_arrivals
from potluck_protocol.clock import Clock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.line import ARRIVALS_MAX, MEASURED_BYTES_MAX, PIECE_BYTES, Arrival, LineMeasurement
from potluck_protocol.v1 import node_pb2, node_pb2_grpc

CALL_SECONDS_MAX: Final = 12.0
"""The handshake, the first piece, two seconds of pieces and an answer behind them; whatever the coordinator says."""
TOO_OLD: Final = "the coordinator is too old to measure a line with; its operator can upgrade it"
TOO_LITTLE: Final = "too little came through in time to tell a rate"
LAPSED: Final = "this node's certificate has lapsed, is missing or is damaged; `potluck node run` renews it"


async def measure_line(credentials: Credentials, clock: Clock) -> LineReading:
    """One look, of some seconds. It takes up to 8 MiB each way, and never raises.

    A second look within minutes is refused by the coordinator, which says when to come again.
    """
    target = credentials.gateways.target
    seen = await reach("link", target)
    if seen.round_trip_ms is None:
        return LineReading(failure=f"the coordinator's link port {target} is not reached: {seen.failure}")
    if credentials.valid_until_unix_ms <= clock.unix_ms():
        return LineReading(failure=LAPSED)
    async with credentials.open_channel() as channel:
        download = await _rate(_download(channel, clock), target)
    async with credentials.open_channel() as channel:
        upload = await _rate(_upload(channel), target)
    # The download's words come first: a refusal that meets an upload on its way may come out as gRPC's own confusion.
    failed = next((part for part in (download, upload) if isinstance(part, PotluckError)), None)
    found = LineMeasurement(
        measured_at_unix_ms=clock.unix_ms(),
        round_trip_microseconds=round(seen.round_trip_ms * 1000),
        upload_bytes_per_second=upload if isinstance(upload, int) else None,
        download_bytes_per_second=download if isinstance(download, int) else None,
    )
    return LineReading(found, failed.message if failed else "", failed.retry_after_seconds if failed else None)


async def _rate(arrivals: Awaitable[tuple[Arrival, ...]], target: str) -> int | PotluckError:
    """Bytes a second of one direction, or why there are none."""
    try:
        found = bytes_per_second(await arrivals)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return PotluckError(ErrorCode.METHOD_NOT_ALLOWED, TOO_OLD, retry_after_seconds=AGAIN_SECONDS)
        return rpc_failure(error, target)
    return found or PotluckError(ErrorCode.NO_CAPACITY, TOO_LITTLE)


async def _upload(channel: grpc.aio.Channel) -> tuple[Arrival, ...]:
    """As the coordinator saw them come: what was written here may still wait in some buffer of this machine or its router."""
    piece = node_pb2.MeasureUploadRequest(data=os.urandom(PIECE_BYTES))

    async def pieces() -> AsyncIterator[node_pb2.MeasureUploadRequest]:
        # The coordinator ends it by the clock.
        for _ in range(MEASURED_BYTES_MAX // PIECE_BYTES):
            yield piece

    response = await node_pb2_grpc.NodeServiceStub(channel).MeasureUpload(pieces(), timeout=CALL_SECONDS_MAX)
    return tuple(Arrival(arrival.elapsed_microseconds / 1e6, arrival.received_bytes) for arrival in response.arrivals[:ARRIVALS_MAX])


async def _download(channel: grpc.aio.Channel, clock: Clock) -> tuple[Arrival, ...]:
    call = node_pb2_grpc.NodeServiceStub(channel).MeasureDownload(node_pb2.MeasureDownloadRequest(), timeout=CALL_SECONDS_MAX)

    async def read() -> bytes | None:
        message = await call.read()
        return message.data if isinstance(message, node_pb2.MeasureDownloadResponse) else None

    try:
        return await take_arrivals(read, clock.monotonic_seconds)
    finally:
        call.cancel()
