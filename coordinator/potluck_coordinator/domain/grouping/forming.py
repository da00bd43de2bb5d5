"""Which nodes form a group, in which order, and how many layers each of them gets.

Decides for the fewest stages that hold the model, and among equally many for the least time of one token: the weights each stage reads, and
the round trips between stages. Layers are shared out by the fit's own function; which nodes, and in which order, is looked for more simply
than by `potluck fit --box`, which looks at one group's shapes and their rates: that may call one tight that is formed here. Every node that
is left out gets its reason. The same nodes in any order give the same group. It must not know whether a group of the kind exists already.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.fit.engines import CUDA_CONTEXT_BYTES
from potluck_coordinator.domain.fit.flags import stage_facts
from potluck_coordinator.domain.fit.interconnect import group_link
from potluck_coordinator.domain.fit.layers import share_layers
from potluck_coordinator.domain.fit.shapes import Stage as FitStage
from potluck_coordinator.domain.grouping.membership import link_refusal, measured_link, node_refusal, trust_refusal
from potluck_coordinator.domain.grouping.words import Formation, Stage
from potluck_coordinator.domain.planning.node_kinds import Room, hardware_of
from potluck_protocol.card_facts import NOTHING_KNOWN

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from potluck_coordinator.domain.grouping.words import GroupNeed, NodeRoom
    from potluck_coordinator.domain.node_view import NodeView
    from potluck_protocol.card_facts import CardFacts
    from potluck_protocol.values import NodeId

STAGES_MAX: Final = 8
CANDIDATES_MAX: Final = 12
"""Of one site and number of cards, the largest ones: with them, at most 4,017 sets of two to eight nodes are looked at."""
GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A node that could be a stage of `card_count` cards (0: none, the machine itself)."""

    view: NodeView
    room: NodeRoom
    card_count: int
    stage_bytes: int
    """What is left for weights and cache."""

    @property
    def node_id(self) -> NodeId:
        return self.view.node_id

    @property
    def card_uuids(self) -> tuple[str, ...]:
        return self.room.card_uuids[: self.card_count]

    @property
    def stage_bytes_per_second(self) -> float:
        return self.room.weight_bytes_per_second * max(1, self.card_count)


def form(
    need: GroupNeed,
    views: Mapping[NodeId, NodeView],
    rooms: Mapping[NodeId, NodeRoom],
    doubts: Mapping[NodeId, str] = MappingProxyType({}),
) -> Formation:
    """The best group for the need out of these nodes; those without a room have nothing to give, and those in doubt are not taken yet."""
    rejections = {
        node_id: reason
        for node_id, view in sorted(views.items())
        if (reason := _own_refusal(need, view, rooms.get(node_id), doubts.get(node_id, "")))
    }
    able = [view for node_id, view in sorted(views.items()) if node_id not in rejections]
    classes = [(candidates, _pairs(candidates)) for candidates in _classes(need, able, rooms)]
    for stage_count in range(2, STAGES_MAX + 1):
        found = [
            (seconds, tuple(candidate.node_id for candidate in order), order, layer_counts)
            for candidates, pairs in classes
            for chosen in _cliques(candidates, stage_count, pairs, _needed_bytes(need, candidates))
            if (fitting := _best_order(need, chosen)) is not None
            for seconds, order, layer_counts in (fitting,)
        ]
        if found:
            _, _, order, layer_counts = min(found, key=lambda option: option[:2])
            return Formation(_stages(need, order, layer_counts), "", rejections | _left_out(able, [candidate.view for candidate in order]))
    reason, paired = _shortage(need, able, classes), _paired(able)
    lonely = {
        view.node_id: reason if view.node_id in paired else _lonely_words(view, able, near)
        for near in by_site(able).values()
        for view in near
    }
    return Formation((), reason, rejections | lonely)


