"""Which replica answers a request, and why each other one does not.

Decides among a few candidates, which whoever keeps the replicas has drawn from all of them (`gateway.roster`): holders of the prompt's
beginning, those with least to do, and some by chance. The lowest `cost` in seconds wins, so that a cache is worth exactly the reading that
it saves, and is passed over where waiting for it takes longer. What cannot take the request at all is counted by reason, and no more than
that is looked at: a large pool costs no more than a small one. It must not know how replicas are reached.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from potluck_coordinator.domain.cost import Cost, cache_share, cost
from potluck_coordinator.domain.forecast import Work
from potluck_coordinator.domain.speeds import Speeds, prior
from potluck_protocol.values import AccountId, Endpoint, ModelId, NodeId, ReplicaId

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

TIE_SHARE: Final = 0.02
"""Costs that differ by less are the same: nothing is foreseen that well, and all gateways choosing alike would make a herd."""
CACHE_SHARE_MAX: Final = 0.9
"""Of a cache that its requests share: above it the engine would soon throw work away to go on with other work."""
BACKLOG_SECONDS_MAX: Final = 0.15
"""Of reading may wait at a replica: enough for it never to stand still, and all else waits here, where it can still go elsewhere."""
EXPLORE_SHARE: Final = 0.01
"""Of requests that are placed as if nothing were cached, so that a beginning which many share comes to be in more than one cache; and with
an idle replica that nobody has tried for long, so that what it once was, or was guessed to be, is not held against it for ever."""
NEW_SHARE: Final = 0.1
"""Of requests that try an idle replica of which nobody knows anything yet, if there is one: what is guessed may be far too little."""
TRIED_SECONDS: Final = 30.0
"""For so long a replica is what it was when it answered last."""
TRIED_COST_MAX: Final = 3.0
"""Times the least: what an idle one may seem to cost to be tried anew. A client waits for it."""
ROUND_TRIP_SECONDS_GUESS: Final = 0.03
"""Of a line that was not measured."""
TRIED: Final = "tried before"
NOT_TRUSTED: Final = "not trusted"
BUSY: Final = "busy"
CHOSEN: Final = "chosen"
_LEAST: Final = Work(1.0, 1.0)
_NO_ACCOUNT: Final = AccountId("")
_GUESSED: Final = prior(None, None)


class ReplicaView(NamedTuple):
    """One replica as the gateway sees it now."""

    replica_id: ReplicaId
    node_id: NodeId
    model_id: ModelId
    ready: bool
    slot_count: int
    in_flight_count: int
    """The gateway's own count of attempts there, never the node's word."""
    node_paused: bool
    node_suspect: bool
    link_up: bool
    endpoints: tuple[Endpoint, ...]
    leaving: bool = False
    """It finishes what it is answering, and makes room."""
    context_length_tokens: int = 0
    """What its engine was really started with, prompt and answer together; 0: it does not say."""
    half_open: bool = False
    """It failed, and gets one request at a time until it has answered one: `slot_count` says so, too."""
    withheld_slot_count: int = 0
    """Slots beside those in `slot_count` that stay empty, since a larger batch would be too slow (`pace`)."""
    owner_account_id: AccountId = _NO_ACCOUNT
    is_trusted: bool = False
    """By the operator's word over every node that has a part in it (`trust`)."""
    engine_kind: str = ""
    kv_capacity_tokens: int = 0
    """What its cache holds; 0: nobody says."""
    kv_used_tokens: int = 0
    """By the engine's last word, of work under way; 0 where it tells nothing, or counts what it only keeps."""
    committed_tokens: float = 0.0
    """Prompts and expected answers of the attempts there: the gateway's own count."""
    dispatched_tokens: float = 0.0
    """Those of attempts since the engine's last word, which cannot know of them."""
    prefill_backlog_tokens: float = 0.0
    """Of the attempts there those prompts' tokens, not cached, whose first token has not come: the gateway's own count."""
    prefill_since_seconds: float = 0.0
    """When it got the first of them."""
    foreign_waiting_count: int = 0
    """Requests of others that wait in an engine which its owner uses, too, by its last word."""
    foreign_running_count: int = 0
    speeds: Speeds = _GUESSED
    drained: str = ""
    """Why it gets nothing for a while, though it could answer; empty where it does get requests."""
    weight: float = 1.0
    """Of its speeds that is to be believed: less for a node that is slower than it used to be."""
    round_trip_seconds: float = ROUND_TRIP_SECONDS_GUESS
    losses_per_second: float = 0.0
    """How often its node goes away at this hour of the week, by its own history."""
    heard_at_seconds: float = 0.0
    """When its node last gave a sign of life: the age of its lease, and of its word."""
    is_remote: bool = False
    """Another gateway has its link: each token passes through both."""

    @property
    def tokens_in_use(self) -> float:
        """Of its cache, once what is under way comes to its end: by our count, or the engine's and what came since, if that is more."""
        return max(self.committed_tokens, self.kv_used_tokens + self.dispatched_tokens)

    def tokens_bounded(self, tokens: float) -> float:
        """What one request takes of the cache at most."""
        return min(tokens, self.context_length_tokens) if self.context_length_tokens else tokens

    @property
    def shares_cache(self) -> bool:
        """Whether its cache may be full before its slots are taken; llama.cpp's slots have one each."""
        return 0 < self.kv_capacity_tokens < self.slot_count * self.context_length_tokens


