"""Shard groups of random pools: nobody in them who must not be, everything fits, and generations never meet."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, count, permutations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from potluck_coordinator.domain.grouping.forming import form
from potluck_coordinator.domain.grouping.membership import link_refusal, trust_refusal
from potluck_coordinator.domain.grouping.plan import plan_groups
from potluck_coordinator.domain.grouping.words import GroupPhase, NodeRoom
from potluck_protocol.private_network import address_refusal
from potluck_protocol.values import EngineState, NodeId, NodeState, PeerMeasurement
from tests.support.grouping import need, node, stage_status

ALIVE = {EngineState.FETCHING, EngineState.STARTING, EngineState.READY, EngineState.STOPPING}
OWNERS = ("ann", "bob", "cyd")
links = st.builds(
    PeerMeasurement,
    st.just(NodeId("")),
    st.sampled_from((50, 400, 4_000, 80_000)),
    st.sampled_from((10**9, 10**8, 10**6)),
    st.sampled_from(("", "", "", "no answer")),
)
node_rooms = st.builds(
    NodeRoom,
    st.integers(20, 150),
    st.sampled_from(((), (), ("a",), ("a", "b"))),
    st.sampled_from((1e9, 1e10, 5e10)),
)


@st.composite
def offered_nodes(draw, count_max=6):
    nodes = []
    for number in range(1, draw(st.integers(2, count_max)) + 1):
        offer = {} if draw(st.integers(0, 5)) else draw(st.sampled_from((None, {"site": "attic"}, {"address": "203.0.113.9"})))
        trusts = tuple(draw(st.sets(st.sampled_from(OWNERS))))
        nodes.append(node(number, draw(st.sampled_from(OWNERS)), trusts, offer=offer, connected=draw(st.integers(0, 7)) > 0))
    return nodes


@st.composite
def pools(draw):
    nodes = draw(offered_nodes())
    known = {view.node_id: {} for view in nodes}
    for first, second in combinations(nodes, 2):
        if draw(st.integers(0, 6)):
            known[first.node_id][second.node_id] = draw(links)
    views = {view.node_id: replace(view, peer_measurements=known[view.node_id]) for view in nodes}
    return views, {node_id: draw(node_rooms) for node_id in views}


def stage_bytes(wish, room, card_count):
    return max(1, card_count) * (room.memory_bytes - wish.stage_overhead_bytes)


def holds(wish, rooms, order, card_count):
    """Whether these nodes hold the model in this order, said in the plainest way: the layers each can take, added up."""
    if any((len(rooms[node_id].card_uuids) < card_count) if card_count else rooms[node_id].card_uuids for node_id in order):
        return False
    counts = []
    for rank, node_id in enumerate(order):
        ends = (wish.first_stage_bytes if rank == 0 else 0) + (wish.last_stage_bytes if rank == len(order) - 1 else 0)
        if not card_count:
            ends += wish.table_copy_bytes * ((rank == 0) + (rank == len(order) - 1))
        counts.append((stage_bytes(wish, rooms[node_id], card_count) - ends) // (wish.layer_bytes + wish.layer_kv_bytes))
    return min(counts) >= 1 and sum(counts) >= wish.layer_count and len(order) <= wish.layer_count


def may_be_together(first, second):
    return not trust_refusal(first, second) and not link_refusal(first, second)


@settings(max_examples=200, deadline=None)
@given(pools(), st.integers(0, 9))
def test_a_group_has_only_who_may_be_in_it_and_everything_fits(pool, table_copy_bytes):
    views, rooms = pool
    wish = need(tensor_parallel_sizes=(1, 2), table_copy_bytes=table_copy_bytes)
    formation = form(wish, views, rooms)
    members = [stage.node_id for stage in formation.stages]
    assert set(formation.rejections) == set(views) - set(members)
    assert all(formation.rejections.values())
    assert bool(formation.reason) == (not members)
    for first, second in combinations(members, 2):
        mine, yours = views[first], views[second]
        assert mine.inventory.group_offer.site == yours.inventory.group_offer.site
        assert mine.owner_account_id == yours.owner_account_id or (
            yours.owner_account_id in mine.inventory.group_offer.trusted_account_ids
            and mine.owner_account_id in yours.inventory.group_offer.trusted_account_ids
        )
    if members:
        assert all(views[node_id].connected and not address_refusal(views[node_id].inventory.group_offer.address) for node_id in members)
        assert sum(stage.layer_count for stage in formation.stages) == wish.layer_count
        assert len({len(stage.card_uuids) for stage in formation.stages}) == 1
        for stage in formation.stages:
            room = rooms[stage.node_id]
            assert stage.layer_count >= 1
            # A group has two stages at least, so that none is both its ends.
            copy_bytes = table_copy_bytes if stage in {formation.stages[0], formation.stages[-1]} and not stage.card_uuids else 0
            assert stage.weight_bytes + copy_bytes + stage.kv_cache_bytes <= stage_bytes(wish, room, len(stage.card_uuids))


@settings(max_examples=150, deadline=None)
@given(pools())
def test_no_fewer_stages_would_have_held_it(pool):
    """Orders are not searched through: the chosen one starts at each node once. So no set may fit in *every* order and still be missed."""
    views, rooms = pool
    wish = need(tensor_parallel_sizes=(1, 2), first_stage_bytes=0, last_stage_bytes=0)
    formation = form(wish, views, rooms)
    able = [view for view in views.values() if view.connected and view.inventory.group_offer is not None]
    able = [view for view in able if not address_refusal(view.inventory.group_offer.address)]
    for size in range(2, len(formation.stages) or len(able) + 1):
        for chosen in combinations(able, size):
            if all(may_be_together(*duo) for duo in combinations(chosen, 2)):
                assert not any(holds(wish, rooms, [view.node_id for view in chosen], cards) for cards in (0, 1, 2))


@settings(max_examples=60, deadline=None)
@given(pools(), st.randoms())
def test_the_order_in_which_nodes_are_named_changes_nothing(pool, random):
    views, rooms = pool
    shuffled = list(views)
    random.shuffle(shuffled)
    wish = need(tensor_parallel_sizes=(1, 2))
    assert form(wish, {node_id: views[node_id] for node_id in shuffled}, rooms) == form(wish, views, rooms)


@settings(max_examples=200, deadline=None)
@given(pools())
def test_where_none_is_formed_who_may_be_with_nobody_is_told_why_and_the_others_what_is_missing(pool):
    views, rooms = pool
    wish = need(tensor_parallel_sizes=(1, 2), layer_count=1_000)
    formation = form(wish, views, rooms)
    assert formation.stages == ()
    alone = {node_id: form(wish, {node_id: view}, rooms).rejections[node_id] for node_id, view in views.items()}
    able = [view for node_id, view in sorted(views.items()) if "no other node" in alone[node_id]]
    for view in able:
        others = [other for other in able if other is not view]
        near = [other for other in others if other.inventory.group_offer.site == view.inventory.group_offer.site]
        words = [trust_refusal(view, other) or link_refusal(view, other) for other in near or others]
        expected = (words[0] if words else alone[view.node_id]) if all(words) else formation.reason
        assert formation.rejections[view.node_id] == expected
    assert all(formation.rejections[node_id] == reason for node_id, reason in alone.items() if views[node_id] not in able)


class GroupsUnderChurn(RuleBasedStateMachine):
    """Nodes come, go, pause, fail and obey late; two models want a group each."""

    @initialize(nodes=offered_nodes())
    def start(self, nodes):
        good = PeerMeasurement(NodeId(""), 100, 10**9)
        ids = [view.node_id for view in nodes]
        self.views = {view.node_id: replace(view, peer_measurements=dict.fromkeys(ids, good)) for view in nodes}
        self.needs = [need(replica_id="group/one/0"), need(replica_id="group/two/0")]
        self.numbers = count(1)
        self.now = 0.0
        self.groups = {}
        self.plan = None
        self.began = {}
        self.step(1.0)

    @rule(seconds=st.sampled_from((0.2, 1.0, 30.0, 700.0)))
    def step(self, seconds):
        self.now += seconds
        rooms = {node_id: NodeRoom(90) for node_id in self.views}
        before = dict(self.groups)
        self.plan = plan_groups(self.needs, self.views, rooms, before, next_generation=lambda: next(self.numbers), now=self.now)
        self.groups = dict(self.plan.groups)
        for replica_id, group in self.groups.items():
            earlier = before.get(replica_id)
            if group.phase is GroupPhase.FORMING and (earlier is None or earlier.generation < group.generation):
                self.begins(group)

    def begins(self, group):
        assert group.generation > self.began.get(group.replica_id, 0)
        self.began[group.replica_id] = group.generation
        for first, second in permutations([self.views[stage.node_id] for stage in group.stages], 2):
            assert not trust_refusal(first, second)
        for stage in group.stages:
            # Nor does it share cards or the leader's port with what another group left there.
            assert not [status for status in self.views[stage.node_id].engines if status.state in ALIVE]
        for view in self.views.values():
            if view.connected:
                # A node that is away has lost its lease, and stops by itself.
                assert not [status for status in view.engines if status.replica_id == group.replica_id and status.state in ALIVE]

    @rule(data=st.data())
    def obey(self, data):
        """A node that hears the wish stops what is no longer wished, or runs what is."""
        node_id = data.draw(st.sampled_from(sorted(self.views)))
        view = self.views[node_id]
        if not view.connected:
            return
        wished = {(engine.replica_id, engine.group.generation) for engine in self.plan.desired.get(node_id, ())}
        kept = [status for status in view.engines if (status.replica_id, status.group_generation) in wished]
        have = {(status.replica_id, status.group_generation) for status in kept}
        states = st.sampled_from((EngineState.STARTING, EngineState.READY, EngineState.READY, EngineState.BACKING_OFF))
        for replica_id, generation in sorted(wished - have):
            kept.append(stage_status(replace(self.groups[replica_id], generation=generation), 0, data.draw(states)))
        self.views[node_id] = replace(view, engines=tuple(kept))

    @rule(wanted=st.sets(st.sampled_from(("group/one/0", "group/two/0"))))
    def ask_for(self, wanted):
        self.needs = [need(replica_id=replica_id) for replica_id in sorted(wanted)]

    @rule(data=st.data(), connected=st.booleans(), paused=st.booleans())
    def come_or_go(self, data, connected, paused):
        node_id = data.draw(st.sampled_from(sorted(self.views)))
        view = self.views[node_id]
        self.views[node_id] = replace(
            view,
            connected=connected,
            state=NodeState.PAUSED if paused else NodeState.SERVING,
            engines=view.engines if connected and view.connected else (),
            epoch=view.epoch + (connected and not view.connected),
        )

    @invariant()
    def wishes_are_those_of_living_groups(self):
        if self.plan is None:
            return
        members = [stage.node_id for group in self.groups.values() if group.phase is not GroupPhase.BROKEN for stage in group.stages]
        assert len(members) == len(set(members))
        assert sorted(self.plan.desired) == sorted(members)
        for replica_id, shares in self.plan.payees.items():
            group = self.groups[replica_id]
            assert {share.account_id for share in shares} == {stage.owner_account_id for stage in group.stages}


GroupsUnderChurn.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestGroupsUnderChurn = GroupsUnderChurn.TestCase
