"""What running replicas show of the fit's predictions.

Decides which words of an engine are set beside which prediction: the tokens that its cache holds, the memory that it takes beside the
cache, and its rates where it tells them. Only an engine of the planned kind with the planned context is compared, at the share of memory
that it was started with, and each rate at the length of the past that it was measured over. Slots do not count: an owner's limit lowers
them without the engine's knowledge. It must not know how corrections are made of it.

Cache and memory are compared on cards only. On a processor the cache is as large as was asked for, and what the engine's processes hold
says little of what they need beside it: the cache's pages count once they are written, the weights' as long as they stay mapped, and
llama.cpp keeps old prompts in what is left.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from potluck_coordinator.domain.fit.corrections import Measure, Observation
from potluck_coordinator.domain.fit.engines import traits_of
from potluck_coordinator.domain.fit.fitting import correction_key, fit
from potluck_coordinator.domain.fit.hardware import BoxLink
from potluck_coordinator.domain.fit.load import Load
from potluck_coordinator.domain.fit.memory import kv_share
from potluck_coordinator.domain.fit.rates import rates_of
from potluck_coordinator.domain.planning.node_kinds import FIT_KIND, Room, hardware_of
from potluck_coordinator.domain.planning.sizing import architecture_of
from potluck_protocol.values import EngineState

if TYPE_CHECKING:
    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_coordinator.domain.fit.architecture import ModelArchitecture
    from potluck_coordinator.domain.fit.rates import Rates
    from potluck_coordinator.domain.fit.report import ShapeFit
    from potluck_coordinator.domain.node_view import NodeView
    from potluck_coordinator.domain.planning.words import PlannedReplica
    from potluck_protocol.values import EngineStatus


def observations(entry: CatalogueEntry, node: NodeView, replica: PlannedReplica, status: EngineStatus) -> tuple[Observation, ...]:
    """What a replica that answers shows; nothing of an entry without an architecture, or an engine that the fit does not model."""
    architecture, kind, shape = architecture_of(entry), FIT_KIND.get(replica.sizing.engine_kind), replica.sizing.shape
    if architecture is None or kind is None or status.state is not EngineState.READY or not _is_as_planned(status, replica):
        return ()
    room = Room(frozenset(shape.card_uuids), shape.memory_bytes)
    engine = {"engine_kind": status.engine_kind, "engine_version": status.engine_version}
    hardware, _ = hardware_of(node, room, on_cards=bool(shape.card_uuids), **engine)
    sequence_count = 1 if shape.card_uuids else replica.sizing.slot_count
    report = fit(
        architecture,
        (hardware,),
        engine_kind=kind,
        context_length_tokens=replica.sizing.context_length_tokens,
        sequence_count_wanted=sequence_count,
        memory_utilization=status.memory_utilization_percent / 100 or None,
    )
    predicted = next((fitted for fitted in report.shapes if _is_of_shape(fitted, replica)), None)
    if predicted is None:
        return ()
    key = correction_key(architecture, (hardware,), predicted.shape, kind)
    load = Load(traits_of(kind), replica.sizing.context_length_tokens, sequence_count)
    pairs = {
        Measure.KV_TOKENS: (status.kv_capacity_tokens if shape.card_uuids else None, predicted.kv_capacity_tokens),
        Measure.MEMORY: (_beside_cache(architecture, predicted, status) if shape.card_uuids else None, _predicted_beside_cache(predicted)),
        Measure.PREFILL: (status.prefill_tokens_per_second, _rates_over(status.prefill_past_tokens, architecture, predicted, load).prefill),
        Measure.DECODE: (
            status.decode_tokens_per_second,
            _rates_over(status.decode_past_tokens, architecture, predicted, load).decode_single,
        ),
    }
    return tuple(
        Observation(key, node.node_id, measure, observed, prediction)
        for measure, (observed, prediction) in pairs.items()
        if observed is not None
    )


def _beside_cache(architecture: ModelArchitecture, predicted: ShapeFit, status: EngineStatus) -> float | None:
    """Bytes that the engine holds of all its cards without the keys and values of the tokens that its cache has room for."""
    if status.memory_bytes is None or status.kv_capacity_tokens is None:
        return None
    copies = sum(len(stage.cards) * kv_share(architecture, stage) for stage in predicted.shape.stages)
    return status.memory_bytes - status.kv_capacity_tokens * predicted.kv_bytes_per_token * copies


def _predicted_beside_cache(predicted: ShapeFit) -> int:
    """The same, as the fit has it: each stage's fullest card stands for all of them."""
    stages = zip(predicted.shape.stages, predicted.memory, strict=True)
    return sum(len(stage.cards) * (card.weight_bytes + card.overhead_bytes) for stage, card in stages)


def _rates_over(past_tokens: int, architecture: ModelArchitecture, predicted: ShapeFit, load: Load) -> Rates:
    """The rates over so long a past; those of the plan where the node does not tell it. The fit takes a context to be half full."""
    if past_tokens <= 0:
        return predicted.rates
    context_length_tokens = max(1, min(2 * past_tokens, architecture.context_length_max_tokens))
    return rates_of(architecture, predicted.shape, replace(load, context_length_tokens=context_length_tokens), 1, BoxLink())


def _is_as_planned(status: EngineStatus, replica: PlannedReplica) -> bool:
    planned = (replica.sizing.engine_kind, replica.sizing.context_length_tokens)
    return (status.engine_kind, status.context_length_tokens) == planned


def _is_of_shape(fitted: ShapeFit, replica: PlannedReplica) -> bool:
    shape = replica.sizing.shape
    return fitted.shape.cards_per_replica == len(shape.card_uuids) and fitted.shape.tensor_parallel == shape.tensor_parallel_size
