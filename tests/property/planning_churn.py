"""A pool in which everything comes and goes, planned for at every turn: `python -m tests.property.planning_churn --steps 1000 --seed 1`.

Nodes of a simulated pool obey their wishes step by step: they fetch, start, answer, stop. Random joins, leaves, pauses, refusals, wishes
and demands hit it, and after each of them the pool is left alone until it rests. Checked all along, from the outside:

- every plan fits: no card is wished for two engines, nothing is wished beyond a machine's memory or a card's, and engines that still stop
  count as running;
- no plan oscillates: a plan made of itself and the same facts is the same; between two events no plan comes back after another, and no
  model leaves a node it came to, or comes back to one it left, but by moves that gain 20 % each;
- a satisfied deployment is not disturbed, but for a place that is worth at least 20 % more, or for the demand of another while it is idle.

Prints what happened; ends 1 at the first broken rule.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace

from potluck_coordinator.domain.catalogue import Deployment, ServiceTier
from potluck_coordinator.domain.node_view import NodeView
from potluck_coordinator.domain.planning.plan import plan
from potluck_coordinator.domain.planning.sizing import Sizer, whole_room
from potluck_coordinator.domain.planning.words import IDLE_SECONDS, Phase, Plan, PlannedReplica, PlanningView, Trouble
from potluck_protocol.values import DesiredEngine, EngineState, EngineStatus, ModelId, NodeId, NodeState, ReplicaId
from tests.support.planning import card_entry, cards, machine_entry, node

GIB = 1 << 30
NODES_MAX = 14
BEAT_SECONDS = 5.0
REST_BEATS = 4
"""So many beats without a change, and the pool rests."""
SETTLE_BEATS_MAX = 400
LONG_BEAT_SECONDS = 60.0

ENTRIES = (
    card_entry("8b"),
    card_entry("32b"),
    card_entry("70b"),
    machine_entry("tiny"),
    machine_entry("small", 3 * GIB),
    machine_entry("middling", 7 * GIB),
    card_entry("8b", model_id="8b-gguf", engine_kinds=("llamacpp",), slot_count=2),
)
CATALOGUE = {entry.model_id: entry for entry in ENTRIES}
NEXT_STATE = {EngineState.FETCHING: EngineState.STARTING, EngineState.STARTING: EngineState.READY}


class BrokenRuleError(AssertionError):
    """A plan did what no plan may do."""


@dataclass
class Box:
    """One machine and what runs there."""

    view: NodeView
    engines: dict[ReplicaId, tuple[DesiredEngine, EngineState]] = field(default_factory=dict)
    refused: set[ModelId] = field(default_factory=set)
    """Models that its owner does not allow, which the pool learns when it asks."""

    def obey(self, desired: tuple[DesiredEngine, ...]) -> None:
        """One beat of the agent's life: what is wished comes one step nearer, what is not goes."""
        wished = {engine.replica_id: engine for engine in desired}
        for replica_id, (engine, state) in list(self.engines.items()):
            if state is EngineState.STOPPING:
                del self.engines[replica_id]
            elif wished.get(replica_id) != engine:
                self.engines[replica_id] = (engine, EngineState.STOPPING)
            elif state in NEXT_STATE:
                self.engines[replica_id] = (engine, NEXT_STATE[state])
        for replica_id, engine in wished.items():
            if replica_id not in self.engines:
                is_refused = engine.model.model_id in self.refused
                self.engines[replica_id] = (engine, EngineState.REFUSED if is_refused else EngineState.FETCHING)


@dataclass
class Counts:
    """What happened so far."""

    events: Counter[str] = field(default_factory=Counter)
    plans: int = 0
    moves: int = 0
    displacements: int = 0
    placements: int = 0
    beats: int = 0


