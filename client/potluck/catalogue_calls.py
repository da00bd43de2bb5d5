"""The operator's calls about models and deployments, as values like those of `calls`.

Decides how a catalogue's and a deployment's words become messages and results. It must not know that a repository takes several calls to
be read: whoever asks makes the same call again while the result is a `Progress`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from potluck.calls import POOL_SERVICE, Call, read_nothing
from potluck.results import CatalogueModel, Deployment, DeploymentInfo, NodeVerdict, Progress, Tier
from potluck_protocol.engine_codec import endpoint_from_number
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import pool_pb2
from potluck_protocol.values import ModelId, NodeId, PinnedFile

_TIER_NUMBER: Final[dict[Tier, pool_pb2.ServiceTier.ValueType]] = {
    "flex": pool_pb2.SERVICE_TIER_FLEX,
    "default": pool_pb2.SERVICE_TIER_DEFAULT,
}


def add_model_text(catalogue_toml: str) -> Call[pool_pb2.AddModelResponse, tuple[CatalogueModel, ...]]:
    """The models of a catalogue file's text, in place of those of the same names."""
    return Call(
        POOL_SERVICE + "AddModel",
        pool_pb2.AddModelRequest(catalogue_toml=catalogue_toml),
        pool_pb2.AddModelResponse,
        lambda reply: tuple(_model(message) for message in reply.models),
    )


def add_model_from_hub(
    source: str,
    *,
    model_id: str | None = None,
    file_name: str | None = None,
    prompt_price_micro_credits_per_token: int | None = None,
    completion_price_micro_credits_per_token: int | None = None,
    engine_kinds: Sequence[str] = (),
    context_length_tokens: int | None = None,
    slot_count: int | None = None,
) -> Call[pool_pb2.AddModelResponse, CatalogueModel | Progress]:
    """A repository of the hub, "hf:ORG/NAME@REVISION"; what is None is taken from an offer of the same model, else a default."""
    hub = pool_pb2.HubModel(
        source=source,
        model_id=model_id,
        file_name=file_name,
        prompt_price_micro_credits_per_token=prompt_price_micro_credits_per_token,
        completion_price_micro_credits_per_token=completion_price_micro_credits_per_token,
        engine_kinds=engine_kinds,
        context_length_tokens=context_length_tokens,
        slot_count=slot_count,
    )
    return Call(
        POOL_SERVICE + "AddModel",
        pool_pb2.AddModelRequest(hub=hub),
        pool_pb2.AddModelResponse,
        lambda reply: _model(reply.models[0]) if reply.models else Progress(reply.progress),
    )


def remove_model(model_id: ModelId) -> Call[pool_pb2.RemoveModelResponse, None]:
    request = pool_pb2.RemoveModelRequest(model_id=model_id)
    # A second call would say that there is no such model.
    return Call(POOL_SERVICE + "RemoveModel", request, pool_pb2.RemoveModelResponse, read_nothing, repeatable=False)


def get_model(model_id: ModelId) -> Call[pool_pb2.GetModelResponse, CatalogueModel]:
    return Call(
        POOL_SERVICE + "GetModel",
        pool_pb2.GetModelRequest(model_id=model_id),
        pool_pb2.GetModelResponse,
        lambda reply: _model(reply.model),
    )


def deploy(deployment: Deployment) -> Call[pool_pb2.DeployResponse, None]:
    """Wishes a model served; replaces an earlier wish for it."""
    message = pool_pb2.Deployment(model_id=deployment.model_id, replica_count=deployment.replica_count, tier=_TIER_NUMBER[deployment.tier])
    return Call(POOL_SERVICE + "Deploy", pool_pb2.DeployRequest(deployment=message), pool_pb2.DeployResponse, read_nothing)


def undeploy(model_id: ModelId) -> Call[pool_pb2.UndeployResponse, None]:
    """Takes the wish back; once more changes nothing."""
    return Call(POOL_SERVICE + "Undeploy", pool_pb2.UndeployRequest(model_id=model_id), pool_pb2.UndeployResponse, read_nothing)


def list_deployments() -> Call[pool_pb2.ListDeploymentsResponse, tuple[DeploymentInfo, ...]]:
    return Call(
        POOL_SERVICE + "ListDeployments",
        pool_pb2.ListDeploymentsRequest(),
        pool_pb2.ListDeploymentsResponse,
        lambda reply: tuple(
            DeploymentInfo(
                deployment=_deployment(message.deployment),
                ready_replica_count=message.ready_replica_count,
                starting_replica_count=message.starting_replica_count,
                waiting_request_count=message.waiting_request_count,
                shortfall=message.shortfall,
            )
            for message in reply.deployments
        ),
    )


def explain_deployment(model_id: ModelId) -> Call[pool_pb2.ExplainDeploymentResponse, tuple[NodeVerdict, ...]]:
    """Every node's part in a deployment, those that serve it first, then what became of groups of nodes."""
    return Call(
        POOL_SERVICE + "ExplainDeployment",
        pool_pb2.ExplainDeploymentRequest(model_id=model_id),
        pool_pb2.ExplainDeploymentResponse,
        lambda reply: tuple(
            NodeVerdict(NodeId(message.node_id), message.display_name, message.verdict, message.reason) for message in reply.verdicts
        ),
    )


def _model(message: pool_pb2.CatalogueModel) -> CatalogueModel:
    return CatalogueModel(
        model_id=ModelId(message.model_id),
        origin=message.origin,
        source=message.source,
        files=tuple(PinnedFile(file.file_name, file.sha256, file.size_bytes) for file in message.files),
        engine_kinds=tuple(message.engine_kinds),
        context_length_tokens=message.context_length_tokens,
        slot_count=message.slot_count,
        prompt_price_micro_credits_per_token=message.prompt_price_micro_credits_per_token,
        completion_price_micro_credits_per_token=message.completion_price_micro_credits_per_token,
        licence=message.licence,
        endpoints=tuple(endpoint_from_number(number) for number in message.endpoints),
        created_at_unix_seconds=message.created_at_unix_seconds,
        quantization=message.quantization,
        architecture={fact.name: int(fact.value) if fact.value.is_integer() else fact.value for fact in message.architecture},
        unchecked=message.unchecked,
        deployment=_deployment(message.deployment) if message.HasField("deployment") else None,
    )


def _deployment(message: pool_pb2.Deployment) -> Deployment:
    return Deployment(
        model_id=ModelId(message.model_id),
        replica_count=message.replica_count if message.HasField("replica_count") else None,
        tier=_tier(message.tier),
    )


def _tier(number: int) -> Tier:
    for tier, its_number in _TIER_NUMBER.items():
        if its_number == number:
            return tier
    raise PotluckError(ErrorCode.INVALID_REQUEST, f"tier has the unknown value {number}; upgrade this side.", param="tier")