def likeness(replica: ReplicaView) -> tuple[object, ...]:
    """What decides whether a replica can take a request whatever its load: of two with the same, either both can or neither."""
    return (
        replica.ready,
        replica.node_paused,
        replica.node_suspect,
        replica.link_up,
        replica.endpoints,
        replica.leaving,
        replica.drained,
        replica.context_length_tokens,
        replica.engine_kind,
        replica.is_trusted,
        replica.is_remote,
    )


class Offer(NamedTuple):
    """A replica that a decision looks at."""

    replica: ReplicaView
    origin: str
    """Why it was drawn: "warm", "least work", "by chance" or "roomiest"."""
    cached_tokens: float = 0.0
    """Of the prompt, as the gateway believes."""


class Candidate(NamedTuple):
    """The part that some replicas had in a decision."""

    replica_count: int
    reason: str
    """`CHOSEN`, or why not."""
    replica_id: ReplicaId | None = None
    """None: several, counted by their reason."""
    node_id: NodeId | None = None
    origin: str = ""
    cost: Cost | None = None
    cached_tokens: float = 0.0

    @property
    def chosen(self) -> bool:
        """The request went there."""
        return self.reason == CHOSEN


class Draw(NamedTuple):
    """What was drawn of all replicas for one decision."""

    offers: tuple[Offer, ...]
    """Free ones, in no order, each once."""
    rest: tuple[Candidate, ...]
    """All others, by reason."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The decision with everything it was made from."""

    chosen: ReplicaView | None
    candidates: tuple[Candidate, ...]
    work: Work = _LEAST
    explores: bool = False
    """It was placed as if nothing were cached anywhere."""

    def explanation(self) -> str:
        """One line for people: how many replicas lost for which reason."""
        counts: dict[str, int] = {}
        for candidate in self.candidates:
            counts[candidate.reason] = counts.get(candidate.reason, 0) + candidate.replica_count
        return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "no node has this model"


