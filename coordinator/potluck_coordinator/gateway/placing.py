"""Where a request may run, asked of the nodes as they are now: `domain.placement` over what the `roster` draws, `quarantine` in mind.

Decides nothing of its own. It must not know queues, holds or answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from potluck_coordinator.domain.admission import Capacity
from potluck_coordinator.domain.placement import EXPLORE_SHARE, hurdle, place, reading_seconds, rejection, tokens_wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from potluck_coordinator.domain.forecast import Work
    from potluck_coordinator.domain.placement import Draw, Placement
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.links import Links
    from potluck_coordinator.gateway.quarantine import Quarantine
    from potluck_coordinator.gateway.roster import Kind
    from potluck_protocol.clock import Clock
    from potluck_protocol.values import ModelId, NodeId, ReplicaId

_NOBODY: frozenset[NodeId] = frozenset()
_COLD: Mapping[ReplicaId, float] = {}


class Placing:
    """The placement of one gateway's requests.

    Args:
        links: the nodes.
        quarantine: which requests are kept apart from which.
        clock: for how far what was dispatched has come.
        draw: a random number in [0, 1).
    """

    def __init__(self, links: Links, quarantine: Quarantine, clock: Clock, draw: Callable[[], float]) -> None:
        self._links = links
        self._quarantine = quarantine
        self._clock = clock
        self._draw = draw

    def place(
        self, request: InferenceRequest, excluded: frozenset[NodeId], work: Work, kept_for: InferenceRequest | None = None
    ) -> Placement:
        """A free replica for the request now, if there is one, and why each other one is none.

        Args:
            request: whose.
            excluded: nodes that it must not go to.
            work: what it is expected to be.
            kept_for: another request, which has all room wherever it may go.
        """
        now, curiosity = self._clock.monotonic_seconds(), self._draw()
        explores = curiosity < EXPLORE_SHARE
        # Of one replica alone it does not matter what it holds.
        has_choice = self._links.roster().replica_count(request.model_id) > 1
        warm = self._links.measures.warm(request, work) if has_choice else {}
        for shunned in self._quarantine.shunned(request, excluded):
            drawn = self._drawn(
                request, excluded | shunned, work, kept_for, warm={} if explores else warm, takes_any_slot=_takes_any_slot(request)
            )
            placement = place(drawn, work, self._draw(), now, curiosity=curiosity)
            if placement.chosen is not None:
                break
        return placement

    def slots(self, request: InferenceRequest, excluded: frozenset[NodeId]) -> tuple[int, int]:
        """The slots of replicas that can take the request, busy or not, and how many of them are free."""
        roster, tokens_min = self._links.roster(), self._tokens_wanted(request, excluded)
        usable = free = 0
        for kind in roster.kinds(request.model_id):
            if _may_go_to(kind, request, tokens_min):
                _, _, out_slots, out_free_slots = roster.count_on(kind, excluded)
                usable += kind.slot_count - out_slots
                free += kind.free_slot_count - out_free_slots
        return usable, free

    def reading_seconds(
        self, request: InferenceRequest, excluded: frozenset[NodeId], work: Work, kept_for: InferenceRequest | None = None
    ) -> float:
        """Until a replica that has a slot and room for the request has read what keeps others from it; infinite: none has them."""
        out, now = excluded | self._quarantine.shunned(request, excluded)[-1], self._clock.monotonic_seconds()
        return reading_seconds(self._drawn(request, out, work, kept_for, takes_any_slot=True), work, now)

    def lacks_cache(self, request: InferenceRequest, excluded: frozenset[NodeId]) -> bool:
        """Whether a slot is free for one that could not be placed, and no node barred to it that others like it may go to."""
        out, roster = excluded | self._quarantine.shunned(request, excluded)[-1], self._links.roster()
        is_barred = out and any(roster.count_on(kind, out)[0] for kind in roster.kinds(request.model_id))
        return not is_barred and self.slots(request, excluded)[1] > 0

    def capacity(self, model_id: ModelId) -> Capacity:
        """All that takes requests for the model, together, as far as this gateway's queue can count on it.

        What other gateways' nodes have free is taken all the same. But when they have nothing free, their own queues come first.
        """
        kinds = [kind for kind in self._links.roster().kinds(model_id) if hurdle(kind.sample) is None]
        return _together([kind for kind in kinds if not kind.sample.is_remote] or kinds)

    def within_reach(self, request: InferenceRequest, excluded: frozenset[NodeId], capacity: Capacity) -> Capacity:
        """No slots but those that can take the request, and where it demands trusted nodes no caches but theirs."""
        usable_count, free_count = self.slots(request, excluded)
        if usable_count < capacity.slot_count:
            capacity = capacity._replace(slot_count=usable_count, in_flight_count=usable_count - free_count)
        if not request.trusted_only:
            return capacity
        kinds = [kind for kind in self._links.roster().kinds(request.model_id) if hurdle(kind.sample) is None and kind.sample.is_trusted]
        trusted = _together(kinds)
        return capacity._replace(kv_tokens=trusted.kv_tokens, committed_tokens=trusted.committed_tokens)

    def knows_others(self, request: InferenceRequest, excluded: frozenset[NodeId]) -> bool:
        """Whether another node means to serve the model: one that is suspect, or not ready, may be well in a moment; a paused one not.

        Nor one that is not trusted, where the request demands that.
        """
        roster = self._links.roster()
        willing = (kind for kind in roster.kinds(request.model_id) if not (kind.sample.node_paused or kind.sample.leaving))
        permitted = (kind for kind in willing if kind.sample.is_trusted or not request.trusted_only)
        return any(len(kind) > roster.count_on(kind, excluded)[0] for kind in permitted)

    def withholds_slots(self, model_id: ModelId) -> bool:
        """Whether slots stay empty, since more answers at a time would be too slow."""
        return any(kind.withheld_slot_count for kind in self._links.roster().kinds(model_id))

    def has_free_slot(self, request: InferenceRequest, kept_for: InferenceRequest | None = None) -> bool:
        """Whether some request for its model could be placed now, and that if it is one whose client has a part of its answer already."""
        kinds, takes_any_slot, is_kept = self._links.roster().kinds(request.model_id), _takes_any_slot(request), self._kept_for(kept_for)
        return any((kind.free_count or (takes_any_slot and kind.reluctant_count)) and not is_kept(kind) for kind in kinds)

    def ready_replica_count(self, model_id: ModelId) -> int:
        """Replicas that answer, busy or not."""
        kinds = self._links.roster().kinds(model_id)
        return sum(len(kind) for kind in kinds if kind.sample.ready and kind.sample.link_up)

    def _drawn(
        self,
        request: InferenceRequest,
        excluded: frozenset[NodeId],
        work: Work,
        kept_for: InferenceRequest | None,
        *,
        takes_any_slot: bool,
        warm: Mapping[ReplicaId, float] = _COLD,
    ) -> Draw:
        return self._links.roster().draw(
            request.model_id,
            work,
            endpoint=request.endpoint,
            engine_kinds=request.engine_kinds,
            trusted_only=request.trusted_only,
            takes_any_slot=takes_any_slot,
            excluded=excluded,
            tokens_min=self._tokens_wanted(request, excluded),
            is_kept=self._kept_for(kept_for),
            warm=warm,
            chance=self._draw,
        )

    def _kept_for(self, request: InferenceRequest | None) -> Callable[[Kind], bool]:
        """Where it may go, by what alike replicas have in common; None: nothing is kept."""
        if request is None:
            return lambda _: False
        tokens_min = self._tokens_wanted(request, _NOBODY)
        return lambda kind: _may_go_to(kind, request, tokens_min)

    def _tokens_wanted(self, request: InferenceRequest, excluded: frozenset[NodeId]) -> int:
        roster = self._links.roster()

        def has_others(kind: Kind) -> bool:
            return not excluded or len(kind) > roster.count_on(kind, excluded)[0]

        contexts = (
            kind.sample.context_length_tokens
            for kind in roster.kinds(request.model_id)
            if _may_go_to(kind, request, 0) and has_others(kind)
        )
        return tokens_wanted(contexts, request.prompt_tokens_min, request.completion_tokens_max)


def _together(kinds: Sequence[Kind]) -> Capacity:
    return Capacity(
        slot_count=sum(kind.slot_count for kind in kinds),
        in_flight_count=sum(kind.in_flight_count for kind in kinds),
        kv_tokens=sum(kind.kv_capacity_tokens for kind in kinds) if all(kind.tells_capacity for kind in kinds) else 0,
        committed_tokens=float(sum(kind.committed_tokens for kind in kinds)),
    )


def _takes_any_slot(request: InferenceRequest) -> bool:
    """Whether it takes any slot. Others wait in the gateway until a replica has read what it has: they may still go elsewhere.

    Of a node's loss come many at a time, and nobody comes before them: an engine that has all of them reads them together.
    """
    return request.continued is not None


def _may_go_to(kind: Kind, request: InferenceRequest, tokens_min: int) -> bool:
    """Whatever its load, and whoever tried it before."""
    reason = rejection(kind.sample, request.endpoint, _NOBODY, tokens_min, request.engine_kinds, trusted_only=request.trusted_only)
    return reason is None
