"""Whatever is wished and whatever happens, the plan drives the node there, with one engine a replica."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from potluck_node.domain.plan import (
    RUNNING,
    Fetch,
    Forget,
    LocalLimits,
    ObservedReplica,
    Phase,
    Refuse,
    Start,
    Stop,
    crashed,
    failed_fetch,
    given_up,
    plan,
    stepped_down,
)
from potluck_protocol.values import DesiredEngine, DesiredState, ModelFile, ModelId, ReplicaId

KINDS = frozenset({"scripted"})


def engine(replica: int, model: int, slots: int) -> DesiredEngine:
    file = ModelFile(ModelId(f"m{model}"), f"wheel:m{model}==1", "m.gguf", str(model) * 64, 10 * (model + 1))
    return DesiredEngine(ReplicaId(f"r{replica}"), file, "scripted", slots, 256)


wishes = st.lists(st.builds(engine, st.integers(0, 3), st.integers(0, 3), st.integers(1, 2)), max_size=5).map(
    lambda engines: DesiredState(1, tuple(engines))
)
failures = st.sampled_from(["", "crash", "costly", "floor"])
limits_given = st.builds(
    LocalLimits,
    engine_kinds=st.just(KINDS),
    models_allowed=st.frozensets(st.sampled_from([ModelId(f"m{model}") for model in range(4)])),
    disk_budget_bytes=st.none() | st.integers(0, 120),
    paused=st.booleans(),
)


class Node:
    """What a supervisor would see: it does what the plan says and counts engines."""

    def __init__(self) -> None:
        self.observed: dict[ReplicaId, ObservedReplica] = {}
        self.now_seconds = 0.0

    def act(self, desired: DesiredState, limits: LocalLimits) -> bool:
        """One round; whether there was anything to do."""
        step = plan(desired, self.observed, limits, self.now_seconds)
        touched = [a.engine.replica_id if isinstance(a, Fetch | Start | Refuse) else a.replica_id for a in step.actions]
        assert len(touched) == len(set(touched)), "one action a replica"
        for action in step.actions:
            self.do(action)
        if not step.actions and step.wake_at_seconds is not None:
            assert step.wake_at_seconds > self.now_seconds
            self.now_seconds = step.wake_at_seconds
            return True
        return bool(step.actions)

    def do(self, action: Fetch | Start | Stop | Refuse | Forget) -> None:
        match action:
            case Fetch(wish):
                old = self.observed.get(wish.replica_id)
                assert old is None or old.phase is Phase.FAILED, "a second engine for one replica"
                self.observed[wish.replica_id] = replace(old or ObservedReplica(wish, Phase.FETCHING), phase=Phase.FETCHING)
            case Start(wish):
                old = self.observed[wish.replica_id]
                assert (old.phase, old.engine) == (Phase.FETCHED, wish)
                self.observed[wish.replica_id] = replace(old, phase=Phase.STARTING)
            case Stop(replica_id):
                assert self.observed[replica_id].phase in RUNNING
                self.observed[replica_id] = replace(self.observed[replica_id], phase=Phase.STOPPING)
            case Refuse(wish, reason):
                old = self.observed.get(wish.replica_id)
                assert old is None or old.phase not in {*RUNNING, Phase.STOPPING}, "what runs is stopped before it is refused"
                given_up_for = old.given_up if old is not None and old.engine == wish else ""
                self.observed[wish.replica_id] = ObservedReplica(wish, Phase.REFUSED, given_up=given_up_for, refusal=reason)
            case Forget(replica_id):
                assert self.observed[replica_id].phase in {Phase.FAILED, Phase.REFUSED}, "something of it lives"
                del self.observed[replica_id]

    def happen(self, replica_id: ReplicaId, failure: str) -> None:
        """The work of a replica ends, well or with a failure."""
        replica, now_seconds = self.observed[replica_id], self.now_seconds
        following = {Phase.FETCHING: Phase.FETCHED, Phase.STARTING: Phase.READY}
        if replica.phase is Phase.STOPPING:
            del self.observed[replica_id]
        elif failure and replica.phase is Phase.FETCHING:
            self.observed[replica_id] = failed_fetch(replica, now_seconds, costly=failure == "costly")
        elif failure and replica.phase in {Phase.STARTING, Phase.READY}:
            self.observed[replica_id] = {
                "crash": crashed(replica, now_seconds, 0.0),
                "costly": stepped_down(replica, now_seconds),
                "floor": given_up(replica, "out of memory"),
            }[failure]
        elif replica.phase in following:
            self.observed[replica_id] = replace(replica, phase=following[replica.phase])

    def settle(self, desired: DesiredState, limits: LocalLimits) -> None:
        """Everything succeeds from now on; within a bound there is nothing left to do."""
        for _ in range(60):
            busy = self.act(desired, limits)
            for replica_id in list(self.observed):
                before = self.observed[replica_id]
                self.happen(replica_id, "")
                busy = busy or self.observed.get(replica_id) != before
            if not busy:
                return
        raise AssertionError("the plan does not converge")


@given(
    rounds=st.lists(st.tuples(wishes, limits_given, st.lists(st.tuples(st.integers(0, 3), failures), max_size=6)), max_size=6),
    last_wish=wishes,
    last_limits=limits_given,
)
def test_converges_from_anywhere(rounds, last_wish, last_limits):
    node = Node()
    for desired, limits, events in rounds:
        for index, failure in events:
            node.act(desired, limits)
            replica_id = ReplicaId(f"r{index}")
            if replica_id in node.observed:
                node.happen(replica_id, failure)
    node.settle(last_wish, last_limits)

    wished = {} if last_limits.paused else {engine.replica_id: engine for engine in reversed(last_wish.engines)}
    assert set(node.observed) == set(wished), "nothing runs that is not wished, and every wish is answered"
    for replica_id, replica in node.observed.items():
        assert replica.engine == wished[replica_id]
        assert replica.phase in {Phase.READY, Phase.REFUSED}
        if replica.phase is Phase.READY:
            allowed = last_limits.models_allowed
            assert not allowed or replica.engine.model.model_id in allowed
        else:
            assert replica.refusal
    files = {
        replica.engine.model.sha256: replica.engine.model.size_bytes for replica in node.observed.values() if replica.phase is Phase.READY
    }
    assert last_limits.disk_budget_bytes is None or sum(files.values()) <= last_limits.disk_budget_bytes
