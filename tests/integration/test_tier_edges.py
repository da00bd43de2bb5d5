"""Tiers at the edges: what an answer and a refusal say over HTTP and gRPC, and that the promise is kept in the books."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import aiohttp
import grpc
import pytest

from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.tiers import AskedTier, PromiseCount
from potluck_coordinator.gateway.interceptors import AUTHORIZATION
from potluck_protocol.channels import CHANNEL_OPTIONS
from potluck_protocol.v1 import common_pb2, inference_pb2, inference_pb2_grpc, pool_pb2, pool_pb2_grpc
from tests.support.coordinator import TINY
from tests.support.request_path import DONE, USAGE_EVENT, begin, pool, read_all, request_of

BODY = {"model": TINY, "service_tier": "default", "messages": [{"role": "user", "content": "hi"}]}


async def finish(node, answer, start):
    await node.chunk(start.attempt_id, 1, USAGE_EVENT + DONE)
    await node.end(start.attempt_id, 2)
    data = await read_all(answer)
    await answer.close()
    return data


def channel_of(coordinator):
    authority = (coordinator.settings.certificate_authority_dir / "ca.pem").read_bytes()
    credentials = grpc.ssl_channel_credentials(authority)
    return grpc.aio.secure_channel(f"127.0.0.1:{coordinator.endpoints.grpc_port}", credentials, options=CHANNEL_OPTIONS)


@pytest.mark.timeout(120)
async def test_what_a_client_is_told_of_its_tier(tmp_path):
    async with pool(tmp_path, default_tier_rate="2/hour", gateways=2) as (coordinator, node):
        requests, metadata = coordinator.gateway.requests, ((AUTHORIZATION, f"Bearer {coordinator.operator_key}"),)
        for number in range(2):
            answer, start = await begin(coordinator, node, number)
            assert answer.tier is ServiceTier.DEFAULT
            assert b'{"service_tier":"default",' in await finish(node, answer, start)
        headers = {"authorization": f"Bearer {coordinator.operator_key}"}
        async with aiohttp.ClientSession(coordinator.url, headers=headers) as session:
            async with session.post("/v1/chat/completions", json=BODY) as refused:
                error = (await refused.json())["error"]
                assert (refused.status, error["code"], error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
                assert 3590 < int(refused.headers["retry-after"]) <= 3600
                assert refused.headers["x-ratelimit-limit-requests"] == "2"
                assert refused.headers["x-ratelimit-remaining-requests"] == "0"
                assert refused.headers["x-ratelimit-reset-requests"].startswith("59m")

            asked = asyncio.ensure_future(session.post("/v1/chat/completions", json=BODY | {"service_tier": "auto"}))
            start = await node.next_start(2)
            assert "service_tier" not in json.loads(start.body)
            document = b'{"choices":[{"message":{"content":"hi"}}],"service_tier":null,"usage":{"prompt_tokens":5,"completion_tokens":1}}'
            await node.chunk(start.attempt_id, 0, document)
            await node.end(start.attempt_id, 1)
            async with await asyncio.wait_for(asked, 10) as answered:
                assert answered.headers["x-potluck-service-tier"] == "flex"
                assert (await answered.json())["service_tier"] == "flex"

        async with channel_of(coordinator) as channel:
            asked = inference_pb2.GenerateRequest(endpoint=common_pb2.ENDPOINT_CHAT_COMPLETIONS, body_json=json.dumps(BODY).encode())
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(asked, metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await call.read()
            assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert dict(failed.value.trailing_metadata())["x-ratelimit-remaining-requests"] == "0"
            tiers = await pool_pb2_grpc.PoolServiceStub(channel).GetTiers(pool_pb2.GetTiersRequest(), metadata=metadata)
            assert (tiers.default_request_count_max, tiers.remaining_request_count, tiers.first_token_ms) == (2, 0, 5000)
            assert (tiers.hour.request_count, tiers.hour.kept_count) == (2, 2), "flex has no promise"

        async with asyncio.timeout(5):
            while not (hours := (await coordinator.directory.pool.register_gateway(1)).gate_counts.promise_hours):
                await asyncio.sleep(0.1)
        assert sum(hours.values(), PromiseCount()) == PromiseCount(2, 2), "and a restart does not forget"
        assert requests.in_flight_count == 0


@pytest.mark.timeout(120)
async def test_a_refused_request_does_not_count_and_a_broken_promise_does(tmp_path):
    async with pool(tmp_path, default_tier_rate="2/hour", queue_length_max=0, default_tier_first_token_seconds=60) as (coordinator, node):
        running = [await begin(coordinator, node, number) for number in range(2)]
        request = replace(await request_of(coordinator), asked_tier=AskedTier.FLEX)
        with pytest.raises(Exception, match="So many requests"):
            await coordinator.gateway.requests.begin(request)
        assert coordinator.gateway.requests.gate.compliance().hour == PromiseCount()
        for answer, start in running:
            await finish(node, answer, start)
        assert coordinator.gateway.requests.gate.compliance().hour == PromiseCount(2, 2)
        account_id = request.account_id
        assert coordinator.gateway.requests.gate.windows.allowance(account_id).remaining_count == 0