class Churn:
    """The simulated pool; `step` is one event and the rest after it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 1000.0
        self.boxes: dict[NodeId, Box] = {}
        self.deployments: dict[ModelId, Deployment] = {}
        self.absent_since: dict[NodeId, float] = {}
        self.troubles: dict[tuple[NodeId, ModelId], Trouble] = {}
        self.busy: set[ModelId] = set()
        self.used_at: dict[ReplicaId, float] = {}
        self.plan = Plan({}, {}, frozenset(), (), {})
        self.sizer = Sizer()
        self.counts = Counts()
        self._plans_since_news: list[frozenset[tuple[str, ...]]] = []
        """Since the last event, or since a node refused what it was first wished then: that is news to the planner, too."""
        self._presence: dict[tuple[ModelId, NodeId], list[bool]] = {}
        self._number = 0

    # Events.

    def step(self) -> None:
        events = (self.join, self.join, self.leave, self.come_back, self.revoke, self.pause, self.deploy, self.deploy)
        event = self.random.choice((*events, self.undeploy, self.ask, self.ask, self.fall_silent, self.fall_silent, self.refuse, self.wait))
        event()
        self.counts.events[event.__name__] += 1
        self.rest()

    def join(self) -> None:
        if len(self.boxes) >= NODES_MAX:
            return
        self._number += 1
        name = f"node{self._number}"
        draw = self.random.random()
        if draw < 0.4:
            view = node(
                name, memory_gib=self.random.choice((2, 4, 8, 16, 32)), cpu_count=self.random.choice((2, 4, 8, 16)), kinds=("llamacpp",)
            )
        else:
            card, gib = self.random.choice(
                (*[("NVIDIA GeForce RTX 3090", 24)] * 2, ("NVIDIA RTX A6000", 48), ("NVIDIA GeForce RTX 3060", 12))
            )
            found = cards(self.random.choice((1, 1, 1, 2, 4)), card, gib * GIB, node=name)
            view = node(name, cards=found, memory_gib=64, cpu_count=self.random.choice((8, 16, 32)))
        self.boxes[view.node_id] = Box(view)

    def leave(self) -> None:
        """The link breaks; the machine may come back, with everything stopped."""
        if box := self._any_box(present=True):
            box.view = replace(box.view, connected=False)
            box.engines.clear()
            self.absent_since.setdefault(box.view.node_id, self.now)

    def come_back(self) -> None:
        if box := self._any_box(present=False):
            box.view = replace(box.view, connected=True, state=NodeState.SERVING)
            self.absent_since.pop(box.view.node_id)
            # A new session: what its agent said before is forgotten.
            self.troubles = {key: trouble for key, trouble in self.troubles.items() if key[0] != box.view.node_id}

    def revoke(self) -> None:
        if box := self._any_box():
            del self.boxes[box.view.node_id]
            self.absent_since.pop(box.view.node_id, None)

    def pause(self) -> None:
        if box := self._any_box(present=True):
            box.view = replace(box.view, state=NodeState.PAUSED)
            box.engines.clear()
            self.absent_since.setdefault(box.view.node_id, self.now)

    def deploy(self) -> None:
        model_id = self.random.choice(sorted(CATALOGUE))
        count = None if model_id in {"tiny", "small"} and self.random.random() < 0.5 else self.random.randint(1, 4)
        self.deployments[model_id] = Deployment(model_id, count, self.random.choice(list(ServiceTier)))

    def undeploy(self) -> None:
        if self.deployments:
            del self.deployments[self.random.choice(sorted(self.deployments))]

    def ask(self) -> None:
        """From now on there are always requests for a model."""
        self.busy.add(self.random.choice(sorted(CATALOGUE)))

    def fall_silent(self) -> None:
        if self.busy:
            self.busy.remove(self.random.choice(sorted(self.busy)))

    def refuse(self) -> None:
        """An owner sets a limit, which the pool learns of when it wishes that model there."""
        if box := self._any_box(present=True):
            box.refused.add(self.random.choice(sorted(CATALOGUE)))

    def wait(self) -> None:
        self.now += self.random.choice((30.0, 150.0, 400.0))

    def _any_box(self, *, present: bool | None = None) -> Box | None:
        found = [box for node_id, box in sorted(self.boxes.items()) if present is None or present == (node_id not in self.absent_since)]
        return self.random.choice(found) if found else None

    # Rest.

    def rest(self) -> None:
        """Plans and obeys, with nothing else happening, until nothing changes any more, and long enough for all patience to end."""
        quiet = 0
        self._forget()
        for beat in range(SETTLE_BEATS_MAX):
            before = self.plan
            self.replan()
            self._watch(before)
            self._obey()
            quiet = quiet + 1 if self._is_same(before) else 0
            self.counts.beats += 1
            # At first as fast as agents are, then in long strides until every patience of the planner has ended.
            self.now += BEAT_SECONDS if beat < 20 else LONG_BEAT_SECONDS
            if quiet >= REST_BEATS and beat >= 20 + REST_BEATS + (IDLE_SECONDS / LONG_BEAT_SECONDS):
                return
        raise BrokenRuleError(f"the plan does not come to rest after {self.counts.events}")

    def replan(self) -> None:
        view = self.view()
        new = plan(view)
        self.counts.plans += 1
        self._check_same_again(view, new)
        self._check_fits(new)
        self._check_undisturbed(new)
        self.counts.placements += len(new.replicas.keys() - self.plan.replicas.keys())
        self.plan = new

    def view(self) -> PlanningView:
        statuses = {node_id: tuple(_status(*running) for running in box.engines.values()) for node_id, box in self.boxes.items()}
        ready = {
            engine.replica_id: engine.model.model_id
            for box in self.boxes.values()
            for engine, state in box.engines.values()
            if state is EngineState.READY and engine.replica_id not in self.plan.leaving
        }
        answering = {replica_id: 1 for replica_id, model_id in ready.items() if model_id in self.busy}
        self.used_at |= dict.fromkeys(answering, self.now)
        return PlanningView(
            now_seconds=self.now,
            deployments=tuple(self.deployments.values()),
            catalogue=CATALOGUE,
            nodes={node_id: replace(box.view, engines=statuses[node_id]) for node_id, box in self.boxes.items()},
            sizer=self.sizer,
            standing=self.plan.replicas,
            absent_since=dict(self.absent_since),
            troubles=dict(self.troubles),
            attempt_counts=answering,
            used_at=dict(self.used_at),
            waiting_counts={model_id: 3 for model_id in self.busy if model_id not in ready.values()},
        )

    def _obey(self) -> None:
        for node_id, box in sorted(self.boxes.items()):
            if node_id in self.absent_since:
                continue
            box.obey(self.plan.desired.get(node_id, ()))
            for engine, state in box.engines.values():
                key = (node_id, engine.model.model_id)
                if state is EngineState.REFUSED and key not in self.troubles:
                    self.troubles[key] = Trouble("not allowed here", refused=True)
                    self._forget()

    def _is_same(self, before: Plan) -> bool:
        return {key: replica.phase for key, replica in before.replicas.items()} == {
            key: replica.phase for key, replica in self.plan.replicas.items()
        } and before.desired == self.plan.desired

    # Rules.

    @staticmethod
    def _check_same_again(view: PlanningView, new: Plan) -> None:
        again = plan(replace(view, standing=new.replicas))
        if (again.replicas, again.desired, again.leaving) != (new.replicas, new.desired, new.leaving):
            raise BrokenRuleError(f"the same facts gave another plan: {_difference(new, again)}")

    def _check_fits(self, new: Plan) -> None:
        for node_id, engines in new.desired.items():
            box = self.boxes[node_id]
            running = {replica_id: engine for replica_id, (engine, _) in box.engines.items()}
            _check_box(box.view, {engine.replica_id: engine for engine in engines} | _kept(running, engines))

    def _check_undisturbed(self, new: Plan) -> None:
        for model_id, deployment in self.deployments.items():
            before = [
                replica
                for replica in self.plan.replicas.values()
                if replica.model_id == model_id and replica.phase is Phase.WISHED and replica.replaces is None
            ]
            serving = [replica for replica in before if self._serves(replica)]
            if len(serving) != deployment.replica_count or len(before) != len(serving):
                continue
            for replica in serving:
                after = new.replicas.get(replica.replica_id)
                if after is not None and after.phase is Phase.WISHED:
                    continue
                self._check_reason(replica, new)

    def _serves(self, replica: PlannedReplica) -> bool:
        box = self.boxes.get(replica.node_id)
        ready = box is not None and box.engines.get(replica.replica_id, (None, None))[1] is EngineState.READY
        return ready and replica.node_id not in self.absent_since and (replica.node_id, replica.model_id) not in self.troubles

    def _check_reason(self, gone: PlannedReplica, new: Plan) -> None:
        """A replica of a satisfied deployment is let go: for a better place that answers, or while idle for another's demand."""
        for replica in self.plan.replicas.values():
            if replica.replaces == gone.replica_id and self._serves(replica):
                if replica.sizing.score < 1.2 * gone.sizing.score:
                    raise BrokenRuleError(f"{gone.replica_id} moved for {replica.sizing.score} instead of {gone.sizing.score}")
                self.counts.moves += 1
                return
        idle_seconds = self.now - max(gone.since_seconds, self.used_at.get(gone.replica_id, 0.0))
        is_idle = gone.model_id not in self.busy and idle_seconds >= IDLE_SECONDS
        takers = [one for one in new.replicas.values() if one.node_id == gone.node_id and one.replica_id not in self.plan.replicas]
        if not is_idle or all(taker.model_id == gone.model_id for taker in takers):
            raise BrokenRuleError(f"{gone.replica_id} of a satisfied deployment was let go: idle for {idle_seconds:.0f} s, for {takers}")
        self.counts.displacements += 1

    def _forget(self) -> None:
        self._plans_since_news.clear()
        self._presence.clear()

    def _watch(self, before: Plan) -> None:
        """No plan comes back, and no model goes back and forth."""
        is_now = _shapes(self.plan)
        if not self._plans_since_news or self._plans_since_news[-1] != is_now:
            if is_now in self._plans_since_news:
                raise BrokenRuleError(f"a plan came back without an event: {sorted(is_now)}")
            self._plans_since_news.append(is_now)
        moved_from = {replica.replaces for replica in before.replicas.values()}
        left = {(one.model_id, one.node_id) for one in before.replicas.values() if one.replica_id in moved_from}
        came = {(one.model_id, one.node_id) for one in self.plan.replicas.values() if one.replaces is not None}
        for place in (_places(before) ^ _places(self.plan)) - left - came:
            changes = self._presence.setdefault(place, [])
            changes.append(place in _places(self.plan))
            if len(changes) > 1:
                raise BrokenRuleError(f"{place} changed {changes} without an event")


