"""What running replicas show of the fit's predictions.

Decides which words of an engine are set beside which prediction: the tokens that its cache holds, and its rates where it tells them. Only
what ran as it was planned is compared, at the share of memory that it was started with. It must not know how corrections are made of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from potluck_coordinator.domain.fit.corrections import Measure, Observation
from potluck_coordinator.domain.fit.fitting import correction_key, fit
from potluck_coordinator.domain.planning.sizing import FIT_KIND, Room, architecture_of, hardware_of
from potluck_protocol.values import EngineState

if TYPE_CHECKING:
    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_coordinator.domain.fit.report import ShapeFit
    from potluck_coordinator.domain.node_view import NodeView
    from potluck_coordinator.domain.planning.words import PlannedReplica
    from potluck_protocol.values import EngineStatus


def observations(entry: CatalogueEntry, node: NodeView, replica: PlannedReplica, status: EngineStatus) -> tuple[Observation, ...]:
    """What a replica that answers shows; nothing of an entry without an architecture, or an engine that the fit does not model."""
    architecture, kind, shape = architecture_of(entry), FIT_KIND.get(replica.sizing.engine_kind), replica.sizing.shape
    if architecture is None or kind is None or status.state is not EngineState.READY:
        return ()
    room = Room(frozenset(shape.card_uuids), shape.memory_bytes)
    hardware, _ = hardware_of(node, room, on_cards=bool(shape.card_uuids))
    report = fit(
        architecture,
        (hardware,),
        engine_kind=kind,
        context_length_tokens=replica.sizing.context_length_tokens,
        sequence_count_wanted=1 if shape.card_uuids else replica.sizing.slot_count,
        memory_utilization=status.memory_utilization_percent / 100 or None,
    )
    predicted = next((fitted for fitted in report.shapes if _is_of_shape(fitted, replica)), None)
    if predicted is None:
        return ()
    key = correction_key(architecture, (hardware,), predicted.shape, kind)
    pairs = {
        # Without cards the cache is as large as was asked for.
        Measure.KV_TOKENS: (status.kv_capacity_tokens if shape.card_uuids else None, predicted.kv_capacity_tokens),
        Measure.PREFILL: (status.prefill_tokens_per_second, predicted.rates.prefill),
        Measure.DECODE: (status.decode_tokens_per_second, predicted.rates.decode_single),
    }
    return tuple(
        Observation(key, node.node_id, measure, observed, prediction)
        for measure, (observed, prediction) in pairs.items()
        if observed is not None
    )


def _is_of_shape(fitted: ShapeFit, replica: PlannedReplica) -> bool:
    shape = replica.sizing.shape
    return fitted.shape.cards_per_replica == len(shape.card_uuids) and fitted.shape.tensor_parallel == shape.tensor_parallel_size
