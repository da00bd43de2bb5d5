"""What every gateway knows of the pool by the directory's word, and how the next word differs from it.

Decides that only what has changed is told: what is desired of thousands of nodes takes a gateway a tenth of a second to read, and changes
for one of them at a time. It must not know who tells, or what follows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_coordinator.domain.gateways import GatewayRecord
    from potluck_coordinator.domain.payees import PayeeShare
    from potluck_protocol.culprits import Fingerprint
    from potluck_protocol.values import AccountId, DesiredState, ModelId, NodeId, ReplicaId


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """What gateways follow of the directory; a higher version replaces a lower one."""

    version: int = 0
    models: Mapping[ModelId, CatalogueEntry] = field(default_factory=dict)
    desired: Mapping[NodeId, DesiredState] = field(default_factory=dict)
    outcasts: Mapping[NodeId, str] = field(default_factory=dict)
    """Nodes that are no longer welcome, and why, in the words of whoever took them out; "" where there were none."""
    key_generation: int = 0
    """Changes whenever a key is revoked: what the gateway remembered of keys is void."""
    replica_payees: Mapping[ReplicaId, tuple[PayeeShare, ...]] = field(default_factory=dict)
    """Who earns by the answers of a replica that several nodes make together; any other replica's node owner earns alone."""
    broken_groups: Mapping[ReplicaId, str] = field(default_factory=dict)
    """Replicas of several nodes of which one is lost, and why: answers of theirs that are under way end with these words."""
    leaving: frozenset[ReplicaId] = frozenset()
    """Replicas on their way out: they finish what they are answering, and get no new requests."""
    trusted_replicas: frozenset[ReplicaId] = frozenset()
    """Where requests may run that demand trusted nodes."""
    slow_replicas: Mapping[ReplicaId, float] = field(default_factory=dict)
    """Those that are far slower than they used to be, and how much of their speed is to be believed."""
    drained_replicas: Mapping[ReplicaId, str] = field(default_factory=dict)
    """Those of them that get no requests for a while, and why."""
    refused_requests: frozenset[Fingerprint] = frozenset()
    """Requests that are refused for good, for engines die of them."""
    losses_per_second: Mapping[NodeId, float] = field(default_factory=dict)
    """How often nodes go away at this hour of the week, by their own history (`domain.survival`)."""
    suspect_requests: Mapping[Fingerprint, AccountId] = field(default_factory=dict)
    """Requests that had one engine to themselves when it died, and whose it was."""
    flex_models: frozenset[ModelId] = frozenset()
    """Models that are deployed in the flex tier, and promise nothing."""
    gateways: Mapping[int, GatewayRecord] = field(default_factory=dict)
    """Those that others may count on, by epoch: their ports are open, and they were heard of lately."""

    def with_news(self, news: PoolNews) -> PoolSnapshot:
        """As it stands after them."""
        whole = replace(self, version=news.version, **news.changes)
        return replace(whole, desired={**whole.desired, **news.desired}) if news.desired else whole


@dataclass(frozen=True, slots=True)
class PoolNews:
    """How the snapshot of this version differs from one that a gateway has. Of the same version, not at all."""

    version: int
    changes: Mapping[str, Any]
    """Fields of the snapshot, by name, each as a whole."""
    desired: Mapping[NodeId, DesiredState]
    """Of those nodes alone of which something else is desired."""