def _status(engine: DesiredEngine, state: EngineState) -> EngineStatus:
    return EngineStatus(engine.replica_id, engine.model.model_id, state, engine.engine_kind, slot_count=engine.slot_count)


def _kept(running: dict[ReplicaId, DesiredEngine], engines: tuple[DesiredEngine, ...]) -> dict[ReplicaId, DesiredEngine]:
    wished = {engine.replica_id for engine in engines}
    return {replica_id: engine for replica_id, engine in running.items() if replica_id not in wished}


def _check_box(view: NodeView, engines: dict[ReplicaId, DesiredEngine]) -> None:
    taken = [uuid for engine in engines.values() for uuid in engine.shape.card_uuids]
    card_bytes = {card.uuid: card.memory_bytes for card in view.inventory.accelerators}
    machine_bytes = sum(engine.shape.memory_bytes for engine in engines.values() if not engine.shape.card_uuids)
    if len(taken) != len(set(taken)) or not set(taken) <= card_bytes.keys():
        raise BrokenRuleError(f"{view.node_id}: cards {taken} of {sorted(card_bytes)}")
    if machine_bytes > whole_room(view.inventory).memory_bytes:
        raise BrokenRuleError(f"{view.node_id}: {machine_bytes} bytes of {whole_room(view.inventory).memory_bytes} for {sorted(engines)}")
    for engine in engines.values():
        uuids = engine.shape.card_uuids
        room_bytes = sum(card_bytes[uuid] for uuid in uuids) if uuids else engine.shape.memory_bytes
        if engine.model.total_bytes > room_bytes or engine.slot_count < 1:
            raise BrokenRuleError(f"{view.node_id}: {engine.replica_id} has {engine.model.total_bytes} bytes of files for {room_bytes}")


