"""Requests that enter at one gateway and run on a node of another: real gateways, real links between them, nodes written by hand."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest
from structlog.testing import capture_logs

from potluck_coordinator.gateway import forward_servicer, peer_link
from potluck_protocol.channels import CHANNEL_OPTIONS, MESSAGE_BYTES_MAX
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import gateway_pb2_grpc, node_pb2
from potluck_protocol.values import EndReason, GoodbyeReason, Usage
from tests.support.coordinator import TINY, running_gateways
from tests.support.raw_node import enrol, raw_link
from tests.support.request_path import DONE, USAGE_EVENT, begin, read_all, request_of, settled_balance, token, without_tier


async def until(condition, seconds_max=10.0):
    async with asyncio.timeout(seconds_max):
        while not condition():
            await asyncio.sleep(0.01)


def sees(gateway, replica_count):
    """How many replicas a gateway would place a request on."""
    return lambda: ready_count(gateway) == replica_count


def ready_count(gateway):
    return next(model.ready_replica_count for model in gateway.gateway.requests.models() if model.entry.model_id == TINY)


def remote_links(gateway):
    return [peer.way for peer in gateway.gateway._peers._peers.values()]


@asynccontextmanager
async def two_gateways(folder, **changes):
    """Requests enter at `here`; the one node's link is `there`'s."""
    async with running_gateways(folder, 2, **changes) as (here, there), raw_link(there, await enrol(there)) as node:
        await node.hello()
        await until(sees(here, 1))
        yield here, there, node


async def test_a_stream_crosses_whole_and_is_paid_by_the_gateway_where_it_entered(tmp_path):
    async with two_gateways(tmp_path) as (here, there, node):
        answer, start = await begin(here, node)
        await node.chunk(start.attempt_id, 1, token("two") + USAGE_EVENT + DONE)
        await node.end(start.attempt_id, 2)
        assert without_tier(await read_all(answer)) == token("one") + token("two") + DONE
        assert (answer.usage, answer.charge_micro_credits) == (Usage(10, 2, 0), 18)
        balance = await settled_balance(here)
        assert (balance.available_micro_credits, balance.earned_micro_credits) == (1000 * 1_000_000 - 18, 18)
        assert (await here.directory.ledger.audit()).findings == ()
        # The slot is free again where the link is, and the node has heard that its end arrived.
        await until(lambda: there.gateway._links.session(node.credentials.node_id).attempts == {})
        await node.wait_for(lambda frame: any(said.next_sequence == 3 for said in frame.acknowledgements))


async def test_what_a_gateway_answers_for_another_is_counted_where_its_drain_takes_too_long(tmp_path):
    async with two_gateways(tmp_path) as (here, there, node):
        answer, _ = await begin(here, node)
        assert there.gateway.load == (1, 1)
        assert await asyncio.wait_for(there.gateway.drain(1.5), 10) == 1
        await answer.close()


async def test_both_gateways_use_one_node_and_neither_passes_its_slots(tmp_path):
    async with two_gateways(tmp_path) as (here, there, node):
        (first, one), (second, two) = await begin(here, node), await begin(there, node, number=1)
        third = asyncio.ensure_future(here.gateway.requests.begin(await request_of(here)))
        await asyncio.sleep(0.6)
        assert len(node.starts()) == 2
        assert not third.done()
        for answer, start in ((first, one), (second, two)):
            await node.chunk(start.attempt_id, 1, USAGE_EVENT + DONE)
            await node.end(start.attempt_id, 2)
            await read_all(answer)
        start = await node.next_start(2)
        await node.chunk(start.attempt_id, 0, token("one") + USAGE_EVENT + DONE)
        await node.end(start.attempt_id, 1)
        await read_all(await third)


async def test_a_view_that_is_behind_sends_a_request_back_at_once_and_it_goes_elsewhere(tmp_path):
    async with two_gateways(tmp_path) as (here, there, node), AsyncExitStack() as stack:
        (way,) = remote_links(here)
        own = await stack.enter_async_context(raw_link(here, await enrol(here)))
        await own.hello()
        await until(sees(here, 2))
        # Two of the other gateway's fill the node; this one is kept from hearing of it.
        here.gateway._peers._peers[next(iter(here.gateway._peers._peers))].view = None
        here.gateway._peers.take = lambda _: None
        for number in range(2):
            work = asyncio.ensure_future(there.gateway.requests.begin(await request_of(there)))
            start = await _next_of(node, own, number)
            await start[0].chunk(start[1].attempt_id, 0, token("one"))
            stack.push_async_callback((await work).close)
        del way
        answers = [asyncio.ensure_future(here.gateway.requests.begin(await request_of(here))) for _ in range(2)]
        await asyncio.sleep(1.0)
        started = len(node.starts()) + len(own.starts())
        assert started == 4, "all four run, two on each node, whatever the view said"
        for answer in answers:
            answer.cancel()
        await asyncio.gather(*answers, return_exceptions=True)


async def _next_of(node, own, number):
    async with asyncio.timeout(10):
        while True:
            for one in (node, own):
                fresh = [start for start in one.starts() if not getattr(one, "taken", set()) & {start.attempt_id}]
                if fresh:
                    one.taken = getattr(one, "taken", set()) | {fresh[0].attempt_id}
                    return one, fresh[0]
            await asyncio.sleep(0.01)


async def test_a_demand_for_trusted_nodes_crosses_and_is_looked_at_again_where_the_node_is(tmp_path):
    async with two_gateways(tmp_path) as (here, there, node):
        node_id = node.credentials.node_id

        def is_trusted(gateway):
            return all(view.is_trusted for view in gateway.gateway._links.host(node_id).replica_views())

        await here.directory.nodes.set_node_trust(node_id, trusted=True)
        await until(lambda: is_trusted(here))
        answer, start = await begin(here, node, trusted_only=True)
        # So that nobody gives it up for another node that is none.
        assert there.gateway._links.session(node_id).requests[start.attempt_id].trusted_only
        await node.chunk(start.attempt_id, 1, USAGE_EVENT + DONE)
        await node.end(start.attempt_id, 2)
        await read_all(answer)
        here.gateway._peers.take = lambda _: None
        await here.directory.nodes.set_node_trust(node_id, trusted=False)
        await until(lambda: not is_trusted(there))
        assert is_trusted(here), "it has not heard of it yet"
        with pytest.raises(PotluckError) as refused:
            await here.gateway.requests.begin(await request_of(here, trusted_only=True))
        assert refused.value.code is ErrorCode.NO_CAPACITY
        assert len(node.starts()) == 1


async def test_a_client_that_goes_away_ends_the_attempt_at_the_node(tmp_path):
    async with two_gateways(tmp_path) as (here, there, node):
        answer, start = await begin(here, node)
        await answer.close()
        await node.wait_for(lambda frame: any(cancel.attempt_id == start.attempt_id for cancel in frame.cancels))
        await until(lambda: not there.gateway._links.session(node.credentials.node_id).attempts)
        await settled_balance(here)
        assert (await here.directory.ledger.audit()).open_hold_count == 0


async def test_a_slow_client_pauses_the_node_through_both_gateways(tmp_path):
    async with two_gateways(tmp_path) as (here, _, node):
        answer, start = await begin(here, node)
        assert start.window_bytes == 64 * 1024
        for sequence in range(1, 4):
            await node.chunk(start.attempt_id, sequence, token("x" * 20_000))
        await asyncio.sleep(0.3)
        assert not [said for frame in node.received for said in frame.acknowledgements]
        reading = asyncio.ensure_future(read_all(answer))
        frame = await node.wait_for(lambda frame: len(frame.acknowledgements) > 0, 2)
        assert 1 <= frame.acknowledgements[0].next_sequence <= 4
        await node.chunk(start.attempt_id, 4, USAGE_EVENT + DONE)
        await node.end(start.attempt_id, 5)
        await reading


async def test_the_largest_frame_of_a_node_crosses_too_and_ends_nobody_elses_answer(tmp_path):
    async with two_gateways(tmp_path) as (here, _, node):
        (way,) = remote_links(here)
        former = way.outbox
        (large, first), (other, second) = await begin(here, node), await begin(here, node, number=1)
        assert await large.next_data() is not None
        chunk = node_pb2.AttemptChunk(attempt_id=first.attempt_id, sequence=1)
        end = node_pb2.AttemptEnd(attempt_id=first.attempt_id, sequence=2, reason=node_pb2.END_REASON_ENGINE_FAILED, detail="x" * 200)
        frame = node_pb2.NodeFrame(epoch=node.epoch, chunks=[chunk], ends=[end])
        frame.chunks[0].data = b"x" * (MESSAGE_BYTES_MAX - frame.ByteSize() - 12)
        assert MESSAGE_BYTES_MAX - 5 < frame.ByteSize() <= MESSAGE_BYTES_MAX
        await node.call.write(frame)
        with pytest.raises(PotluckError):
            await read_all(large)
        await large.close()
        await node.chunk(second.attempt_id, 1, USAGE_EVENT + DONE)
        await node.end(second.attempt_id, 2)
        await read_all(other)
        assert way.outbox is former


@pytest.mark.parametrize("reason", [EndReason.ENGINE_FAILED, EndReason.REFUSED, EndReason.HANDED_BACK])
async def test_what_fails_at_the_other_gateways_node_goes_on_at_ones_own(tmp_path, reason):
    async with two_gateways(tmp_path) as (here, _, node), raw_link(here, await enrol(here)) as own:
        work = asyncio.ensure_future(here.gateway.requests.begin(await request_of(here)))
        start = await node.next_start()
        await own.hello()
        await until(sees(here, 2))
        await node.end(start.attempt_id, 0, reason)
        again = await own.next_start()
        await own.chunk(again.attempt_id, 0, token("one") + USAGE_EVENT + DONE)
        await own.end(again.attempt_id, 1)
        await read_all(await work)
        assert (await settled_balance(here)).earned_micro_credits > 0


async def test_an_answer_whose_gateway_is_lost_is_continued_by_another_node(tmp_path):
    async with two_gateways(tmp_path) as (here, there, node), raw_link(here, await enrol(here)) as own:
        body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "stream": True}).encode()
        answer, _ = await begin(here, node, body=body)
        assert await answer.next_data() is not None
        await own.hello()
        await until(sees(here, 2))
        reading = asyncio.ensure_future(read_all(answer))
        await there.gateway._ports[-1].stop(0)
        again = await own.next_start()
        assert json.loads(again.body)["messages"][-1] == {"role": "assistant", "content": "one"}
        await own.chunk(again.attempt_id, 0, token("three") + USAGE_EVENT + DONE)
        await own.end(again.attempt_id, 1)
        assert b"three" in await reading
        assert (await here.directory.ledger.audit()).findings == ()


def failing_once(monkeypatch, owner, method):
    faults, real = [KeyError("what nobody foresaw")], getattr(owner, method)

    def work(self, *arguments):
        if faults:
            raise faults.pop()
        return real(self, *arguments)

    monkeypatch.setattr(owner, method, work)


async def still_answers(here, node, number):
    answer, start = await begin(here, node, number=number)
    await node.chunk(start.attempt_id, 1, USAGE_EVENT + DONE)
    await node.end(start.attempt_id, 2)
    await read_all(answer)


async def test_a_start_that_breaks_the_link_is_told_of_in_the_log_and_the_next_link_carries_on(tmp_path, monkeypatch):
    async with two_gateways(tmp_path) as (here, _, node):
        (way,) = remote_links(here)
        former = way.outbox
        failing_once(monkeypatch, forward_servicer._Forwarded, "start")
        with capture_logs() as logs:
            with pytest.raises(PotluckError) as lost:
                await here.gateway.requests.begin(await request_of(here))
            await until(lambda: way.outbox not in {None, former})
        assert lost.value.code is ErrorCode.NODE_LOST, "nobody else could take it"
        assert [line["event"] for line in logs if line["log_level"] == "error"] == ["gateway_link_failed_here"]
        await still_answers(here, node, 0)


async def test_an_end_that_breaks_the_link_is_told_of_in_the_log_and_the_next_link_carries_on(tmp_path, monkeypatch):
    async with two_gateways(tmp_path) as (here, _, node):
        (way,) = remote_links(here)
        answer, start = await begin(here, node)
        former = way.outbox
        failing_once(monkeypatch, peer_link.PeerLink, "_take_end")
        with capture_logs() as logs:
            await node.end(start.attempt_id, 1, EndReason.ENGINE_FAILED)
            await until(lambda: way.outbox not in {None, former})
        assert [line["event"] for line in logs if line["log_level"] == "error"] == ["gateway_link_failed"]
        await answer.close()
        await still_answers(here, node, 1)


async def test_a_node_that_moves_between_gateways_is_used_where_it_is(tmp_path):
    async with running_gateways(tmp_path, 2) as (here, there):
        credentials = await enrol(here)
        async with raw_link(there, credentials, "first") as node:
            await node.hello()
            await until(sees(here, 1))
            await node.goodbye(GoodbyeReason.STOPPING)
            await node.wait_until_ended()
        async with raw_link(here, credentials, "second") as node:
            await node.hello()
            await until(sees(there, 1))
            answer, start = await begin(there, node)
            await node.chunk(start.attempt_id, 1, USAGE_EVENT + DONE)
            await node.end(start.attempt_id, 2)
            await read_all(answer)
            assert ready_count(here) == ready_count(there) == 1


async def test_nobody_but_a_gateway_of_the_coordinator_gets_into_the_port(tmp_path):
    async with two_gateways(tmp_path) as (here, _, node):
        address = next(record.peer_address for record in here.gateway._snapshot.gateways.values() if record.number == 1)
        ca = here.gateway._peers._identity.ca_certificate_pem.encode()
        authority = here.directory.pool._authority
        stranger = authority.issue_gateway_certificate(99, here.gateway._clock.unix_ms())
        shown = {
            "a node": (node.credentials.key_pem, node.credentials.certificate_pem.encode()),
            "a gateway of an epoch that is nobody's": (stranger.private_key_pem, stranger.certificate_chain_pem),
        }
        for who, (key, certificate) in shown.items():
            tls = grpc.ssl_channel_credentials(ca, key, certificate)
            async with grpc.aio.secure_channel(address, tls, options=CHANNEL_OPTIONS) as channel:
                call = gateway_pb2_grpc.GatewayServiceStub(channel).Forward()
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    assert await call.read() is None
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED, who
        async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca), options=CHANNEL_OPTIONS) as channel:
            call = gateway_pb2_grpc.GatewayServiceStub(channel).Forward()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                assert await call.read() is None
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_queue_counts_on_its_own_gateways_nodes_and_without_any_on_all(tmp_path):
    async with two_gateways(tmp_path) as (here, there, _):
        mine, theirs = (one.gateway.requests._placing.capacity for one in (here, there))
        assert mine(TINY).slot_count == theirs(TINY).slot_count == 2
        async with raw_link(here, await enrol(here)) as own:
            await own.hello()
            await until(sees(there, 2))
            assert mine(TINY).slot_count == theirs(TINY).slot_count == 2