def possible_members(need: GroupNeed, views: Mapping[NodeId, NodeView], rooms: Mapping[NodeId, NodeRoom]) -> list[NodeView]:
    """The nodes that could be stages as far as each of them goes, of sites where all of these together hold the model."""
    able = [view for node_id, view in sorted(views.items()) if not _own_refusal(need, view, rooms.get(node_id))]
    enough = [ones for ones in _classes(need, able, rooms) if sum(one.stage_bytes for one in ones) >= _needed_bytes(need, ones)]
    members = {one.node_id for ones in enough for one in ones}
    return [view for view in able if view.node_id in members]


def layers_by_stage(layer_count: int, layer_counts_max: Sequence[int], speeds: Sequence[float]) -> tuple[int, ...] | None:
    """Spreads layers as the fit does, with at least one layer each; None where they do not fit."""
    if min(layer_counts_max) < 1 or not len(layer_counts_max) <= layer_count <= sum(layer_counts_max):
        return None
    return share_layers(layer_count, speeds, layer_counts_max)


def _own_refusal(need: GroupNeed, view: NodeView, room: NodeRoom | None, doubt: str = "") -> str:
    if refusal := node_refusal(view, need.engine_kind) or doubt:
        return refusal
    if room is None:
        return "nothing of it is free"
    stage_bytes = max((_stage_bytes(need, room, count) for count in _card_counts(need, room)), default=0)
    if stage_bytes < need.layer_bytes + need.layer_kv_bytes:
        return (
            f"what is free there ({_gib(room.memory_bytes)}) does not hold one layer ({_gib(need.layer_bytes + need.layer_kv_bytes)}) "
            f"beside what an engine takes ({_gib(need.stage_overhead_bytes)})"
        )
    return ""


def _card_counts(need: GroupNeed, room: NodeRoom) -> tuple[int, ...]:
    return tuple(size for size in need.tensor_parallel_sizes if size <= len(room.card_uuids)) if room.card_uuids else (0,)


def _stage_bytes(need: GroupNeed, room: NodeRoom, card_count: int) -> int:
    return max(1, card_count) * max(0, room.memory_bytes - need.stage_overhead_bytes)


def _classes(need: GroupNeed, able: Sequence[NodeView], rooms: Mapping[NodeId, NodeRoom]) -> Iterator[list[_Candidate]]:
    """Those that could be stages of one group as far as hardware goes: the same site, and the same number of cards."""
    for _, views in sorted(by_site(able).items()):
        for card_count in sorted({count for view in views for count in _card_counts(need, rooms[view.node_id])}):
            candidates = [
                _Candidate(view, rooms[view.node_id], card_count, _stage_bytes(need, rooms[view.node_id], card_count))
                for view in views
                if card_count in _card_counts(need, rooms[view.node_id])
            ]
            candidates.sort(key=lambda candidate: (-candidate.stage_bytes, -candidate.stage_bytes_per_second, candidate.node_id))
            yield candidates[:CANDIDATES_MAX]


def by_site(able: Iterable[NodeView]) -> dict[str, list[NodeView]]:
    """Nodes that offer themselves to groups, by their owners' word for the place: those of two sites are never together."""
    sites: dict[str, list[NodeView]] = {}
    for view in able:
        if view.inventory.group_offer is not None:
            sites.setdefault(view.inventory.group_offer.site, []).append(view)
    return sites


def _pairs(candidates: Sequence[_Candidate]) -> set[frozenset[NodeId]]:
    """Those of one class that may be together."""
    return {
        frozenset((first.node_id, second.node_id)) for first, second in combinations(candidates, 2) if not _refusal(first.view, second.view)
    }


def _paired(able: Sequence[NodeView]) -> set[NodeId]:
    """The nodes that may be together with one other at least. Only who was measured is asked: a whole pool may name one site."""
    views = {view.node_id: view for view in able}
    paired: set[NodeId] = set()
    for view in able:
        for other in (views[node_id] for node_id in view.peer_measurements if node_id in views):
            both = {view.node_id, other.node_id}
            if other is not view and not paired.issuperset(both) and not _refusal(view, other):
                paired |= both
    return paired


