"""The machines of `planning_churn`: random ones, how they obey, what they say of themselves, and whether all fits that is wished of them.

Decides what an agent and its engines would do and say. It must not know what is planned, nor why.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.node_view import NodeView
from potluck_coordinator.domain.planning.node_kinds import whole_room
from potluck_protocol.values import (
    DesiredEngine,
    EngineState,
    EngineStatus,
    GroupOffer,
    ModelId,
    NodeId,
    NodeState,
    PeerMeasurement,
    ReplicaId,
)
from tests.support.planning import cards, node

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable

GIB = 1 << 30
STOPPING_BEATS: Final = 3
"""How long an engine takes to end."""
LIFELESS: Final = frozenset({EngineState.REFUSED, EngineState.BACKING_OFF})
NEXT_STATE: Final = {EngineState.FETCHING: EngineState.STARTING, EngineState.STARTING: EngineState.READY}
LAYERS_SHARE: Final = 0.85
"""Of a large model's files, at the least."""
FOREIGN_BYTES: Final = (0, GIB // 2, 2 * GIB, 6 * GIB, 12 * GIB)
CARDS: Final = (
    ("NVIDIA GeForce RTX 3090", 24, (1, 1, 1, 2)),
    ("NVIDIA GeForce RTX 3090", 24, (1, 1, 1, 2)),
    ("NVIDIA RTX A6000", 48, (1,)),
    ("NVIDIA GeForce RTX 3060", 12, (1, 1, 4)),
)
"""Name, GiB and numbers of cards; no box has more than 48 GiB."""


class BrokenRuleError(AssertionError):
    """A plan did what no plan may do."""


@dataclass
class Engine:
    """One engine and how far it is."""

    wish: DesiredEngine
    state: EngineState
    beats: int = 0
    """Since it began to stop."""


@dataclass
class Box:
    """One machine and what runs there."""

    view: NodeView
    cache_share: float
    """Of what a cache holds by plain arithmetic, this machine's engines have so much."""
    engines: dict[ReplicaId, Engine] = field(default_factory=dict)
    refused: set[ModelId] = field(default_factory=set)
    """Models that its owner does not allow, which the pool learns when it asks."""
    spoiled: set[str] = field(default_factory=set)
    """Cards, and the machine itself by its name, on which every whole engine fails."""

    @property
    def is_present(self) -> bool:
        return self.view.connected and self.view.state is NodeState.SERVING

    def is_ready(self, replica_id: ReplicaId) -> bool:
        return replica_id in self.engines and self.engines[replica_id].state is EngineState.READY

    def obey(self, desired: tuple[DesiredEngine, ...]) -> None:
        """One beat of the agent's life: what is wished comes one step nearer, what is not goes."""
        wished = {engine.replica_id: engine for engine in desired}
        for replica_id, engine in list(self.engines.items()):
            if engine.state is EngineState.STOPPING:
                engine.beats += 1
            elif wished.get(replica_id) != engine.wish:
                engine.state = EngineState.STOPPING if engine.state not in LIFELESS else engine.state
                engine.beats = 0 if engine.state is EngineState.STOPPING else STOPPING_BEATS
            elif engine.state in NEXT_STATE:
                engine.state = NEXT_STATE[engine.state]
            if engine.beats >= STOPPING_BEATS:
                del self.engines[replica_id]
        for replica_id, wish in wished.items():
            if replica_id not in self.engines:
                is_refused = wish.model.model_id in self.refused and wish.group is None
                self.engines[replica_id] = Engine(wish, EngineState.REFUSED if is_refused else EngineState.FETCHING)
        for engine in self.engines.values():
            is_spoiled = bool(self.spoiled.intersection(engine.wish.shape.card_uuids or (self.view.node_id,)))
            if is_spoiled and engine.wish.group is None and engine.state in {EngineState.STARTING, EngineState.READY}:
                engine.state = EngineState.BACKING_OFF

    def measure(self, peers: Iterable[NodeId]) -> None:
        """Links to others are good."""
        found = {peer: PeerMeasurement(peer, 200, 10**9) for peer in peers}
        self.view = replace(self.view, peer_measurements={**self.view.peer_measurements, **found})

    def told(self) -> NodeView:
        """What the directory sees of it."""
        return replace(self.view, engines=tuple(self._status(engine) for engine in self.engines.values()) if self.view.connected else ())

    def _status(self, engine: Engine) -> EngineStatus:
        wish, place = engine.wish, engine.wish.group
        said = EngineStatus(
            wish.replica_id,
            wish.model.model_id,
            engine.state,
            wish.engine_kind,
            slot_count=wish.slot_count,
            context_length_tokens=wish.context_length_tokens,
            failure="not allowed here" if engine.state in LIFELESS else "",
            engine_version="1.0",
            group_id=place.group_id if place is not None else "",
            group_rank=place.rank if place is not None else 0,
            group_generation=place.generation if place is not None else 0,
        )
        if engine.state is not EngineState.READY or not wish.shape.card_uuids or place is not None:
            return said
        card_bytes = {card.uuid: card.memory_bytes for card in self.view.inventory.accelerators}
        left_bytes = sum(card_bytes[uuid] for uuid in wish.shape.card_uuids) * 0.88 - wish.model.total_bytes
        return replace(said, kv_capacity_tokens=int(self.cache_share * max(0.0, left_bytes) / 160_000))

    def check(self, desired: Iterable[DesiredEngine]) -> None:
        """That all fits together that is wished, or still runs."""
        wished = {engine.replica_id: engine for engine in desired}
        running = {replica_id: engine.wish for replica_id, engine in self.engines.items() if engine.state not in LIFELESS}
        engines = {**running, **wished}
        inventory, name = self.view.inventory, self.view.node_id
        taken = [uuid for engine in engines.values() for uuid in engine.shape.card_uuids]
        card_bytes = {card.uuid: card.memory_bytes for card in inventory.accelerators}
        machine_bytes = sum(engine.shape.memory_bytes for engine in engines.values() if not engine.shape.card_uuids)
        if len(taken) != len(set(taken)) or not set(taken) <= card_bytes.keys():
            raise BrokenRuleError(f"{name}: cards {taken} of {sorted(card_bytes)} for {sorted(engines)}")
        if machine_bytes > whole_room(inventory).memory_bytes:
            raise BrokenRuleError(f"{name}: {machine_bytes} bytes of {whole_room(inventory).memory_bytes} for {sorted(engines)}")
        if len([engine for engine in engines.values() if engine.group is not None]) > 1:
            raise BrokenRuleError(f"{name}: two stages on one port: {sorted(engines)}")
        for engine in engines.values():
            uuids = engine.shape.card_uuids
            room_bytes = sum(card_bytes[uuid] for uuid in uuids) if uuids else engine.shape.memory_bytes
            if _file_bytes(engine) > room_bytes or engine.slot_count < 1:
                raise BrokenRuleError(f"{name}: {engine.replica_id} has {_file_bytes(engine)} bytes of files for {room_bytes}")

    def check_new(self, engine: DesiredEngine) -> None:
        """That what is newly wished fits beside what others hold of its cards now."""
        free = {card.uuid: card.memory_bytes - self.view.card_foreign_bytes.get(card.uuid, 0) for card in self.view.inventory.accelerators}
        uuids = engine.shape.card_uuids
        if uuids and _file_bytes(engine) > sum(free[uuid] for uuid in uuids):
            raise BrokenRuleError(f"{self.view.node_id}: {engine.replica_id} does not fit beside {self.view.card_foreign_bytes}")


def _file_bytes(engine: DesiredEngine) -> float:
    """Of a stage, its layers."""
    if engine.group is None:
        return float(engine.model.total_bytes)
    share = engine.group.layer_counts[engine.group.rank] / sum(engine.group.layer_counts)
    return LAYERS_SHARE * share * engine.model.total_bytes


def random_box(draw: random.Random, number: int) -> Box:
    """Some machine; most of those with cards offer themselves to groups of one site."""
    name, cache_share = f"node{number}", draw.uniform(0.6, 1.3)
    if draw.random() < 0.3:
        memory_gib, cpu_count = draw.choice((2, 4, 8, 16, 32)), draw.choice((2, 4, 8, 16))
        return Box(node(name, memory_gib=memory_gib, cpu_count=cpu_count, kinds=("llamacpp",)), cache_share)
    card, gib, counts = draw.choice(CARDS)
    view = node(name, cards=cards(draw.choice(counts), card, gib * GIB, node=name), memory_gib=64, cpu_count=draw.choice((8, 16, 32)))
    if draw.random() < 0.8:
        offer = GroupOffer("attic", f"10.0.{number // 250}.{1 + number % 250}", 29_600)
        view = replace(view, inventory=replace(view.inventory, group_offer=offer))
    return Box(view, cache_share)
