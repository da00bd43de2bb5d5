"""The replicas of all connected nodes, kept so that a request looks at a few of them, however many there are.

Decides what a decision gets to see: at most four that hold the prompt's beginning, four with the least work to do, four by chance, and, if
none of these has room in its cache, the roomiest; all others only as counts. Replicas that are alike (`domain.placement.likeness`) are in
one kind, and are asked for once whether they can take a request. Of each kind the free ones stand in order of what a usual request would
cost there. A change costs the same in a pool of ten as in one of a hundred thousand. It must not know sessions, clocks or prompts: `links`
says what a node's replicas are now, and whoever asks who is warm.
"""

from __future__ import annotations

from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.cost import cost
from potluck_coordinator.domain.drain_order import DrainOrder
from potluck_coordinator.domain.forecast import Forecast, Work
from potluck_coordinator.domain.placement import (
    BUSY,
    TRIED,
    Candidate,
    Draw,
    Offer,
    has_slot,
    has_slot_for_broken,
    is_free,
    lacks_room,
    likeness,
    rejection,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from potluck_coordinator.domain.placement import ReplicaView
    from potluck_protocol.values import Endpoint, ModelId, NodeId, ReplicaId

WARM_MAX: Final = 4
LEAST_MAX: Final = 4
CHANCE_MAX: Final = 4
SHAPES: Final = (8.0, 1.0, 1 / 8)
"""How much longer a prompt, and shorter an answer, than usual: the replicas stand in order for each. Nodes differ in what they do well."""
_NOBODY_WARM: Final[Mapping[ReplicaId, float]] = MappingProxyType({})
NOT_DRAWN: Final = "not drawn"
KEPT: Final = "kept for one that was overtaken"


class _Entry:
    """One replica, in its kind."""

    __slots__ = ("kind", "likeness", "replica")

    def __init__(self, replica: ReplicaView, alike: tuple[object, ...], kind: Kind) -> None:
        self.replica = replica
        self.likeness = alike
        self.kind = kind


class Kind:
    """The replicas of one model that have the same `likeness`; at least one."""

    __slots__ = (
        "_entries",
        "_free",
        "_orders",
        "_reluctant",
        "_roomiest",
        "committed_tokens",
        "free_slot_count",
        "in_flight_count",
        "kv_capacity_tokens",
        "silent_count",
        "slot_count",
        "withheld_slot_count",
    )

    def __init__(self) -> None:
        self._entries: dict[_Entry, None] = {}
        self._free: DrainOrder[_Entry] = DrainOrder()
        """All in one bucket: to draw by chance."""
        self._reluctant: dict[_Entry, None] = {}
        """Those with a slot, but with much to read already, and those whose slots stay empty for their pace."""
        self._orders: tuple[DrainOrder[_Entry], ...] = tuple(DrainOrder() for _ in SHAPES)
        self._roomiest: DrainOrder[_Entry] = DrainOrder()
        """Of those whose requests share a cache."""
        self.slot_count = 0
        """Of all of them, taken or not."""
        self.withheld_slot_count = 0
        """Beside those: what would make them too slow."""
        self.free_slot_count = 0
        self.in_flight_count = 0
        self.kv_capacity_tokens = 0
        """As far as they tell."""
        self.silent_count = 0
        """Those that do not."""
        self.committed_tokens = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def sample(self) -> ReplicaView:
        """Any of them: what `likeness` says of it is true of all."""
        return next(iter(self._entries)).replica

    def replicas(self) -> Iterator[ReplicaView]:
        """All of them."""
        return (entry.replica for entry in self._entries)

    @property
    def tells_capacity(self) -> bool:
        """Whether all of them say what their caches hold."""
        return not self.silent_count

    @property
    def free_count(self) -> int:
        """How many would take some request now."""
        return len(self._free)

    def put(self, entry: _Entry, usual: tuple[Work, ...]) -> None:
        """Adds a replica, or notes what became of it; whoever changes its view takes out the old one's sums before."""
        self._entries[entry] = None
        replica = entry.replica
        self._sum(replica, 1)
        if not is_free(replica):
            self._take_out(entry)
            if has_slot_for_broken(replica):
                self._reluctant[entry] = None
            return
        self._reluctant.pop(entry, None)
        self._free.put(entry, 0.0)
        for order, work in zip(self._orders, usual, strict=True):
            order.put(entry, cost(replica, work, replica.prefill_since_seconds).total_seconds)
        if replica.shares_cache:
            self._roomiest.put(entry, 1e6 / max(1.0, replica.kv_capacity_tokens - replica.tokens_in_use))
        else:
            self._roomiest.drop(entry)

    def forget_sums(self, replica: ReplicaView) -> None:
        """Of a view that holds no more."""
        self._sum(replica, -1)

    def _sum(self, replica: ReplicaView, sign: int) -> None:
        """Whole numbers, so that what is added and taken away again leaves nothing."""
        self.slot_count += sign * replica.slot_count
        self.withheld_slot_count += sign * replica.withheld_slot_count
        self.free_slot_count += sign * max(0, replica.slot_count - replica.in_flight_count)
        self.in_flight_count += sign * replica.in_flight_count
        self.kv_capacity_tokens += sign * replica.kv_capacity_tokens
        self.silent_count += sign * (replica.kv_capacity_tokens <= 0)
        self.committed_tokens += sign * int(replica.committed_tokens)

    def drop(self, entry: _Entry) -> None:
        """Takes a replica out."""
        self.forget_sums(entry.replica)
        del self._entries[entry]
        self._take_out(entry)

    def _take_out(self, entry: _Entry) -> None:
        self._reluctant.pop(entry, None)
        for order in (self._free, self._roomiest, *self._orders):
            order.drop(entry)

    @property
    def reluctant_count(self) -> int:
        """How many have a slot, but would let some request wait or slow others down."""
        return len(self._reluctant)

    def reluctant(self) -> Iterator[_Entry]:
        """Those, the ones that have been so for longest first."""
        return iter(self._reluctant)

    def least(self, shape: int, chance: Callable[[], float]) -> Iterator[tuple[int, _Entry]]:
        """The free ones with their bucket, those with the least to do first."""
        return self._orders[shape].ascending(chance)

    def least_bucket(self, shape: int) -> int:
        """Of the first of them."""
        return self._orders[shape].least()

    def free_by_chance(self, chance: float) -> _Entry:
        """One of the free ones; there is one."""
        return self._free.any(chance)

    def roomiest(self, chance: Callable[[], float]) -> Iterator[_Entry]:
        """Free ones whose requests share a cache, those with the most room first."""
        return (entry for _, entry in self._roomiest.ascending(chance))


class Roster:
    """Every replica of one gateway's nodes.

    Args:
        forecast: what requests of a model usually are; by that its replicas stand in order.
    """

    def __init__(self, forecast: Callable[[ModelId], Forecast] = lambda _: Forecast()) -> None:
        self._forecast = forecast
        self._nodes: dict[NodeId, dict[ReplicaId, _Entry]] = {}
        self._replicas: dict[ReplicaId, _Entry] = {}
        self._kinds: dict[ModelId, dict[tuple[object, ...], Kind]] = {}

    def kinds(self, model_id: ModelId) -> tuple[Kind, ...]:
        """The model's, for use before the next `enter`."""
        return tuple(self._kinds.get(model_id, {}).values())

    def replica_count(self, model_id: ModelId) -> int:
        """How many the model has, whatever they do."""
        return sum(len(kind) for kind in self._kinds.get(model_id, {}).values())

    def replicas_of(self, node_id: NodeId) -> Iterator[ReplicaView]:
        """The node's."""
        return (entry.replica for entry in self._nodes.get(node_id, {}).values())

    def enter(self, node_id: NodeId, replicas: Iterable[ReplicaView]) -> None:
        """The replicas that a node has now, instead of those that it had; of a node that is gone, none."""
        known = self._nodes.get(node_id, {})
        now = {replica.replica_id: replica for replica in replicas}
        for replica_id, entry in tuple(known.items()):
            if replica_id not in now or now[replica_id].model_id != entry.replica.model_id:
                self._leave(known.pop(replica_id))
        for replica_id, replica in now.items():
            if replica_id not in known:
                known[replica_id] = self._come(replica)
            elif known[replica_id].replica != replica:
                self._change(known[replica_id], replica)
        if known:
            self._nodes[node_id] = known
        else:
            self._nodes.pop(node_id, None)

    def _come(self, replica: ReplicaView) -> _Entry:
        alike = likeness(replica)
        entry = _Entry(replica, alike, self._kind(replica.model_id, alike))
        entry.kind.put(entry, self._usual(replica.model_id))
        self._replicas[replica.replica_id] = entry
        return entry

    def _change(self, entry: _Entry, replica: ReplicaView) -> None:
        if entry.likeness == (alike := likeness(replica)):
            entry.kind.forget_sums(entry.replica)
        else:
            self._drop(entry)
            entry.likeness, entry.kind = alike, self._kind(replica.model_id, alike)
        entry.replica = replica
        entry.kind.put(entry, self._usual(replica.model_id))

    def _leave(self, entry: _Entry) -> None:
        self._drop(entry)
        if self._replicas.get(entry.replica.replica_id) is entry:
            del self._replicas[entry.replica.replica_id]

    def _drop(self, entry: _Entry) -> None:
        entry.kind.drop(entry)
        if not len(entry.kind):
            model_id = entry.replica.model_id
            kinds = self._kinds[model_id]
            del kinds[entry.likeness]
            if not kinds:
                del self._kinds[model_id]

    def _kind(self, model_id: ModelId, alike: tuple[object, ...]) -> Kind:
        kinds = self._kinds.setdefault(model_id, {})
        return kinds[alike] if alike in kinds else kinds.setdefault(alike, Kind())

    def _usual(self, model_id: ModelId) -> tuple[Work, ...]:
        usual = self._forecast(model_id)
        return tuple(Work(usual.prompt_tokens * shape, usual.answer_tokens / shape) for shape in SHAPES)

    def count_on(self, kind: Kind, node_ids: Iterable[NodeId]) -> tuple[int, int, int, int]:
        """Of a kind those on the nodes: replicas, free ones, slots, and free slots."""
        found = [entry.replica for node_id in node_ids for entry in self._nodes.get(node_id, {}).values() if entry.kind is kind]
        free_slots = (max(0, replica.slot_count - replica.in_flight_count) for replica in found)
        return len(found), sum(map(is_free, found)), sum(replica.slot_count for replica in found), sum(free_slots)

    def draw(
        self,
        model_id: ModelId,
        work: Work,
        *,
        endpoint: Endpoint,
        excluded: frozenset[NodeId] = frozenset(),
        tokens_min: int = 0,
        engine_kinds: frozenset[str] | None = None,
        trusted_only: bool = False,
        takes_any_slot: bool = False,
        is_kept: Callable[[Kind], bool] = lambda _: False,
        warm: Mapping[ReplicaId, float] = _NOBODY_WARM,
        chance: Callable[[], float],
    ) -> Draw:
        """The candidates for one request, and the counts of all others.

        Args:
            model_id: the request's.
            work: what it is expected to be.
            endpoint: the request's.
            excluded: nodes that it must not go to.
            tokens_min: what a replica has to have room for.
            engine_kinds: those that can do what the request asks; None: any.
            trusted_only: it demands trusted nodes.
            takes_any_slot: rather than wait here it goes to a replica that has much to read, or too many answers for its pace.
            is_kept: kinds that are somebody else's now.
            warm: who holds how many tokens of its prompt, the best first.
            chance: a number in [0, 1), anew with each call.
        """
        able: list[Kind] = []
        rest: list[Candidate] = []
        for kind in self.kinds(model_id):
            reason = rejection(kind.sample, endpoint, frozenset(), tokens_min, engine_kinds, trusted_only=trusted_only)
            reason = KEPT if reason is None and is_kept(kind) else reason
            out_count, out_free_count, _, _ = self.count_on(kind, excluded) if excluded else (0, 0, 0, 0)
            busy_count = len(kind) - kind.free_count - (out_count - out_free_count)
            if out_count:
                rest.append(Candidate(out_count, TRIED))
            if reason is not None:
                if len(kind) > out_count:
                    rest.append(Candidate(len(kind) - out_count, reason))
                continue
            able.append(kind)
            rest += [Candidate(busy_count, BUSY), Candidate(kind.free_count - out_free_count, NOT_DRAWN)]
        shape = self._shape(model_id, work)
        offers = self._offers(able, shape, work, excluded=excluded, warm=warm, takes_any_slot=takes_any_slot, chance=chance)
        free_count = sum(is_free(offer.replica) for offer in offers)
        return Draw(offers, _added_up(rest, {NOT_DRAWN: free_count, BUSY: len(offers) - free_count}))

    def _shape(self, model_id: ModelId, work: Work) -> int:
        """Which order suits the request best."""
        usual = self._forecast(model_id)
        length = work.prompt_tokens * max(1.0, usual.answer_tokens) / (max(1.0, work.answer_tokens) * max(1.0, usual.prompt_tokens))
        # Halfway between two shapes, of which each is so much longer and shorter.
        return 0 if length > SHAPES[0] else 2 if length < SHAPES[2] else 1

    def _offers(
        self,
        able: list[Kind],
        shape: int,
        work: Work,
        *,
        excluded: frozenset[NodeId],
        warm: Mapping[ReplicaId, float],
        takes_any_slot: bool,
        chance: Callable[[], float],
    ) -> tuple[Offer, ...]:
        kinds = set(able)
        found: dict[_Entry, str] = {}
        for replica_id in islice(warm, WARM_MAX):
            entry = self._replicas.get(replica_id)
            if entry is not None and entry.kind in kinds and has_slot(entry.replica) and entry.replica.node_id not in excluded:
                found[entry] = "warm"
        if takes_any_slot:
            for entry in islice(_permitted((entry for kind in able for entry in kind.reluctant()), excluded), LEAST_MAX):
                found.setdefault(entry, "behind")
        able = [kind for kind in able if kind.free_count]
        for entry in _least(able, shape, excluded, chance):
            found.setdefault(entry, "least work")
        for entry in _by_chance(able, chance):
            if entry.replica.node_id not in excluded:
                found.setdefault(entry, "by chance")
        if all(lacks_room(entry.replica, work) for entry in found):
            roomiest = (entry for kind in able for entry in islice(_permitted(kind.roomiest(chance), excluded), 1))
            found |= {entry: "roomiest" for entry in roomiest if entry not in found}
        return tuple(Offer(entry.replica, origin, warm.get(entry.replica.replica_id, 0.0)) for entry, origin in found.items())


def _permitted(entries: Iterable[_Entry], excluded: frozenset[NodeId]) -> Iterator[_Entry]:
    return (entry for entry in entries if entry.replica.node_id not in excluded) if excluded else iter(entries)


def _least(able: list[Kind], shape: int, excluded: frozenset[NodeId], chance: Callable[[], float]) -> list[_Entry]:
    """Of all kinds together those with the least to do."""
    found: list[tuple[int, float, _Entry]] = []
    for kind in sorted(able, key=lambda kind: kind.least_bucket(shape)):
        if len(found) >= LEAST_MAX and kind.least_bucket(shape) > found[LEAST_MAX - 1][0]:
            break
        permitted = ((bucket, entry) for bucket, entry in kind.least(shape, chance) if entry.replica.node_id not in excluded)
        found += [(bucket, chance(), entry) for bucket, entry in islice(permitted, LEAST_MAX)]
        found.sort(key=lambda each: each[:2])
    return [entry for _, _, entry in found[:LEAST_MAX]]


def _by_chance(able: list[Kind], chance: Callable[[], float]) -> Iterator[_Entry]:
    """Some free ones, each as likely as any other; maybe the same again."""
    free_count = sum(kind.free_count for kind in able)
    for _ in range(CHANCE_MAX if free_count else 0):
        number = int(chance() * free_count)
        for kind in able:
            if number < kind.free_count:
                yield kind.free_by_chance((number + 0.5) / kind.free_count)
                break
            number -= kind.free_count


def _added_up(rest: list[Candidate], drawn_counts: Mapping[str, int]) -> tuple[Candidate, ...]:
    """The counts by reason, without those that were drawn."""
    counts: dict[str, int] = {}
    for candidate in rest:
        counts[candidate.reason] = counts.get(candidate.reason, 0) + candidate.replica_count
    left = {reason: count - drawn_counts.get(reason, 0) for reason, count in counts.items()}
    return tuple(Candidate(count, reason) for reason, count in left.items() if count)