def _cliques(
    candidates: Sequence[_Candidate],
    stage_count: int,
    pairs: Collection[frozenset[NodeId]],
    needed_bytes: int,
    chosen: tuple[_Candidate, ...] = (),
) -> Iterator[tuple[_Candidate, ...]]:
    """Every set with so many more of which all may be with all, and which has the memory. The largest candidates come first."""
    if stage_count == 0:
        yield chosen
        return
    for place, candidate in enumerate(candidates):
        if stage_count * candidate.stage_bytes < needed_bytes:
            return
        if all(frozenset((candidate.node_id, member.node_id)) in pairs for member in chosen):
            left_bytes = needed_bytes - candidate.stage_bytes
            yield from _cliques(candidates[place + 1 :], stage_count - 1, pairs, left_bytes, (*chosen, candidate))


def _best_order(need: GroupNeed, chosen: Sequence[_Candidate]) -> tuple[float, tuple[_Candidate, ...], tuple[int, ...]] | None:
    """Seconds a token, the order and its layers; the best connected node leads unless only another order fits."""
    layer_cost_bytes = need.layer_bytes + need.layer_kv_bytes
    for leader in sorted(chosen, key=lambda candidate: (*_connection(candidate, chosen), candidate.node_id)):
        order = _chain(leader, chosen)
        layer_counts_max = [
            (candidate.stage_bytes - _end_memory_bytes(need, candidate, rank, len(order))) // layer_cost_bytes
            for rank, candidate in enumerate(order)
        ]
        layer_counts = layers_by_stage(need.layer_count, layer_counts_max, [candidate.stage_bytes_per_second for candidate in order])
        if layer_counts is not None:
            return _token_seconds(need, order, layer_counts), order, layer_counts
    return None


def _connection(candidate: _Candidate, chosen: Sequence[_Candidate]) -> tuple[int, int]:
    """The sum of its round trips to the others, then its narrowest line, as a number to be small."""
    links = [link for other in chosen if other is not candidate and (link := measured_link(candidate.view, other.view)) is not None]
    return sum(link.round_trip_microseconds for link in links), -min((link.bandwidth_bytes_per_second for link in links), default=0)


def _chain(leader: _Candidate, chosen: Sequence[_Candidate]) -> tuple[_Candidate, ...]:
    """From the leader on, always the nearest of those that are left."""
    order = [leader]
    left = [candidate for candidate in chosen if candidate is not leader]
    while left:
        here = order[-1]
        nearest = min(left, key=lambda candidate: (_round_trip_microseconds(here, candidate), candidate.node_id))
        left.remove(nearest)
        order.append(nearest)
    return tuple(order)


def _round_trip_microseconds(first: _Candidate, second: _Candidate) -> int:
    link = measured_link(first.view, second.view)
    return 0 if link is None else link.round_trip_microseconds


def _token_seconds(need: GroupNeed, order: Sequence[_Candidate], layer_counts: Sequence[int]) -> float:
    reading = sum(
        (count * need.layer_bytes + _end_bytes(need, rank, len(order))) / candidate.stage_bytes_per_second
        for rank, (candidate, count) in enumerate(zip(order, layer_counts, strict=True))
    )
    # The last stage's token goes back to the leader, so that the order is a ring.
    crossing = sum(_round_trip_microseconds(first, second) for first, second in pairwise((*order, order[0]))) / 2e6
    return reading + crossing


def _end_bytes(need: GroupNeed, rank: int, stage_count: int) -> int:
    return (need.first_stage_bytes if rank == 0 else 0) + (need.last_stage_bytes if rank == stage_count - 1 else 0)


def _end_memory_bytes(need: GroupNeed, candidate: _Candidate, rank: int, stage_count: int) -> int:
    copies = 0 if candidate.card_count else (rank == 0) + (rank == stage_count - 1)
    return _end_bytes(need, rank, stage_count) + copies * need.table_copy_bytes