def _places(made: Plan) -> set[tuple[ModelId, NodeId]]:
    here = (Phase.WAITING, Phase.WISHED)
    return {(replica.model_id, replica.node_id) for replica in made.replicas.values() if replica.phase in here}


def _shapes(made: Plan) -> frozenset[tuple[str, ...]]:
    here = (Phase.WAITING, Phase.WISHED)
    return frozenset((one.model_id, one.node_id, *one.sizing.shape.card_uuids) for one in made.replicas.values() if one.phase in here)


def _difference(one: Plan, other: Plan) -> str:
    changed = {key for key in one.replicas.keys() | other.replicas.keys() if one.replicas.get(key) != other.replicas.get(key)}
    return "; ".join(f"{one.replicas.get(key)} -> {other.replicas.get(key)}" for key in sorted(changed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = time.time_ns() % 2**32 if arguments.seed is None else arguments.seed
    churn, started = Churn(seed), time.monotonic()
    broken = ""
    try:
        for _ in range(arguments.steps):
            churn.step()
    except BrokenRuleError as error:
        broken = str(error)
    counts = churn.counts
    events = ", ".join(f"{name} {count}" for name, count in sorted(counts.events.items()))
    print(f"seed {seed}: {counts.events.total()} events ({events}) in {time.monotonic() - started:.0f} s")
    print(f"{counts.plans} plans, {counts.placements} replicas placed, {counts.moves} moved for 20 % or more, ", end="")
    print(f"{counts.displacements} made room while idle")
    print(f"broken rules: {broken or 'none'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
