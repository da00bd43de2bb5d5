"""A gateway's half of the lease and an agent's, each by its own rules, while work comes and goes and the pool grows and shrinks."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.desks import SessionGrant
from potluck_coordinator.domain.nodes import Liveness, LivenessLimits, lease_ends_at, liveness
from potluck_coordinator.gateway.leases import Leases
from potluck_coordinator.gateway.node_session import NodeSession
from potluck_coordinator.gateway.outbox import Outbox
from potluck_node.domain.session import Session, after_beat, after_renewal, after_welcome, beat_due, lease_left_seconds
from potluck_protocol.values import (
    AccountId,
    AttemptId,
    DesiredEngine,
    DesiredState,
    GroupPlace,
    Hello,
    Inventory,
    ModelFile,
    ModelId,
    NodeId,
    NodeState,
    ReplicaId,
    SessionId,
)

LIMITS = LivenessLimits()
HELLO = Hello(1, NodeId("node"), SessionId("session"), "test", Inventory(), NodeState.SERVING)
IDLE = DesiredState()
ENDED = SimpleNamespace(ended_by_node=True)
"""An answer that the node has ended and that is not over here: it counts as work, and nothing is owed."""
RUNNING = SimpleNamespace(ended_by_node=False)


class Pair:
    """One node and its gateway."""

    def __init__(self, node_count: int, desired: DesiredState = IDLE, *, keeps_the_longer: bool = False) -> None:
        self.keeps_the_longer = keeps_the_longer
        """As agents did before a lease could be told anew with less: what they were granted ran on."""
        self.now, self.beat_count, self.renewal_count = 0.0, 0, 0
        self.session = NodeSession(HELLO, SessionGrant(1, AccountId("owner"), desired), self.now)
        self.session.counts_by_number = True
        self.session.connect(HELLO, Outbox(), self.now)
        self.leases = Leases(LIMITS)
        self.leases.adapt(node_count, 0.0)
        welcome = self.leases.welcome(self.session, ())
        self.agent = after_welcome(
            Session(),
            epoch=welcome.epoch,
            lease_ttl_ms=welcome.lease_ttl_ms,
            heartbeat_busy_ms=welcome.heartbeat_busy_ms,
            heartbeat_idle_ms=welcome.heartbeat_idle_ms,
            hello_sent_at_seconds=self.now,
        )

    def look(self, *, is_busy: bool) -> None:
        """The agent's look at the clock; what it says is answered at once, or not at all."""
        if not beat_due(self.agent, busy=is_busy, now_seconds=self.now):
            return
        self.beat_count += 1
        self.agent = after_beat(self.agent, self.beat_count, self.now)
        self.session.touch(self.beat_count, self.now)
        self.leases.renew_if_due(self.session, self.now)
        lease = self.session.outbox._frame.lease
        if lease.heartbeat_number == self.beat_count:
            self.renewal_count += 1
            before = self.agent.lease_ends_at_seconds
            self.agent = after_renewal(
                self.agent,
                epoch=lease.epoch,
                lease_ttl_ms=lease.lease_ttl_ms,
                heartbeat_idle_ms=lease.heartbeat_idle_ms,
                number=lease.heartbeat_number,
            )
            if self.keeps_the_longer:
                self.agent = replace(self.agent, lease_ends_at_seconds=max(before, self.agent.lease_ends_at_seconds))

    def pass_time(self, seconds: float, draw: random.Random, *, relay: SimpleNamespace | None) -> None:
        """Of work on an answer, or of rest."""
        self.session.attempts = {AttemptId("answer"): relay} if relay is not None else {}
        if relay is RUNNING:
            self.session.busy_since = self.now
        ends_at = self.now + seconds
        while self.now < ends_at:
            self.now += draw.uniform(0.2, 0.3)
            assert lease_left_seconds(self.agent, self.now) > 0, "its lease ended under its beats"
            self.look(is_busy=relay is not None)
            assert liveness(self.session.signs, self.now, LIMITS) is Liveness.FRESH
            assert self.agent.lease_ends_at_seconds <= lease_ends_at(self.session.signs, LIMITS) + 1e-3


counts = st.integers(0, 50_000)
spells = st.lists(st.tuples(counts, st.floats(0.0, 60.0), st.floats(0.0, 90.0), st.sampled_from([RUNNING, ENDED])), min_size=1, max_size=6)


@given(counts, spells, st.integers(0, 2**32), st.booleans())
def test_no_lease_ends_under_a_node_that_beats_and_none_outlives_the_coordinators(node_count, told, seed, keeps_the_longer):
    pair, draw = Pair(node_count, keeps_the_longer=keeps_the_longer), random.Random(seed)
    for count, work_seconds, rest_seconds, relay in told:
        pair.leases.adapt(count, 0.0)
        pair.pass_time(work_seconds, draw, relay=relay)
        pair.pass_time(rest_seconds, draw, relay=None)


@given(counts, counts, st.integers(0, 2**32))
def test_a_silent_node_is_given_up_when_its_lease_is_gone_and_not_before(before, after, seed):
    pair, draw = Pair(before), random.Random(seed)
    pair.pass_time(draw.uniform(0, 60), draw, relay=None)
    pair.leases.adapt(after, 0.0)
    pair.pass_time(draw.uniform(0, 60), draw, relay=None)
    own_end = pair.agent.lease_ends_at_seconds
    its_end = lease_ends_at(pair.session.signs, LIMITS)
    assert own_end <= its_end + 1e-3
    assert liveness(pair.session.signs, its_end - 0.01, LIMITS) is not Liveness.LAPSED
    assert liveness(pair.session.signs, its_end, LIMITS) is Liveness.LAPSED


def test_ten_thousand_idle_nodes_beat_a_thousand_times_a_second_and_every_second_beat_is_answered():
    pair = Pair(10_000)
    while pair.now < 1_000.0:
        pair.now += 0.25
        pair.look(is_busy=False)
    assert (pair.beat_count, pair.renewal_count) == (108, 54)


def test_work_holds_the_short_lease_and_who_ends_it_beats_before_that_is_gone():
    pair = Pair(10_000)
    pair.pass_time(60.0, random.Random(1), relay=RUNNING)
    assert pair.agent.lease_seconds == LIMITS.lease_ttl_seconds
    left_seconds, beaten = lease_left_seconds(pair.agent, pair.now), pair.beat_count
    pair.pass_time(left_seconds, random.Random(1), relay=None)
    assert pair.beat_count > beaten
    assert pair.agent.lease_seconds == 24.125


def test_whoever_is_or_becomes_a_member_of_a_group_holds_the_operators_lease():
    place = GroupPlace(ReplicaId("group/big/0"), 1, 1, "10.0.0.1", 29600, "10.0.0.2", (5, 5))
    file = ModelFile(ModelId("big"), "path:/models", "big.safetensors", "0" * 64, 10)
    member = DesiredState(1, (DesiredEngine(ReplicaId("replica"), file, "vllm", 2, 2048, group=place),))
    assert Pair(10_000, member).agent.lease_seconds == LIMITS.lease_ttl_seconds
    pair = Pair(10_000)
    pair.pass_time(60.0, random.Random(1), relay=None)
    pair.session.wish(member)
    pair.pass_time(9.5, random.Random(1), relay=None)
    assert lease_left_seconds(pair.agent, pair.now) <= LIMITS.lease_ttl_seconds, "its next beat is answered with the short lease"
    assert (pair.agent.heartbeat_idle_seconds, pair.agent.lease_seconds) == (5.6, 15.0)
