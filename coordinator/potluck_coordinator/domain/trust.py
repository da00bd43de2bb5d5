"""Which replicas a request may run on that demands trusted nodes.

Decides from the operator's word over nodes: nobody's own word counts, nor whose a node is. A replica over several nodes is trusted where
all of them are, for what is asked passes through each. That a request is kept from all others is `placement`'s. It must not know who asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from potluck_protocol.values import DesiredState, NodeId, ReplicaId

NOBODY_TRUSTED: Final = (
    "No trusted node serves the model right now, and the request demands one: it runs nowhere else. `potluck nodes` shows which are "
    "trusted; the operator trusts one by `potluck nodes trust NODE_ID`. Or send it without the demand (x-potluck-trust, trusted_only)."
)


def trusted_replicas(desired: Mapping[NodeId, DesiredState], trusted_nodes: frozenset[NodeId]) -> frozenset[ReplicaId]:
    """Those of which no node has a part that is not trusted.

    Args:
        desired: what is wished of every node.
        trusted_nodes: by the operator's word.
    """
    known = {engine.replica_id for node_id in desired.keys() & trusted_nodes for engine in desired[node_id].engines}
    doubtful = {engine.replica_id for node_id in desired.keys() - trusted_nodes for engine in desired[node_id].engines}
    return frozenset(known - doubtful)
