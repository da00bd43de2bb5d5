"""Builders of nodes that offer themselves to shard groups, with the fields a test does not care about filled in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from potluck_coordinator.domain.grouping.words import GroupNeed, NodeRoom, ShardGroup
from potluck_coordinator.domain.node_view import NodeView
from potluck_protocol.values import (
    AccountId,
    EngineState,
    EngineStatus,
    GroupOffer,
    Inventory,
    ModelFile,
    ModelId,
    NodeId,
    NodeState,
    PeerMeasurement,
    ReplicaId,
)

GROUP = ReplicaId("group/big/0")
GOOD_LINK = PeerMeasurement(NodeId(""), round_trip_microseconds=200, bandwidth_bytes_per_second=1_000_000_000)


def node(number: int, owner: str = "ann", trusts: tuple[str, ...] = (), **changes: Any) -> NodeView:
    """A node that may be in groups; `offer` changes its offer, None takes it away."""
    offer_changes = changes.pop("offer", {})
    offer = GroupOffer("lab", f"10.0.0.{number}", 29600, tuple(AccountId(name) for name in trusts))
    values: dict[str, Any] = {
        "node_id": NodeId(f"n{number}"),
        "owner_account_id": AccountId(owner),
        "inventory": Inventory(engine_kinds=("vllm",), group_offer=None if offer_changes is None else replace(offer, **offer_changes)),
        "connected": True,
        "state": NodeState.SERVING,
        "engines": (),
        "peer_measurements": {},
        "epoch": 1,
    }
    return NodeView(**(values | changes))


def measured(*nodes: NodeView, **changes: Any) -> dict[NodeId, NodeView]:
    """The nodes, each with a good link to every other one, or one that `changes` says."""
    link = replace(GOOD_LINK, **changes)
    return {
        view.node_id: replace(
            view, peer_measurements={other.node_id: replace(link, node_id=other.node_id) for other in nodes if other is not view}
        )
        for view in nodes
    }


def with_link(views: dict[NodeId, NodeView], first: str, second: str, link: PeerMeasurement | None) -> dict[NodeId, NodeView]:
    """The same nodes, but for what these two measured."""

    def changed(view: NodeView, other: str) -> NodeView:
        kept = {node_id: known for node_id, known in view.peer_measurements.items() if node_id != other}
        return replace(view, peer_measurements=kept if link is None else {**kept, NodeId(other): link})

    return {
        **views,
        NodeId(first): changed(views[NodeId(first)], second),
        NodeId(second): changed(views[NodeId(second)], first),
    }


def need(**changes: Any) -> GroupNeed:
    """Ten layers of 10 bytes and 1 of cache, 5 for each end, 20 beside them on every stage."""
    values: dict[str, Any] = {
        "replica_id": GROUP,
        "model": ModelFile(ModelId("big"), "path:/models", "big.safetensors", "0" * 64, 110),
        "engine_kind": "vllm",
        "slot_count": 4,
        "context_length_tokens": 2048,
        "layer_count": 10,
        "layer_bytes": 10,
        "first_stage_bytes": 5,
        "last_stage_bytes": 5,
        "layer_kv_bytes": 1,
        "stage_overhead_bytes": 20,
    }
    return GroupNeed(**(values | changes))


def rooms(views: dict[NodeId, NodeView], memory_bytes: int = 90, **by_node: NodeRoom) -> dict[NodeId, NodeRoom]:
    """The same room on every node that is not named."""
    return {node_id: by_node.get(node_id, NodeRoom(memory_bytes)) for node_id in views}


def stage_status(group: ShardGroup, rank: int, state: EngineState = EngineState.READY, **changes: Any) -> EngineStatus:
    """What a member reports of its stage."""
    status = EngineStatus(
        group.replica_id,
        ModelId("big"),
        state,
        "vllm",
        group_id=group.replica_id,
        group_rank=rank,
        group_generation=group.generation,
    )
    return replace(status, **changes)


def reporting(
    views: dict[NodeId, NodeView], group: ShardGroup, state: EngineState = EngineState.READY, **by_node: EngineState | None
) -> dict[NodeId, NodeView]:
    """The nodes with their stages as they report them; a node whose state is None reports nothing of its stage."""
    changed = dict(views)
    for rank, stage in enumerate(group.stages):
        told = by_node.get(stage.node_id, state)
        view = views[stage.node_id]
        changed[stage.node_id] = replace(view, engines=() if told is None else (stage_status(group, rank, told),))
    return changed
