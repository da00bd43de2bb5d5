"""Nodes, models and views for planning, with the fields that a test does not care about filled in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from potluck_coordinator.domain.catalogue import CatalogueEntry, Deployment, ServiceTier
from potluck_coordinator.domain.fit.architecture import ModelArchitecture, Quantization
from potluck_coordinator.domain.node_view import NodeView
from potluck_coordinator.domain.planning.sizing import Sizer
from potluck_coordinator.domain.planning.words import PlanningView
from potluck_protocol.values import (
    Accelerator,
    AccountId,
    EngineState,
    EngineStatus,
    Inventory,
    ModelFile,
    ModelId,
    NodeId,
    NodeState,
    ReplicaId,
)
from tests.support.replicas import catalogue_entry

GIB = 1 << 30
AWQ = Quantization("awq", 4.156)


def llama(model_id: str, layers: int, hidden: int, heads: int, intermediate: int) -> ModelArchitecture:
    """A model of Llama 3's family, 4 bits a weight."""
    return ModelArchitecture(model_id, layers, hidden, heads, 8, 128, intermediate, 128_256, 8192, quantization=AWQ)


ARCHITECTURES = {
    "8b": llama("8b", 32, 4096, 32, 14_336),
    "32b": llama("32b", 64, 5120, 40, 27_648),
    "70b": llama("70b", 80, 8192, 64, 28_672),
}
FILE_BYTES = {size: int(architecture.weight_bytes) for size, architecture in ARCHITECTURES.items()}


def card_entry(size: str, model_id: str = "", **changes: Any) -> CatalogueEntry:
    """A model of that size for vLLM on cards."""
    model_id = model_id or size
    values: dict[str, Any] = {
        "file": ModelFile(ModelId(model_id), f"hf:org/{model_id}@{'a' * 40}", "model.safetensors", "0" * 64, FILE_BYTES[size]),
        "engine_kinds": ("vllm",),
        "context_length_tokens": 4096,
        "slot_count": 8,
        "architecture": replace(ARCHITECTURES[size], model_id=model_id),
        "quantization": "awq",
    }
    return catalogue_entry(model_id, **(values | changes))


def machine_entry(model_id: str, size_bytes: int = 100_000_000, **changes: Any) -> CatalogueEntry:
    """A model for llama.cpp without an architecture, judged by its file's size."""
    file = ModelFile(ModelId(model_id), f"hf:org/{model_id}@{'a' * 40}", f"{model_id}.gguf", "0" * 64, size_bytes)
    return catalogue_entry(model_id, file=file, engine_kinds=("llamacpp",), **changes)


def cards(count: int, name: str = "NVIDIA GeForce RTX 3090", memory_bytes: int = 24 * GIB, node: str = "n") -> tuple[Accelerator, ...]:
    """So many cards, the first with the second and so on joined by NVLink."""
    uuids = [f"GPU-{node}-{number}" for number in range(count)]
    pairs = {uuid: uuids[number ^ 1] for number, uuid in enumerate(uuids) if number ^ 1 < count}
    return tuple(Accelerator(name, uuid, memory_bytes, "8.6", nvlink_peer_uuids=(pairs[uuid],) if uuid in pairs else ()) for uuid in uuids)


def node(name: str, **changes: Any) -> NodeView:
    """A connected node; `cards`, `memory_gib`, `kinds` and `owner` for short."""
    card_count = changes.pop("cards", 0)
    accelerators = cards(card_count, node=name) if isinstance(card_count, int) else card_count
    inventory = Inventory(
        operating_system="Linux",
        cpu_count=changes.pop("cpu_count", 8),
        memory_bytes=int(changes.pop("memory_gib", 32) * GIB),
        accelerators=accelerators,
        memory_budget_bytes=int(changes.pop("budget_gib", 0) * GIB),
        engine_kinds=changes.pop("kinds", ("llamacpp", "vllm")),
        attached_model_names=changes.pop("attached", ()),
    )
    values: dict[str, Any] = {
        "node_id": NodeId(name),
        "owner_account_id": AccountId(changes.pop("owner", "ann")),
        "inventory": inventory,
        "connected": True,
        "state": NodeState.SERVING,
        "engines": (),
        "peer_measurements": {},
    }
    return NodeView(**(values | changes))


def status(replica_id: str, model_id: str, state: EngineState = EngineState.READY, **changes: Any) -> EngineStatus:
    return EngineStatus(ReplicaId(replica_id), ModelId(model_id), state, "vllm", slot_count=4, **changes)


def wish(model_id: str, count: int | None = 1, tier: ServiceTier = ServiceTier.DEFAULT) -> Deployment:
    return Deployment(ModelId(model_id), count, tier)


def view(
    nodes: list[NodeView], entries: list[CatalogueEntry], deployments: list[Deployment], now: float = 1000.0, **changes: Any
) -> PlanningView:
    values: dict[str, Any] = {
        "now_seconds": now,
        "deployments": tuple(deployments),
        "catalogue": {entry.model_id: entry for entry in entries},
        "nodes": {each.node_id: each for each in nodes},
        "sizer": Sizer(),
        "standing": {},
        "absent_since": {each.node_id: now for each in nodes if not each.connected or each.state is not NodeState.SERVING},
    }
    return PlanningView(**(values | changes))
