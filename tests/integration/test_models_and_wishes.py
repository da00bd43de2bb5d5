"""Models added, shown, deployed, explained and taken away again, at a real coordinator, with the SDK's own calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import pytest_asyncio

from potluck import calls, catalogue_calls
from potluck.calls import Call, read_reply
from potluck.results import Deployment
from potluck_protocol.values import ModelId
from tests.support.catalogue_text import model_text
from tests.support.grpc_edge import authorization, detail_in
from tests.support.open_pool import OpenPool, open_pool

BUILT_IN = ModelId("smollm2-135m-instruct")
TINY = ModelId("tiny")
OFFER = ModelId("big")
ENTRY = model_text()
OFFER_ENTRY = """
[[model]]
model_id = "big"
source = "hf:org/big"
pinned = false
unchecked = "everything"
engine_kinds = ["vllm"]
context_length_tokens = 512
slot_count = 2
prompt_price_micro_credits = 1
completion_price_micro_credits = 2
licence = "MIT"
endpoints = ["/v1/chat/completions"]
created_at_unix_seconds = 1
"""


class Caller:
    """Someone with a key."""

    def __init__(self, channel: grpc.aio.Channel, key: str) -> None:
        self._channel = channel
        self._key = key

    async def make(self, call: Call[Any, Any]) -> Any:
        method = self._channel.unary_unary(
            call.method, request_serializer=type(call.request).SerializeToString, response_deserializer=call.reply_type.FromString
        )
        return read_reply(call, await method(call.request, metadata=authorization(self._key), timeout=20))

    async def refusal(self, call: Call[Any, Any]) -> tuple[str, str]:
        """The code and the words with which the call is refused."""
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await self.make(call)
        detail = detail_in(refused.value.trailing_metadata())
        return detail.code, detail.message


@pytest_asyncio.fixture
async def pool(tmp_path: Path) -> AsyncIterator[OpenPool]:
    async with open_pool(tmp_path) as opened:
        yield opened


@pytest_asyncio.fixture
async def operator(pool: OpenPool) -> AsyncIterator[Caller]:
    async with pool.grpc_channel() as channel:
        yield Caller(channel, pool.operator_key)


async def test_a_model_comes_is_deployed_and_goes(pool: OpenPool, operator: Caller) -> None:
    (added,) = await operator.make(catalogue_calls.add_model_text(ENTRY))
    assert (added.model_id, added.origin, added.deployment) == (TINY, "added", None)
    assert await operator.make(catalogue_calls.get_model(TINY)) == added
    assert (await operator.refusal(catalogue_calls.explain_deployment(TINY)))[0] == "not_found"

    await operator.make(catalogue_calls.deploy(Deployment(TINY, 2, "flex")))
    assert (await operator.make(catalogue_calls.get_model(TINY))).deployment == Deployment(TINY, 2, "flex")
    assert await operator.make(catalogue_calls.explain_deployment(TINY)) == ()
    node_id, _ = await pool.joined_node()
    (verdict,) = await operator.make(catalogue_calls.explain_deployment(TINY))
    assert (verdict.node_id, verdict.display_name, verdict.verdict) == (node_id, "box", "offline")
    wishes = {info.deployment: info for info in await operator.make(catalogue_calls.list_deployments())}
    assert wishes.keys() == {Deployment(BUILT_IN), Deployment(TINY, 2, "flex")}
    assert "offline" in wishes[Deployment(TINY, 2, "flex")].shortfall

    await operator.make(catalogue_calls.undeploy(TINY))
    await operator.make(catalogue_calls.undeploy(TINY))
    assert [info.deployment for info in await operator.make(catalogue_calls.list_deployments())] == [Deployment(BUILT_IN)]
    await operator.make(catalogue_calls.remove_model(TINY))
    for call in (
        catalogue_calls.get_model(TINY),
        catalogue_calls.remove_model(TINY),
        catalogue_calls.deploy(Deployment(TINY)),
        catalogue_calls.undeploy(TINY),
        catalogue_calls.explain_deployment(TINY),
    ):
        assert (await operator.refusal(call))[0] == "model_not_found", call.method


async def test_what_ships_is_not_removed_but_undeployed(operator: Caller) -> None:
    code, words = await operator.refusal(catalogue_calls.remove_model(BUILT_IN))
    assert code == "invalid_request"
    assert f"potluck undeploy {BUILT_IN}" in words


async def test_an_offer_is_listed_for_who_asks_for_it_and_cannot_be_deployed(pool: OpenPool, operator: Caller) -> None:
    await operator.make(catalogue_calls.add_model_text(ENTRY + OFFER_ENTRY))
    _, key = await pool.user_key("user")
    async with pool.grpc_channel() as channel:
        user = Caller(channel, key)
        everything = {model.model_id: model.offered_repository for model in await user.make(calls.list_models(with_offers=True))}
        assert (everything[TINY], everything[OFFER]) == ("", "hf:org/big")
        servable = {model.model_id for model in await user.make(calls.list_models())}
        assert servable >= {BUILT_IN, TINY}
        assert OFFER not in servable
        # What is the operator's to do may be anyone's to read.
        assert (await user.make(catalogue_calls.get_model(OFFER))).source == "hf:org/big"
        assert [info.deployment for info in await user.make(catalogue_calls.list_deployments())] == [Deployment(BUILT_IN)]
    headers = {"authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(pool.http_url, headers=headers) as session, session.get("/v1/models") as response:
        assert {model["id"] for model in (await response.json())["data"]} == servable
    code, words = await operator.refusal(catalogue_calls.deploy(Deployment(OFFER)))
    assert code == "invalid_request"
    assert "potluck models add hf:org/big@REVISION --as big" in words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[model]", "not a good catalogue"),
        (ENTRY.replace("slot_count = 2", "slot_count = 0"), "slot_count"),
        (ENTRY + ENTRY, "twice"),
        ("a = " + "[" * 20_000, "not a good catalogue"),
        ("a = " + "1" * 5_000, "not a good catalogue"),
        ("", "model"),
    ],
    ids=["no TOML", "a bad entry", "a model twice", "deep nesting", "a long number", "nothing"],
)
async def test_a_catalogue_that_is_none_is_refused_whole(operator: Caller, text: str, words: str) -> None:
    before = await operator.make(calls.list_models(with_offers=True))
    code, message = await operator.refusal(catalogue_calls.add_model_text(text))
    assert code == "invalid_request"
    assert words in message
    assert await operator.make(calls.list_models(with_offers=True)) == before


async def test_a_repository_that_is_none_is_refused_with_how_one_is_written(operator: Caller) -> None:
    for source in ("hf:org/name", "org/name@main", "hf:../name@main", "hf:org/name@main\n", "https://hub/org/name"):
        code, message = await operator.refusal(catalogue_calls.add_model_from_hub(source))
        assert code == "invalid_request"
        assert "hf:ORG/NAME@REVISION" in message
