"""What runs where: from deployments, catalogue and nodes to each node's desired engines.

Decides by rendezvous hashing, so that a node coming or going moves as few replicas as possible and a restarted directory reaches the same
plan without remembering the last one. It must not know whether the nodes have got there yet.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from potluck_protocol.values import DesiredEngine, ModelId, NodeId, ReplicaId

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from potluck_coordinator.domain.catalogue import CatalogueEntry, Deployment


def plan(
    deployments: Iterable[Deployment], catalogue: Mapping[ModelId, CatalogueEntry], nodes: Collection[NodeId]
) -> dict[NodeId, tuple[DesiredEngine, ...]]:
    """Every node's desired engines, in the order of the model ids; a deployment of an unknown model is left out."""
    desired: dict[NodeId, list[DesiredEngine]] = {node_id: [] for node_id in nodes}
    for deployment in sorted(deployments, key=lambda wish: wish.model_id):
        entry = catalogue.get(deployment.model_id)
        if entry is None:
            continue
        for node_id in _chosen_nodes(deployment, nodes):
            desired[node_id].append(
                DesiredEngine(
                    replica_id=replica_id_of(node_id, entry.model_id),
                    model=entry.file,
                    engine_kind=entry.engine_kind,
                    slot_count=entry.slot_count,
                    context_length_tokens=entry.context_length_tokens,
                )
            )
    return {node_id: tuple(engines) for node_id, engines in desired.items()}


def replica_id_of(node_id: NodeId, model_id: ModelId) -> ReplicaId:
    """The same replica keeps its id over restarts of either side."""
    return ReplicaId(f"{node_id}/{model_id}")


def _chosen_nodes(deployment: Deployment, nodes: Collection[NodeId]) -> list[NodeId]:
    ranked = sorted(nodes, key=lambda node_id: hashlib.sha256(f"{deployment.model_id}\0{node_id}".encode()).digest())
    return ranked if deployment.replica_count is None else ranked[: deployment.replica_count]
