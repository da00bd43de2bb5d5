"""What of an operator's words over models and deployments gets through to the desk, and what is refused before."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message

from potluck import catalogue_calls
from potluck.calls import Call, read_reply
from potluck.results import Deployment, Progress
from potluck_coordinator.desks import DeploymentRecord, ModelRecord, NodeVerdictRecord
from potluck_coordinator.desks import Progress as DeskProgress
from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_coordinator.domain import catalogue
from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.repository import ModelWishes
from potluck_coordinator.gateway.pool_servicer import PoolServicer
from potluck_protocol.bounds import CATALOGUE_CHARACTERS_MAX
from potluck_protocol.clock import SystemClock
from potluck_protocol.v1 import pool_pb2
from potluck_protocol.values import ModelFile, ModelId, NodeId, PinnedFile
from tests.support.grpc_edge import CLOCK, OPERATOR_KEY, GrpcEdge, authorization, detail_in
from tests.support.planning import ARCHITECTURES
from tests.support.replicas import catalogue_entry

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = ModelId("llama-8b")
SOURCE = f"hf:org/llama@{'c' * 40}"
FILE = ModelFile(MODEL, SOURCE, "a.safetensors", "a" * 64, 5, further_files=(PinnedFile("config.json", "b" * 64, 7),))
ENTRY = catalogue_entry(
    MODEL, file=FILE, engine_kinds=("vllm", "sglang"), architecture=ARCHITECTURES["8b"], quantization="awq", unchecked="its licence"
)
WISH = catalogue.Deployment(MODEL, 3, ServiceTier.FLEX)


class Desk:
    """The catalogue desk's face, which remembers what it was asked and answers `answer`."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.answer: Any = ()

    def __getattr__(self, method: str) -> Any:
        async def call(*arguments: Any) -> Any:
            self.asked.append((method, *arguments))
            return self.answer

        return call


class Edge:
    """A port with the desk behind it, and the operator who calls."""

    def __init__(self, desk: Desk, channel: grpc.aio.Channel) -> None:
        self.desk = desk
        self._channel = channel

    async def make(self, call: Call[Any, Any]) -> Any:
        """As the SDK makes the call."""
        return read_reply(call, await self.send(call.method.rpartition("/")[2], call.request, call.reply_type))

    async def send(self, name: str, request: Message, reply_type: Any) -> Any:
        method = self._channel.unary_unary(
            f"/potluck_protocol.v1.PoolService/{name}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=reply_type.FromString,
        )
        return await method(request, metadata=authorization(OPERATOR_KEY), timeout=20)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Edge]:
    authority = CertificateAuthority.load_or_create(tmp_path_factory.mktemp("pool") / "ca", CLOCK.unix_ms())
    desk = Desk()
    async with GrpcEdge(authority, pool=PoolServicer(desk, desk, desk, desk, SystemClock())) as port:
        yield Edge(desk, port.channel)


@pytest.fixture
def edge(served: Edge) -> Edge:
    served.desk.asked.clear()
    return served


def hub(**fields: Any) -> pool_pb2.AddModelRequest:
    return pool_pb2.AddModelRequest(hub=pool_pb2.HubModel(**({"source": "hf:org/name@main"} | fields)))


def wish(**fields: Any) -> pool_pb2.DeployRequest:
    return pool_pb2.DeployRequest(deployment=pool_pb2.Deployment(**({"model_id": "m", "tier": pool_pb2.SERVICE_TIER_FLEX} | fields)))