def rejection(
    replica: ReplicaView,
    endpoint: Endpoint,
    excluded: frozenset[NodeId],
    tokens_min: int = 0,
    engine_kinds: frozenset[str] | None = None,
    *,
    trusted_only: bool = False,
) -> str | None:
    """Why the replica cannot take the request at all, whatever its load; None if it can.

    Args:
        replica: asked about.
        endpoint: the request's.
        excluded: where it must not go.
        tokens_min: what there has to be room for.
        engine_kinds: those that can do what it asks; None: any.
        trusted_only: it demands trusted nodes.
    """
    if replica.node_id in excluded:
        return TRIED
    if trusted_only and not replica.is_trusted:
        return NOT_TRUSTED
    if (reason := hurdle(replica)) is not None:
        return reason
    if endpoint not in replica.endpoints:
        return f"without {endpoint.value}"
    if engine_kinds is not None and replica.engine_kind not in engine_kinds:
        return "cannot go on with another's text"
    if 0 < replica.context_length_tokens < tokens_min:
        return f"with a context of {replica.context_length_tokens} tokens, too short for it"
    return None


def hurdle(replica: ReplicaView) -> str | None:
    """Why the replica takes no request at all, whatever it is; None if it does."""
    if not replica.link_up:
        return "disconnected"
    if replica.node_suspect:
        return "suspect"
    if replica.node_paused:
        return "paused"
    if replica.leaving:
        return "leaving"
    if replica.drained:
        return replica.drained
    return None if replica.ready else "not ready"


def is_free(replica: ReplicaView) -> bool:
    """Whether there is a request that the replica would take now, with nothing of its prompt cached there."""
    return has_slot(replica) and not is_behind(replica)


def has_slot(replica: ReplicaView) -> bool:
    """Whether there is a request that the replica would take now, were it quickly read."""
    return replica.in_flight_count < replica.slot_count and hurdle(replica) is None and not lacks_room(replica, _LEAST)


def has_slot_for_broken(replica: ReplicaView) -> bool:
    """Whether an answer that has lost its node could go on there: sooner with slots that stay empty for their pace than not at all."""
    return has_slot(replica if not replica.withheld_slot_count else _with_all_slots(replica))


def _with_all_slots(replica: ReplicaView) -> ReplicaView:
    return replica._replace(slot_count=replica.slot_count + replica.withheld_slot_count, withheld_slot_count=0)


def is_behind(replica: ReplicaView) -> bool:
    """Whether it still has so much to read that what comes on top would only wait there, where nothing can be changed any more."""
    return replica.prefill_backlog_tokens > BACKLOG_SECONDS_MAX * replica.speeds.prefill_tokens_per_second * replica.weight


def lacks_room(replica: ReplicaView, work: Work) -> bool:
    """Whether the request would fill a cache that it would share. Who is alone there has all of it."""
    return replica.shares_cache and replica.in_flight_count > 0 and cache_share(replica, work.wanted_tokens) > CACHE_SHARE_MAX


def tokens_wanted(
    contexts_tokens: Iterable[int],
    prompt_tokens_min: int,
    completion_tokens_max: int | None,
) -> int:
    """What a replica has to have room for: the prompt and the longest answer, or, where none that may take it has so much, the prompt.

    Engines were started with less context than the catalogue says where memory ran out; some refuse what is longer, others cut the answer.

    Args:
        contexts_tokens: of those that may take it; 0: does not say.
        prompt_tokens_min: of the request's prompt, at the least.
        completion_tokens_max: of its answer, as asked.
    """
    wanted = prompt_tokens_min + (1 if completion_tokens_max is None else completion_tokens_max)
    room = max((context_tokens or wanted for context_tokens in contexts_tokens), default=0)
    return wanted if wanted <= room else prompt_tokens_min


def slots_beside_owner(slot_count: int, in_flight_count: int, waiting_count: int | None) -> int:
    """How many slots an engine has that its owner uses, too: while requests wait inside it, those that are taken.

    What it runs says nothing, for how much that may be is not told, nor whose it is; whom the waiting ones belong to does not matter. One
    slot is always left: some engines tell old numbers when they have nothing to do, and the next request makes them tell new ones.

    Args:
        slot_count: as wished.
        in_flight_count: of them that are taken.
        waiting_count: requests that the engine has taken and not begun, by its last word; None: it does not say.
    """
    return min(slot_count, max(1, in_flight_count)) if waiting_count else slot_count


