"""Builders of replica views, catalogue entries and the like, with the fields a test does not care about filled in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from potluck_coordinator.domain.catalogue import CatalogueEntry
from potluck_coordinator.domain.placement import ReplicaView
from potluck_coordinator.gateway.roster import Roster
from potluck_protocol.values import Endpoint, ModelFile, ModelId, NodeId, ReplicaId

MODEL = ModelId("tiny")


def replica_view(name: str = "a", **changes: Any) -> ReplicaView:
    values: dict[str, Any] = {
        "replica_id": ReplicaId(f"{name}/tiny"),
        "node_id": NodeId(name),
        "model_id": MODEL,
        "ready": True,
        "slot_count": 4,
        "in_flight_count": 0,
        "node_paused": False,
        "node_suspect": False,
        "link_up": True,
        "endpoints": (Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS),
    }
    return ReplicaView(**(values | changes))


def roster_of(replicas: Iterable[ReplicaView]) -> Roster:
    """Those replicas, each on its node."""
    nodes: dict[NodeId, list[ReplicaView]] = {}
    for replica in replicas:
        nodes.setdefault(replica.node_id, []).append(replica)
    roster = Roster()
    for node_id, views in nodes.items():
        roster.enter(node_id, views)
    return roster


def catalogue_entry(model_id: str = "tiny", **changes: Any) -> CatalogueEntry:
    values: dict[str, Any] = {
        "model_id": ModelId(model_id),
        "file": ModelFile(ModelId(model_id), "path:/models", f"{model_id}.gguf", "0" * 64, 1000),
        "engine_kinds": ("scripted",),
        "context_length_tokens": 2048,
        "slot_count": 4,
        "prompt_price_micro_credits": 1,
        "completion_price_micro_credits": 4,
        "licence": "Apache-2.0",
        "endpoints": (Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS),
        "created_at_unix_seconds": 1_700_000_000,
    }
    return CatalogueEntry(**(values | changes))