def _stages(need: GroupNeed, order: Sequence[_Candidate], layer_counts: Sequence[int]) -> tuple[Stage, ...]:
    stages = []
    facts = _card_facts(order)
    for rank, (candidate, count) in enumerate(zip(order, layer_counts, strict=True)):
        offer = candidate.view.inventory.group_offer
        assert offer is not None
        stages.append(
            Stage(
                node_id=candidate.node_id,
                owner_account_id=candidate.view.owner_account_id,
                address=offer.address,
                port=offer.port,
                layer_count=count,
                weight_bytes=count * need.layer_bytes + _end_bytes(need, rank, len(order)),
                kv_cache_bytes=count * need.layer_kv_bytes,
                memory_bytes=candidate.room.memory_bytes,
                card_uuids=candidate.card_uuids,
                card_facts=facts[rank],
                site=offer.site,
            )
        )
    return tuple(stages)


def _card_facts(order: Sequence[_Candidate]) -> tuple[CardFacts, ...]:
    """What each stage is told of its cards; nothing where there are none, or their nodes do not say what they are."""
    boxes = [hardware_of(each.view, Room(frozenset(each.card_uuids), 0), on_cards=True)[0] for each in order]
    if not all(box.cards for box in boxes):
        return (NOTHING_KNOWN,) * len(order)
    places = [tuple(range(len(box.cards))) for box in boxes]
    stages = [FitStage(0, indices, box.cards, group_link(box, indices)) for box, indices in zip(boxes, places, strict=True)]
    return stage_facts(stages, [max(0, min(card.usable_bytes for card in box.cards) - CUDA_CONTEXT_BYTES) for box in boxes])


def _left_out(able: Sequence[NodeView], chosen: Sequence[NodeView]) -> dict[NodeId, str]:
    members = {view.node_id for view in chosen}
    return {
        view.node_id: next(
            (refusal for other in chosen if (refusal := _refusal(view, other))),
            "it is not needed: the nodes chosen hold the model in as few stages and answer sooner",
        )
        for view in able
        if view.node_id not in members
    }


def _refusal(view: NodeView, other: NodeView) -> str:
    """Why the two cannot be together, in words about `view`; empty if they can."""
    return trust_refusal(view, other) or link_refusal(view, other)


def _lonely_words(view: NodeView, able: Sequence[NodeView], near: Sequence[NodeView]) -> str:
    """Of a node that may be together with none of the others, those of its site and itself being `near`."""
    # Those of its own site say more than the many of others.
    others = (other for views in (near, able) for other in views if other is not view)
    return next((_refusal(view, other) for other in others), "no other node of its site may be in a group with it")


def _shortage(need: GroupNeed, able: Sequence[NodeView], classes: Sequence[tuple[list[_Candidate], set[frozenset[NodeId]]]]) -> str:
    if len(able) < 2:
        return f"a group needs two nodes at least, and {len(able)} of the pool's could be in one"
    most_bytes, needed_bytes = 0, 0
    for candidates, pairs in classes:
        # Largest first and greedily: a figure for people, not for a decision.
        together: list[_Candidate] = []
        for candidate in candidates:
            if len(together) < STAGES_MAX and all(frozenset((candidate.node_id, member.node_id)) in pairs for member in together):
                together.append(candidate)
        if len(together) > 1 and (class_bytes := sum(candidate.stage_bytes for candidate in together)) > most_bytes:
            most_bytes, needed_bytes = class_bytes, _needed_bytes(need, together)
    if most_bytes == 0:
        return "no two of the nodes that could be in a group may be in one together"
    return (
        f"the nodes that may be together have {_gib(most_bytes)} for weights and cache, "
        f"and {need.model.model_id} needs {_gib(needed_bytes)}, in whole layers"
    )


def _needed_bytes(need: GroupNeed, candidates: Sequence[_Candidate]) -> int:
    """Of stages on such nodes, all of them with as many cards."""
    copies_bytes = 0 if any(candidate.card_count for candidate in candidates) else 2 * need.table_copy_bytes
    return need.layer_count * (need.layer_bytes + need.layer_kv_bytes) + need.first_stage_bytes + need.last_stage_bytes + copies_bytes


def _gib(count_bytes: int) -> str:
    return f"{count_bytes / GIB:.2f} GiB"