def reading_seconds(draw: Draw, work: Work, now: float) -> float:
    """Until one of the offers that have a slot and room for the request has read what it was given; infinite: none has them."""
    roomy = (offer.replica for offer in draw.offers if has_slot(offer.replica) and not lacks_room(offer.replica, work))
    return min((cost(replica, work, now).waiting_seconds for replica in roomy), default=math.inf)


def place(draw: Draw, work: Work, chance: float, now: float, *, curiosity: float = 1.0) -> Placement:
    """Chooses the offer with the lowest cost.

    Args:
        draw: what was drawn for it.
        work: the request's, as expected.
        chance: in [0, 1), breaks ties, so that equal nodes share the work.
        now: monotonic seconds.
        curiosity: in [0, 1). Below `NEW_SHARE` the request may go to an idle one that was never tried.
            Below `EXPLORE_SHARE` it may go to one that was not for long, and caches count for nothing.
    """
    explores = curiosity < EXPLORE_SHARE
    roomy = [offer for offer in draw.offers if not lacks_room(offer.replica, work)]
    costs = [cost(offer.replica, work, now, 0.0 if explores else offer.cached_tokens) for offer in roomy]
    totals = [each.total_seconds for each in costs]
    winner = _winner(roomy, totals, chance)
    if roomy and curiosity < NEW_SHARE:
        winner = _least_tried(roomy, totals, winner, now - TRIED_SECONDS if explores else -math.inf)
    candidates = [_full(offer) for offer in draw.offers if offer not in roomy] if len(roomy) < len(draw.offers) else []
    for index, (offer, terms) in enumerate(zip(roomy, costs, strict=True)):
        reason = CHOSEN if index == winner else _lost(totals[index], totals[winner])
        replica = offer.replica
        candidates.append(Candidate(1, reason, replica.replica_id, replica.node_id, offer.origin, terms, offer.cached_tokens))
    return Placement(roomy[winner].replica if roomy else None, (*candidates, *draw.rest), work, explores)


def _winner(offers: Sequence[Offer], totals: Sequence[float], chance: float) -> int:
    """Which one; -1 where there is none.

    Of equals those that hold most of the prompt: what is foreseen of reading is foreseen best. Of these in turn the gateway's own.
    """
    if not offers:
        return -1
    bound = min(totals) * (1 + TIE_SHARE)
    ties = [index for index, total in enumerate(totals) if total <= bound]
    most = max(offers[index].cached_tokens for index in ties)
    ties = [index for index in ties if offers[index].cached_tokens >= most * (1 - TIE_SHARE)]
    ties = [index for index in ties if not offers[index].replica.is_remote] or ties
    return ties[int(chance * len(ties))]


def _least_tried(offers: Sequence[Offer], totals: Sequence[float], winner: int, tried_before: float) -> int:
    """Of the idle ones that nobody has tried since, that of longest ago, unless it is believed to be far worse; else the winner."""

    def tried_at(index: int) -> float:
        speeds = offers[index].replica.speeds
        return speeds.learned_at_seconds if speeds.decode_sample_count else -math.inf

    bearable = TRIED_COST_MAX * totals[winner]
    idle = (index for index, offer in enumerate(offers) if not offer.replica.in_flight_count and totals[index] <= bearable)
    return min((index for index in idle if tried_at(index) <= tried_before), key=tried_at, default=winner)


def _lost(total: float, chosen: float) -> str:
    if total < chosen * (1 - TIE_SHARE):
        return "quicker; another was not tried for long"
    return "as good" if total <= chosen * (1 + TIE_SHARE) else "slower"


def _full(offer: Offer) -> Candidate:
    replica = offer.replica
    return Candidate(1, "short of cache", replica.replica_id, replica.node_id, offer.origin, None, offer.cached_tokens)
