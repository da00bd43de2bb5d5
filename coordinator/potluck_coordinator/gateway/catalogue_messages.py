"""The catalogue, wishes and verdicts between the wire and the desk's values.

Decides how much of an operator's words is taken: a text, a name, a count or a price beyond its bound, and a word that is in no enum, are
refused with INVALID_REQUEST. What is shown of an entry is everything; which of its numbers are the architecture's is decided here too. It
must not know what the desk makes of them.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from potluck_coordinator.catalogue_file import CONTEXT_TOKENS_MAX, MODEL_ID_PATTERN, PRICE_MICRO_CREDITS_MAX, SLOTS_MAX
from potluck_coordinator.domain.catalogue import ATTACH_KIND, Deployment, ServiceTier
from potluck_coordinator.domain.entry_rules import ENGINE_KIND, ENGINE_KINDS_MAX
from potluck_coordinator.domain.repository import ModelWishes
from potluck_protocol.bounds import CATALOGUE_CHARACTERS_MAX, REPLICAS_MAX, items, text, word
from potluck_protocol.engine_codec import ENDPOINT_NUMBER
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.hardware_codec import set_field
from potluck_protocol.v1 import node_pb2, pool_pb2
from potluck_protocol.values import ModelId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from potluck_coordinator.desks import DeploymentRecord, ModelRecord, NodeVerdictRecord
    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_coordinator.domain.fit.architecture import ModelArchitecture

SERVICE_TIER_NUMBER: Final = {
    ServiceTier.FLEX: pool_pb2.SERVICE_TIER_FLEX,
    ServiceTier.DEFAULT: pool_pb2.SERVICE_TIER_DEFAULT,
}
_MODEL_ID: Final = re.compile(MODEL_ID_PATTERN)


def model_id_value(given: str) -> ModelId:
    """The model that a call is about; whether there is such a one is the desk's to say."""
    if not given:
        raise _refusal("Name the model; `potluck models list` lists those that there are.", "model_id")
    return ModelId(text(given, "model_id"))


def catalogue_text_value(given: str) -> str:
    """A catalogue file's text; raises PotluckError(REQUEST_TOO_LARGE)."""
    if len(given) > CATALOGUE_CHARACTERS_MAX:
        message = f"The catalogue file has more than {CATALOGUE_CHARACTERS_MAX} characters. Add its models in several files."
        raise PotluckError(ErrorCode.REQUEST_TOO_LARGE, message, param="catalogue_toml")
    return given


def source_value(message: pool_pb2.HubModel) -> str:
    """The repository that was named; which ones there are is the desk's to say."""
    if not message.source:
        raise _refusal("Name the repository, as hf:ORG/NAME@REVISION.", "source")
    return text(message.source, "source")


def wishes_value(message: pool_pb2.HubModel) -> ModelWishes:
    """What the operator says of a new entry."""
    if message.HasField("model_id") and not _MODEL_ID.match(message.model_id):
        raise _refusal("A model's id has up to 96 letters, digits and . _ : -, and begins with a letter or digit.", "model_id")
    return ModelWishes(
        model_id=set_field(message, "model_id"),
        file_name=text(message.file_name, "file_name") if message.HasField("file_name") else None,
        prompt_price_micro_credits=_number(message, "prompt_price_micro_credits_per_token", 0, PRICE_MICRO_CREDITS_MAX),
        completion_price_micro_credits=_number(message, "completion_price_micro_credits_per_token", 0, PRICE_MICRO_CREDITS_MAX),
        engine_kinds=_engine_kinds(message.engine_kinds),
        context_length_tokens=_number(message, "context_length_tokens", 1, CONTEXT_TOKENS_MAX),
        slot_count=_number(message, "slot_count", 1, SLOTS_MAX),
    )


def deployment_value(message: pool_pb2.Deployment) -> Deployment:
    """A wish."""
    return Deployment(
        model_id=model_id_value(message.model_id),
        replica_count=_number(message, "replica_count", 0, REPLICAS_MAX),
        tier=word(SERVICE_TIER_NUMBER, message.tier, "tier"),
    )


def model_message(record: ModelRecord) -> pool_pb2.CatalogueModel:
    """All of an entry."""
    entry = record.entry
    return pool_pb2.CatalogueModel(
        model_id=entry.model_id,
        origin=record.origin,
        source=entry.repository if entry.file is None else entry.file.source,
        files=_file_messages(entry),
        engine_kinds=entry.engine_kinds,
        context_length_tokens=entry.context_length_tokens,
        slot_count=entry.slot_count,
        prompt_price_micro_credits_per_token=entry.prompt_price_micro_credits,
        completion_price_micro_credits_per_token=entry.completion_price_micro_credits,
        licence=entry.licence,
        endpoints=[ENDPOINT_NUMBER[endpoint] for endpoint in entry.endpoints],
        created_at_unix_seconds=entry.created_at_unix_seconds,
        quantization=entry.quantization,
        architecture=[] if entry.architecture is None else _fact_messages(entry.architecture),
        unchecked=entry.unchecked,
        deployment=None if record.deployment is None else _deployment_message(record.deployment),
    )


def deployment_status_message(record: DeploymentRecord) -> pool_pb2.DeploymentStatus:
    return pool_pb2.DeploymentStatus(
        deployment=_deployment_message(record.deployment),
        ready_replica_count=record.ready_count,
        starting_replica_count=record.starting_count,
        waiting_request_count=record.waiting_request_count,
        shortfall=record.shortfall,
    )


def node_verdict_message(record: NodeVerdictRecord) -> pool_pb2.NodeVerdict:
    return pool_pb2.NodeVerdict(node_id=record.node_id, display_name=record.display_name, verdict=record.verdict, reason=record.reason)


def _deployment_message(deployment: Deployment) -> pool_pb2.Deployment:
    return pool_pb2.Deployment(
        model_id=deployment.model_id, replica_count=deployment.replica_count, tier=SERVICE_TIER_NUMBER[deployment.tier]
    )


def _file_messages(entry: CatalogueEntry) -> list[node_pb2.PinnedFile]:
    if entry.file is None or entry.attached_name:
        return []
    return [node_pb2.PinnedFile(file_name=file.file_name, sha256=file.sha256, size_bytes=file.size_bytes) for file in entry.file.files]


def _fact_messages(architecture: ModelArchitecture) -> list[pool_pb2.ArchitectureFact]:
    """Its numbers under their own names, those of how the weights are stored among them; words and yes or no are left out."""
    facts = asdict(architecture)
    facts |= facts.pop("quantization")
    return [
        pool_pb2.ArchitectureFact(name=name, value=value)
        for name, value in facts.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


def _engine_kinds(given: Sequence[str]) -> tuple[str, ...]:
    for kind in items(given, ENGINE_KINDS_MAX, "engine_kinds"):
        if not ENGINE_KIND.fullmatch(kind):
            raise _refusal("An engine kind is a word such as vllm, sglang or llamacpp.", "engine_kinds")
        if kind == ATTACH_KIND:
            raise _refusal("A repository's files are not for engines that owners run themselves.", "engine_kinds")
    return tuple(dict.fromkeys(given))


def _number(message: pool_pb2.HubModel | pool_pb2.Deployment, field: str, least: int, most: int) -> int | None:
    """An optional number; None where it was not set."""
    number: int | None = set_field(message, field)
    if number is not None and not least <= number <= most:
        raise _refusal(f"{field} must be between {least} and {most}.", field)
    return number


def _refusal(message: str, field: str) -> PotluckError:
    return PotluckError(ErrorCode.INVALID_REQUEST, message, param=field)
