"""The line between a node and a real coordinator, measured over real gRPC through a relay of a known rate."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import pytest_asyncio
from typer.testing import CliRunner

from potluck_coordinator.directory.bootstrap import OPERATOR_ACCOUNT_ID
from potluck_coordinator.domain.turns import REPEAT_SECONDS
from potluck_coordinator.gateway import line_servicer
from potluck_node import line_watch
from potluck_node.command import app
from potluck_node.credentials import Credentials
from potluck_node.domain.line import AGAIN_SECONDS, LineReading
from potluck_node.domain.session import Phase
from potluck_node.identity_store import NodeIdentity, StateFolder
from potluck_node.line_measurement import LAPSED, TOO_OLD, measure_line
from potluck_node.line_watch import LineWatch, kept_measurement
from potluck_protocol import identity
from potluck_protocol.clock import SystemClock
from potluck_protocol.connection import ConnectionDocument
from potluck_protocol.line import MEASURED_BYTES_MAX, MEASURED_SECONDS_MAX, LineMeasurement
from potluck_protocol.metadata import ERROR_DETAIL
from potluck_protocol.v1 import common_pb2, node_pb2, node_pb2_grpc
from potluck_protocol.values import Inventory
from tests.support.certificates import Credential
from tests.support.engines import MovedClock
from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.link_coordinator import link_coordinator
from tests.support.node_engine import wired_node
from tests.support.open_pool import OpenPool, ShiftedClock, open_pool

MBIT = 1_000_000 // 8
PIECE = node_pb2.MeasureUploadRequest(data=bytes(16 * 1024))


class SetClock(MovedClock):
    """One whose time of day may be wrong."""

    ahead_seconds = 0.0

    def unix_ms(self) -> int:
        return super().unix_ms() + int(self.ahead_seconds * 1000)


@pytest_asyncio.fixture
async def pool(tmp_path: Path) -> AsyncIterator[OpenPool]:
    async with open_pool(tmp_path / "pool") as opened:
        yield opened


async def node_of(pool: OpenPool, path: Path, link_port: int) -> StateFolder:
    """The state folder of a new node, which dials that port of the loopback."""
    folder = StateFolder(path)
    request = identity.certificate_request(folder.made_private_key())
    token, secret = await pool.directory.accounts.create_join_token(OPERATOR_ACCOUNT_ID, 0)
    enrolment = await pool.directory.enrolment.join(request, token.token_id, secret, "box", Inventory())
    folder.write_certificate(enrolment.certificate_pem)
    ca = pool.authority.ca_certificate_pem
    document = ConnectionDocument(1, "pool", pool.endpoints.grpc_port, link_port, "127.0.0.1", ca)
    folder.write_identity(NodeIdentity(enrolment.node_id, OPERATOR_ACCOUNT_ID, "box", f"{pool.http_url}#{document.ca_hash}", document))
    return folder


def credentials_of(folder: StateFolder) -> Credentials:
    return Credentials(folder, SystemClock(), lambda: 0.0)


async def reading(pool: OpenPool, path: Path, proxy: FaultProxy) -> LineReading:
    return await measure_line(credentials_of(await node_of(pool, path, proxy.port)), SystemClock())


@pytest.mark.parametrize(("upwards", "downwards"), [(1 * MBIT, 16 * MBIT), (10 * MBIT, 50 * MBIT), (MBIT // 4, MBIT // 2)])
async def test_both_rates_of_a_shaped_line_are_found_within_a_quarter(pool: OpenPool, tmp_path: Path, upwards: int, downwards: int) -> None:
    async with fault_proxy(pool.endpoints.link_port) as proxy:
        proxy.upwards.bytes_per_second, proxy.downwards.bytes_per_second = upwards, downwards
        found = await reading(pool, tmp_path / "node", proxy)
    assert found.failure == ""
    assert found.found is not None
    assert found.found.upload_bytes_per_second == pytest.approx(upwards, rel=0.25)
    assert found.found.download_bytes_per_second == pytest.approx(downwards, rel=0.25)
    assert 0 < (found.found.round_trip_microseconds or 0) < 1_000_000


async def test_a_line_that_stands_still_for_a_moment_is_no_slower(pool: OpenPool, tmp_path: Path) -> None:
    async with fault_proxy(pool.endpoints.link_port) as proxy:
        for way in (proxy.upwards, proxy.downwards):
            way.bytes_per_second, way.pause_after_bytes, way.pause_seconds = 4 * MBIT, 600_000, 0.5
        found = (await reading(pool, tmp_path / "node", proxy)).found
    assert found is not None
    assert found.upload_bytes_per_second == pytest.approx(4 * MBIT, rel=0.25)
    assert found.download_bytes_per_second == pytest.approx(4 * MBIT, rel=0.25)


async def test_a_measurement_takes_no_more_than_its_bounds(pool: OpenPool) -> None:
    _, credential = await pool.joined_node()
    async with pool.link_channel(credential) as channel:
        stub = node_pb2_grpc.NodeServiceStub(channel)

        async def without_end() -> AsyncIterator[node_pb2.MeasureUploadRequest]:
            while True:
                yield PIECE

        response = await stub.MeasureUpload(without_end(), timeout=20)
        assert MEASURED_BYTES_MAX <= response.arrivals[-1].received_bytes < MEASURED_BYTES_MAX + len(PIECE.data)
        assert response.arrivals[0].elapsed_microseconds == 0
        pieces = [message.data async for message in stub.MeasureDownload(node_pb2.MeasureDownloadRequest(), timeout=20)]
    assert sum(map(len, pieces)) <= MEASURED_BYTES_MAX


async def test_who_sends_nothing_more_is_answered_when_the_time_is_over(pool: OpenPool) -> None:
    _, credential = await pool.joined_node()
    over = asyncio.Event()

    async def stalled() -> AsyncIterator[node_pb2.MeasureUploadRequest]:
        for _ in range(3):
            yield PIECE
        await over.wait()

    async with pool.link_channel(credential) as channel:
        begun = asyncio.get_running_loop().time()
        response = await node_pb2_grpc.NodeServiceStub(channel).MeasureUpload(stalled(), timeout=20)
        took_seconds = asyncio.get_running_loop().time() - begun
        over.set()
    assert response.arrivals[-1].received_bytes == 3 * len(PIECE.data)
    assert took_seconds == pytest.approx(MEASURED_SECONDS_MAX, abs=1)


# Turns.


async def refusal(channel: grpc.aio.Channel) -> common_pb2.ErrorDetail | None:
    """Of a download that is asked for and not awaited; None where it began."""
    call = node_pb2_grpc.NodeServiceStub(channel).MeasureDownload(node_pb2.MeasureDownloadRequest(), timeout=20)
    try:
        await call.read()
    except grpc.aio.AioRpcError as error:
        refused = error
    else:
        return None
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    raw = dict(refused.trailing_metadata() or ())[ERROR_DETAIL]
    assert isinstance(raw, bytes)
    return common_pb2.ErrorDetail.FromString(raw)


async def rest(call: grpc.aio.UnaryStreamCall[node_pb2.MeasureDownloadRequest, node_pb2.MeasureDownloadResponse]) -> int:
    """How many pieces still come."""
    count = 0
    while await call.read() is not grpc.aio.EOF:
        count += 1
    return count


async def test_a_node_measures_once_in_some_minutes_and_is_told_when(pool: OpenPool) -> None:
    _, credential = await pool.joined_node()
    async with pool.link_channel(credential) as channel:
        stub = node_pb2_grpc.NodeServiceStub(channel)
        assert [message async for message in stub.MeasureDownload(node_pb2.MeasureDownloadRequest())]
        detail = await refusal(channel)
        assert detail is not None
        assert (detail.code, "download was measured" in detail.message) == ("queue_full", True)
        assert detail.retry_after_ms == pytest.approx(REPEAT_SECONDS * 1000, abs=30_000)
        pool.clock.shift_seconds += detail.retry_after_ms / 1000
        assert await refusal(channel) is None


async def test_few_measure_at_once_and_the_next_ones_turn_comes(pool: OpenPool) -> None:
    async def nobody_reads(credential: Credential) -> grpc.aio.Channel:
        channel = pool.link_channel(credential)
        assert await refusal(channel) is None
        return channel

    nodes = [await pool.joined_node() for _ in range(3)]
    first, second = [await nobody_reads(credential) for _, credential in nodes[:2]]
    async with pool.link_channel(nodes[2][1]) as third:
        detail = await refusal(third)
        assert detail is not None
        assert "other nodes are measuring" in detail.message
        await first.close()
        async with asyncio.timeout(5):
            while await refusal(third) is not None:
                await asyncio.sleep(0.05)
    await second.close()


async def test_a_node_that_takes_nothing_loses_its_turn(pool: OpenPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_servicer, "STALL_SECONDS_MAX", 0.3)
    _, credential = await pool.joined_node()
    async with pool.link_channel(credential) as channel:
        call = node_pb2_grpc.NodeServiceStub(channel).MeasureDownload(node_pb2.MeasureDownloadRequest(), timeout=20)
        await call.read()
        # Connection and buffers are full long before.
        await asyncio.sleep(1.5)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await rest(call)
    assert ended.value.code() is grpc.StatusCode.CANCELLED


# The node's words and memory.


async def test_every_way_to_fail_has_its_words(pool: OpenPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ShiftedClock()
    folder = await node_of(pool, tmp_path / "node", pool.endpoints.link_port)
    credentials = credentials_of(folder)
    assert (await measure_line(credentials, clock)).failure == ""
    busy = await measure_line(credentials, clock)
    assert "download was measured" in busy.failure
    assert 0 < (busy.retry_after_seconds or 0) <= REPEAT_SECONDS
    assert busy.found is not None
    assert (busy.found.upload_bytes_per_second, busy.found.download_bytes_per_second) == (None, None)
    clock.shift_seconds = 48 * 3600
    assert (await measure_line(credentials, clock)).failure == LAPSED
    clock.shift_seconds = 0
    await pool.directory.nodes.revoke_node(credentials.identity.node_id, "test")
    assert "no longer part of the pool" in (await measure_line(credentials, clock)).failure
    folder.write_identity(replace(credentials.identity, connection=replace(credentials.identity.connection, link_port=1)))
    away = await measure_line(credentials_of(folder), clock)
    assert (away.found, away.failure) == (None, "the coordinator's link port 127.0.0.1:1 is not reached: Connection refused")


async def test_a_coordinator_that_is_too_old_is_asked_again_a_day_later(tmp_path: Path) -> None:
    async with link_coordinator(tmp_path / "old") as coordinator:
        folder = StateFolder(tmp_path / "node")
        coordinator.enrol(folder)
        found = await measure_line(credentials_of(folder), SystemClock())
    assert (found.failure, found.retry_after_seconds) == (TOO_OLD, AGAIN_SECONDS)


async def test_an_answer_of_nonsense_is_no_rate(tmp_path: Path) -> None:
    async def nonsense(self: object, request_iterator: object, context: object) -> node_pb2.MeasureUploadResponse:
        return node_pb2.MeasureUploadResponse(arrivals=[node_pb2.Arrival(received_bytes=-5)] * 100_000)

    async with link_coordinator(tmp_path / "evil") as coordinator:
        coordinator.MeasureUpload = nonsense.__get__(coordinator)  # type: ignore[method-assign]
        folder = StateFolder(tmp_path / "node")
        coordinator.enrol(folder)
        found = await measure_line(credentials_of(folder), SystemClock())
    assert found.found is not None
    assert found.found.upload_bytes_per_second is None


async def test_the_agent_measures_when_the_line_is_quiet_and_then_not_for_a_day(pool: OpenPool, tmp_path: Path) -> None:
    folder, clock = await node_of(pool, tmp_path / "node", pool.endpoints.link_port), ShiftedClock()
    quiet = False
    watch = LineWatch(credentials_of(folder), folder.path, clock, lambda: 0.0, lambda: quiet)
    await watch.look()
    assert watch.found is None
    quiet = True
    await watch.look()
    first = watch.found
    assert first is not None
    assert min(first.upload_bytes_per_second or 0, first.download_bytes_per_second or 0) > MBIT
    assert kept_measurement(folder.path) == first
    clock.shift_seconds = pool.clock.shift_seconds = AGAIN_SECONDS / 2
    await watch.look()
    # An agent that is started anew has it at once, and measures no sooner.
    again = LineWatch(credentials_of(folder), folder.path, clock, lambda: 0.0, lambda: True)
    await again.look()
    assert watch.found == again.found == first


async def test_a_wall_clock_that_was_ahead_and_is_set_right_puts_no_measurement_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, measured = SetClock(), []

    async def measure(*_: object) -> LineReading:
        measured.append(clock.now_seconds)
        return LineReading(LineMeasurement(clock.unix_ms(), 1, 2, 3))

    monkeypatch.setattr(line_watch, "measure_and_keep", measure)
    clock.ahead_seconds = 365 * AGAIN_SECONDS
    watch = LineWatch(SimpleNamespace(), tmp_path, clock, lambda: 0.0, lambda: True)
    await watch.look()
    clock.ahead_seconds = 0
    clock.now_seconds += AGAIN_SECONDS - 1
    await watch.look()
    assert len(measured) == 1
    clock.now_seconds += 1
    await watch.look()
    assert len(measured) == 2


def test_a_kept_line_that_is_damaged_is_none(tmp_path: Path) -> None:
    for content in ("", "[]", "{}", '{"measured_at_unix_ms": null}', '{"measured_at_unix_ms": "x"}', '{"measured_at_unix_ms": 1, "x": 2}'):
        (tmp_path / "line.json").write_text(content)
        assert kept_measurement(tmp_path) is None


async def test_a_heartbeat_carries_the_line_to_the_listing_and_so_does_a_hello(pool: OpenPool, tmp_path: Path) -> None:
    found = LineMeasurement(1_800_000_000_000, 20_000, 1_000_000, 12_500_000)

    async def until_listed(line: LineMeasurement | None) -> None:
        async with asyncio.timeout(10):
            while [record.inventory.line for record in await pool.directory.nodes.list_nodes()] != [line]:
                await asyncio.sleep(0.05)

    folder = await node_of(pool, tmp_path / "node", pool.endpoints.link_port)
    async with wired_node(None, tmp_path, None) as node:
        async with asyncio.timeout(10):
            while node.link.session.phase is not Phase.SERVING:
                await asyncio.sleep(0.02)
        await until_listed(None)
        node.report._line.found = found
        node.link.report_now()
        await until_listed(found)
    (folder.path / "line.json").write_text(json.dumps({"measured_at_unix_ms": 5, "upload_bytes_per_second": 7}))
    async with wired_node(None, tmp_path, None, session_id="of an agent that was started anew"):
        await until_listed(LineMeasurement(5, None, 7, None))
    # The hello's is in the books, for when the node is away.
    await pool.directory.nodes.close_session(credentials_of(folder).identity.node_id, 99, None)
    await until_listed(LineMeasurement(5, None, 7, None))


async def test_the_doctor_of_a_joined_node_tells_both_rates_and_at_a_second_look_the_kept_ones(
    pool: OpenPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTLUCK_NODE_CACHE_DIR", str(tmp_path))

    async def doctor(*flags: str) -> str:
        arguments = ["doctor", "--state-dir", str(tmp_path / "node"), *flags]
        return (await asyncio.to_thread(CliRunner().invoke, app, arguments)).stdout

    async with fault_proxy(pool.endpoints.link_port) as proxy:
        proxy.upwards.bytes_per_second, proxy.downwards.bytes_per_second = 8 * MBIT, 24 * MBIT
        await node_of(pool, tmp_path / "node", proxy.port)
        network = json.loads(await doctor("--json"))["facts"]["network"]
        again = await doctor()
    assert network["upload_bytes_per_second"] == pytest.approx(8 * MBIT, rel=0.25)
    assert network["download_bytes_per_second"] == pytest.approx(24 * MBIT, rel=0.25)
    assert network["rate_failure"] == ""
    lines = {line.split()[1]: line for line in again.splitlines()[:-1]}
    assert lines["upload"].startswith("OK    upload ")
    assert " s ago: carries " in lines["upload"]
    assert "a model of 20 GB would take" in lines["download"]