REFUSED = {
    "no model to add": (pool_pb2.AddModelRequest(), ""),
    "no repository": (hub(source=""), "source"),
    "a long repository": (hub(source="hf:" + "o" * 254), "source"),
    "an empty id": (hub(model_id=""), "model_id"),
    "an id that is a path": (hub(model_id="org/name"), "model_id"),
    "an id that goes on in another line": (hub(model_id="name\n"), "model_id"),
    "a long id": (hub(model_id="n" * 97), "model_id"),
    "a long file name": (hub(file_name="n" * 257), "file_name"),
    "a negative price": (hub(prompt_price_micro_credits_per_token=-1), "prompt_price_micro_credits_per_token"),
    "a price beyond all": (hub(completion_price_micro_credits_per_token=10**9 + 1), "completion_price_micro_credits_per_token"),
    "no context": (hub(context_length_tokens=0), "context_length_tokens"),
    "a context beyond all": (hub(context_length_tokens=2**24 + 1), "context_length_tokens"),
    "no slots": (hub(slot_count=0), "slot_count"),
    "slots beyond all": (hub(slot_count=1025), "slot_count"),
    "an engine that is no word": (hub(engine_kinds=["vllm --trust-remote-code"]), "engine_kinds"),
    "owners' own engines": (hub(engine_kinds=["attach"]), "engine_kinds"),
    "nine engines": (hub(engine_kinds=["vllm"] * 9), "engine_kinds"),
    "nothing to remove": (pool_pb2.RemoveModelRequest(), "model_id"),
    "a long name": (pool_pb2.GetModelRequest(model_id="m" * 257), "model_id"),
    "no wish": (pool_pb2.DeployRequest(), "model_id"),
    "a wish in no tier": (wish(tier=0), "tier"),
    "a wish in a tier that there is not": (wish(tier=7), "tier"),
    "a wish for less than nothing": (wish(replica_count=-1), "replica_count"),
    "a wish beyond all": (wish(replica_count=10_001), "replica_count"),
    "nothing to withdraw": (pool_pb2.UndeployRequest(), "model_id"),
    "nothing to explain": (pool_pb2.ExplainDeploymentRequest(), "model_id"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_what_is_out_of_bounds_does_not_reach_the_desk(edge: Edge, what: str) -> None:
    request, param = REFUSED[what]
    assert await refusal(edge, request) == ("invalid_request", param)
    assert edge.desk.asked == []


async def test_a_catalogue_file_has_a_bound_and_says_so(edge: Edge) -> None:
    edge.desk.answer = ()
    assert await edge.make(catalogue_calls.add_model_text("#" * CATALOGUE_CHARACTERS_MAX)) == ()
    request = pool_pb2.AddModelRequest(catalogue_toml="#" * (CATALOGUE_CHARACTERS_MAX + 1))
    assert await refusal(edge, request) == ("request_too_large", "catalogue_toml")
    assert len(edge.desk.asked) == 1


async def test_what_is_said_of_a_repository_arrives_and_what_is_not_said_stays_open(edge: Edge) -> None:
    edge.desk.answer = DeskProgress("Hashing config.json")
    progress = await edge.make(catalogue_calls.add_model_from_hub("hf:org/name@main"))
    assert progress == Progress("Hashing config.json")
    said = catalogue_calls.add_model_from_hub(
        "hf:org/name@main",
        model_id="a:b",
        file_name="a.gguf",
        prompt_price_micro_credits_per_token=0,
        completion_price_micro_credits_per_token=10**9,
        engine_kinds=("vllm", "sglang"),
        context_length_tokens=1,
        slot_count=1024,
    )
    await edge.make(said)
    assert edge.desk.asked == [
        ("pin_model", "hf:org/name@main", ModelWishes()),
        ("pin_model", "hf:org/name@main", ModelWishes("a:b", "a.gguf", 0, 10**9, ("vllm", "sglang"), 1, 1024)),
    ]


async def test_a_model_is_shown_with_everything_that_the_catalogue_says(edge: Edge) -> None:
    edge.desk.answer = ModelRecord(ENTRY, "added", WISH)
    shown = await edge.make(catalogue_calls.get_model(MODEL))
    assert edge.desk.asked == [("get_model", MODEL)]
    assert (shown.model_id, shown.origin, shown.source, shown.files) == (MODEL, "added", SOURCE, FILE.files)
    assert (shown.engine_kinds, shown.context_length_tokens, shown.slot_count) == (("vllm", "sglang"), 2048, 4)
    assert (shown.prompt_price_micro_credits_per_token, shown.completion_price_micro_credits_per_token) == (1, 4)
    assert (shown.licence, shown.endpoints, shown.created_at_unix_seconds) == ("Apache-2.0", ENTRY.endpoints, 1_700_000_000)
    assert (shown.quantization, shown.unchecked, shown.deployment) == ("awq", "its licence", Deployment(MODEL, 3, "flex"))
    assert {name: shown.architecture[name] for name in ("layer_count", "kv_head_count", "bits_per_weight", "kv_dtype_bytes")} == {
        "layer_count": 32,
        "kv_head_count": 8,
        "bits_per_weight": 4.156,
        "kv_dtype_bytes": 2,
    }
    # Words, and yes or no, are no numbers; what is not known is not 0.
    assert shown.architecture.keys().isdisjoint({"model_id", "name", "tie_word_embeddings", "covers_embeddings", "weight_bytes_of_files"})


async def test_an_offer_shows_its_repository_and_no_files(edge: Edge) -> None:
    edge.desk.answer = ModelRecord(catalogue_entry(MODEL, file=None, repository="hf:org/llama"), "built_in", None)
    shown = await edge.make(catalogue_calls.get_model(MODEL))
    assert (shown.source, shown.files, shown.architecture, shown.deployment) == ("hf:org/llama", (), {}, None)


async def test_a_model_of_owners_own_engines_has_no_files(edge: Edge) -> None:
    file = ModelFile(MODEL, "attach:llama3", "", "", 0)
    edge.desk.answer = ModelRecord(catalogue_entry(MODEL, file=file, engine_kinds=("attach",)), "file", None)
    shown = await edge.make(catalogue_calls.get_model(MODEL))
    assert (shown.source, shown.files) == ("attach:llama3", ())


@pytest.mark.parametrize(("count", "tier"), [(None, "default"), (0, "flex"), (2, "default"), (10_000, "flex")])
async def test_a_wish_arrives_as_it_was_made(edge: Edge, count: int | None, tier: Any) -> None:
    await edge.make(catalogue_calls.deploy(Deployment(MODEL, count, tier)))
    assert edge.desk.asked == [("deploy", catalogue.Deployment(MODEL, count, ServiceTier(tier)))]


async def test_wishes_and_verdicts_are_told_word_by_word(edge: Edge) -> None:
    edge.desk.answer = (DeploymentRecord(WISH, 1, 2, 5, "nodes: 1 no_fit"), DeploymentRecord(catalogue.Deployment(MODEL), 0, 0, 0, ""))
    first, second = await edge.make(catalogue_calls.list_deployments())
    assert first.deployment == Deployment(MODEL, 3, "flex")
    assert (first.ready_replica_count, first.starting_replica_count, first.waiting_request_count) == (1, 2, 5)
    assert first.shortfall == "nodes: 1 no_fit"
    assert second.deployment == Deployment(MODEL, None, "default")
    edge.desk.answer = (NodeVerdictRecord(NodeId("n1"), "den", "no_fit", "it needs 40 GiB"),)
    (verdict,) = await edge.make(catalogue_calls.explain_deployment(MODEL))
    assert (verdict.node_id, verdict.display_name, verdict.verdict, verdict.reason) == ("n1", "den", "no_fit", "it needs 40 GiB")
    await edge.make(catalogue_calls.undeploy(MODEL))
    await edge.make(catalogue_calls.remove_model(MODEL))
    assert edge.desk.asked[1:] == [("explain", MODEL), ("undeploy", MODEL), ("remove_model", MODEL)]


async def refusal(edge: Edge, request: Message) -> tuple[str, str]:
    """The code and the param with which the request is refused."""
    name = type(request).__name__.removesuffix("Request")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await edge.send(name, request, getattr(pool_pb2, f"{name}Response"))
    detail = detail_in(refused.value.trailing_metadata())
    return detail.code, detail.param
