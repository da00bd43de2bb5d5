"""A pool in which everything comes and goes, planned for at every turn: `python -m tests.property.planning_churn --steps 1000 --seed 1`.

Nodes of a simulated pool obey their wishes step by step: they fetch, start, answer, stop. Random joins, leaves, pauses, refusals, failures
of stages and of cards, memory that others take of cards, wishes and demands hit it, and after each of them the pool is left alone until it
rests. The plan is made by the directory's `Planner` out of what nodes say, and demand is what the gateway's `Refusals` make of requests.
Checked all along, from the outside:

- every plan fits: no card is wished for two engines, nothing is wished beyond a machine's memory or a card's, and engines that still stop
  count as running, stages of groups that broke among them;
- no plan oscillates: a plan made of itself and the same facts is the same; between two news no plan comes back after another, and no
  model leaves a node it came to, or comes back to one it left, but by moves that gain 20 % each;
- a satisfied deployment is not disturbed, but for a place that is worth at least 20 % more, or for the demand of another while it is idle;
  a group that stands and is wished is not given up before single nodes answer in its place, as many at a time as it did, but while it is
  idle for another's demand.

News: an event, a replica that its node turns out not to run, what nodes show of the fit. Prints what happened; ends 1 at a broken rule.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from dataclasses import replace

from potluck_coordinator.directory.planner import Planner, PoolFacts
from potluck_coordinator.domain.catalogue import Deployment, ServiceTier
from potluck_coordinator.domain.fit.corrections import NOTHING_LEARNED
from potluck_coordinator.domain.grouping.words import GroupPhase, ShardGroup
from potluck_coordinator.domain.planning.state import Draft
from potluck_coordinator.domain.planning.troubles import troubles
from potluck_coordinator.domain.planning.words import IDLE_SECONDS, Phase, PlannedReplica, TroubleKey
from potluck_coordinator.gateway.refusals import Refusals
from potluck_protocol.values import AccountId, EngineState, ModelId, NodeId, NodeState, ReplicaId
from tests.property.planning_boxes import FOREIGN_BYTES, Box, BrokenRuleError, random_box
from tests.property.planning_counts import Counts
from tests.property.planning_made import CATALOGUE, Made, difference, outline, places, ready_groups, shapes

NODES_MAX = 14
BEAT_SECONDS = 5.0
REST_BEATS = 4
"""So many beats without a change, and the pool rests."""
SETTLE_BEATS_MAX = 400
LONG_BEAT_SECONDS = 60.0
ASKER = AccountId("asker")


class _Clock:
    """The pool's time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic_seconds(self) -> float:
        return self.now

    def unix_ms(self) -> int:
        return int(self.now * 1000)


class Churn:
    """The simulated pool; `step` is one event and the rest after it. With `spoils`, cards go bad too."""

    def __init__(self, seed: int, *, spoils: bool = False) -> None:
        self.spoils = spoils
        self.random = random.Random(seed)
        self.clock = _Clock()
        self.boxes: dict[NodeId, Box] = {}
        self.deployments: dict[ModelId, Deployment] = {}
        self.busy: set[ModelId] = set()
        self.used_at: dict[ReplicaId, float] = {}
        self.refusals = Refusals(self.clock)
        self.planner = Planner({}, {}, 0, NOTHING_LEARNED, self.clock.now)
        self.made = Made({}, {}, frozenset(), {})
        self.counts = Counts()
        self._deployed: dict[ModelId, Deployment] = {}
        """At the last plan."""
        self._yielded: set[tuple[ModelId, NodeId]] = set()
        """Places that idle replicas left for groups: a group that broke leaves room for others until they are idle."""
        self._gains: dict[ReplicaId, float] = {}
        """Of moves, as it was when they began."""
        self._plans_since_news: list[frozenset[tuple[str, ...]]] = []
        self._presence: dict[tuple[ModelId, NodeId], list[bool]] = {}
        self._peers: dict[NodeId, list[NodeId]] = {}
        self._troubled: frozenset[TroubleKey] = frozenset()
        self._number = 0
        for _ in range(NODES_MAX // 2):
            self.join()

    # Events.

    def step(self) -> None:
        nodes = (
            *[self.join] * 3,
            self.leave,
            *[self.come_back] * 2,
            self.revoke,
            self.pause,
            self.refuse,
            self.take_memory,
            self.break_stage,
            *[self.spoil] * self.spoils,
        )
        wishes = (*[self.deploy] * 3, self.undeploy, *[self.ask] * 2, *[self.fall_silent] * 2, self.wait)
        event = self.random.choice(nodes + wishes)
        event()
        self.counts.events[event.__name__] += 1
        self.rest()

    def join(self) -> None:
        if len(self.boxes) < NODES_MAX:
            self._number += 1
            box = random_box(self.random, self._number)
            self.boxes[box.view.node_id] = box

    def leave(self) -> None:
        """The link breaks; the machine may come back, with everything stopped."""
        if box := self._any_box(present=True):
            box.view = replace(box.view, connected=False)
            box.engines.clear()

    def come_back(self) -> None:
        if box := self._any_box(present=False):
            box.view = replace(box.view, connected=True, state=NodeState.SERVING, epoch=box.view.epoch + 1)

    def revoke(self) -> None:
        if box := self._any_box():
            del self.boxes[box.view.node_id]

    def pause(self) -> None:
        if box := self._any_box(present=True):
            box.view = replace(box.view, state=NodeState.PAUSED)
            box.engines.clear()

    def deploy(self) -> None:
        model_id = self.random.choice(sorted(CATALOGUE))
        count = None if model_id in {"tiny", "small"} and self.random.random() < 0.5 else self.random.randint(1, 4)
        self.deployments[model_id] = Deployment(model_id, count, self.random.choice(list(ServiceTier)))

    def undeploy(self) -> None:
        if self.deployments:
            del self.deployments[self.random.choice(sorted(self.deployments))]

    def ask(self) -> None:
        """From now on there are always requests for a model."""
        self.busy.add(self.random.choice(sorted(self.deployments) or sorted(CATALOGUE)))

    def fall_silent(self) -> None:
        if self.busy:
            self.busy.remove(self.random.choice(sorted(self.busy)))

    def refuse(self) -> None:
        """An owner sets a limit, which the pool learns of when it wishes that model there."""
        if box := self._any_box(present=True):
            box.refused.add(self.random.choice(sorted(CATALOGUE)))

    def take_memory(self) -> None:
        """Others take some of a card's memory, or give it back."""
        if (box := self._any_box(present=True)) and (found := box.view.inventory.accelerators):
            taken = {self.random.choice(found).uuid: self.random.choice(FOREIGN_BYTES)}
            box.view = replace(box.view, card_foreign_bytes={**box.view.card_foreign_bytes, **taken})

    def break_stage(self) -> None:
        """A group's engine fails on one node."""
        stages = [engine for box in self.boxes.values() for engine in box.engines.values() if engine.wish.group is not None]
        if running := [engine for engine in stages if engine.state is EngineState.READY]:
            self.random.choice(running).state = EngineState.BACKING_OFF

    def spoil(self) -> None:
        """A card goes bad, or a machine without any."""
        if box := self._any_box(present=True):
            cards = box.view.inventory.accelerators
            box.spoiled.add(self.random.choice(cards).uuid if cards else box.view.node_id)

    def wait(self) -> None:
        self.clock.now += self.random.choice((30.0, 150.0, 400.0))

    def _any_box(self, *, present: bool | None = None) -> Box | None:
        found = [box for _, box in sorted(self.boxes.items()) if present is None or present == box.is_present]
        return self.random.choice(found) if found else None

    # Rest.

    def rest(self) -> None:
        """Plans and obeys, with nothing else happening, until nothing changes any more, and long enough for all patience to end."""
        quiet = 0
        self._forget()
        for beat in range(SETTLE_BEATS_MAX):
            before = self.made
            self.replan()
            self._watch(before)
            self._obey()
            quiet = quiet + 1 if outline(before) == outline(self.made) else 0
            self.counts.beats += 1
            # At first as fast as agents are, then in long strides until every patience of the planner has ended.
            self.clock.now += BEAT_SECONDS if beat < 20 else LONG_BEAT_SECONDS
            if quiet >= REST_BEATS and beat >= 20 + REST_BEATS + (IDLE_SECONDS / LONG_BEAT_SECONDS):
                return
        raise BrokenRuleError(f"the plan does not come to rest after {self.counts.events}")

    def replan(self) -> None:
        facts, known = self.facts(), (self.planner.corrections, self._troubled)
        new = self._advance(facts)
        self._troubled = frozenset(troubles(self.planner._troubles, self.clock.now))
        if (self.planner.corrections, self._troubled) != known:
            self._forget()
        if (again := self._advance(facts)) != new:
            raise BrokenRuleError(f"the same facts gave another plan: {difference(new, again)}")
        self._note_moves(facts, new)
        self._note_yields(new)
        self._check_fits(new)
        self._check_undisturbed(new)
        self.counts.placements += len(new.replicas.keys() - self.made.replicas.keys())
        self.counts.groups += len(ready_groups(new).items() - ready_groups(self.made).items())
        self.made, self._deployed = new, dict(self.deployments)

    def _advance(self, facts: PoolFacts) -> Made:
        wishes = self.planner.advance(facts, self.clock.now)
        self._peers = {node_id: [peer.node_id for peer in peers] for node_id, peers in wishes.peers.items()}
        self.counts.plans += 1
        return Made(dict(self.planner.replicas), dict(wishes.engines), wishes.leaving, dict(self.planner.groups))

    def facts(self) -> PoolFacts:
        """What nodes and gateway say: who asks is answered where the model is ready, else refused."""
        ready = dict(ready_groups(self.made))
        for box in self.boxes.values():
            wishes = [engine.wish for engine in box.engines.values() if engine.state is EngineState.READY and engine.wish.group is None]
            ready |= {wish.replica_id: wish.model.model_id for wish in wishes if wish.replica_id not in self.made.leaving}
        answering = {replica_id: 1 for replica_id, model_id in ready.items() if model_id in self.busy}
        for model_id in sorted(self.busy.difference(ready.values())):
            self.refusals.note(model_id, ASKER)
        waiting_counts = self.refusals.counts(CATALOGUE)
        self.used_at |= dict.fromkeys(answering, self.clock.now)
        return PoolFacts(
            deployments=tuple(self.deployments.values()),
            catalogue=CATALOGUE,
            nodes={node_id: box.told() for node_id, box in self.boxes.items()},
            attempt_counts=answering,
            used_at=dict.fromkeys(answering, self.clock.now),
            waiting_counts={model_id: count for model_id, count in waiting_counts.items() if model_id in self.deployments},
        )

    def _obey(self) -> None:
        for node_id, box in sorted(self.boxes.items()):
            if not box.is_present:
                continue
            box.obey(self.made.desired.get(node_id, ()))
            box.measure(peer for peer in self._peers.get(node_id, ()) if peer in self.boxes)

    # Rules.

    def _note_moves(self, facts: PoolFacts, new: Made) -> None:
        for replica in new.replicas.values():
            if replica.replaces in new.replicas and replica.replica_id not in self.made.replicas:
                score = Draft(self.planner._view(facts, self.clock.now)).score(new.replicas[replica.replaces])
                self._gains[replica.replica_id] = replica.sizing.score / score

    def _note_yields(self, new: Made) -> None:
        gone = [
            one
            for one in self.made.replicas.values()
            if one.phase is Phase.WISHED and new.replicas.get(one.replica_id, one).phase is Phase.STOPPING
        ]
        idle = [one for one in gone if self._is_idle(one) and self._yields_to_a_group(one, new)]
        self._yielded |= {(one.model_id, one.node_id) for one in idle}

    def _check_fits(self, new: Made) -> None:
        for node_id, engines in new.desired.items():
            box = self.boxes[node_id]
            box.check(engines)
            for engine in engines:
                if engine.replica_id not in self.made.replicas and engine not in self.made.desired.get(node_id, ()):
                    box.check_new(engine)

    def _check_undisturbed(self, new: Made) -> None:
        for model_id, deployment in self.deployments.items():
            before = [
                replica
                for replica in self.made.replicas.values()
                if replica.model_id == model_id and replica.phase is Phase.WISHED and replica.replaces is None
            ]
            serving = [replica for replica in before if self._serves(replica)]
            if len(serving) != deployment.replica_count or len(before) != len(serving):
                continue
            for replica in serving:
                after = new.replicas.get(replica.replica_id)
                if after is None or after.phase is not Phase.WISHED:
                    self._check_reason(replica, new)
        for replica_id, model_id in ready_groups(self.made).items():
            group = self.made.groups[replica_id]
            stands = all(stage.node_id in self.boxes and self.boxes[stage.node_id].is_ready(replica_id) for stage in group.stages)
            is_wished = model_id in self._deployed and self._deployed[model_id] == self.deployments.get(model_id)
            if not stands or not is_wished or replica_id in ready_groups(new) or self._is_answered_instead(group, new):
                continue
            if not self._yields_while_idle(group):
                raise BrokenRuleError(f"{replica_id} stood and was given up: {new.groups.get(replica_id)}")
            self.counts.groups_yielded += 1

    def _yields_while_idle(self, group: ShardGroup) -> bool:
        """Whether nobody uses it and a wish of no lower tier, of another model, is short of replicas."""
        model_id = group.need.model.model_id
        last = max(group.since_seconds, self.used_at.get(group.replica_id, 0.0))
        if model_id in self.busy or self.clock.now - last < IDLE_SECONDS:
            return False
        have = Counter(one.model_id for one in self.made.replicas.values() if one.phase is Phase.WISHED and self._serves(one))
        have.update(ready_groups(self.made).values())
        own = self.deployments[model_id].tier
        return any(
            have[one.model_id] < (one.replica_count or 0) and (one.tier is ServiceTier.DEFAULT or own is ServiceTier.FLEX)
            for one in self.deployments.values()
            if one.model_id != model_id
        )

    def _is_answered_instead(self, group: ShardGroup, new: Made) -> bool:
        """Whether single nodes, each with the group's slots at the least, and the groups that are left answer as often as is wished."""
        model_id, slot_count = group.need.model.model_id, group.need.slot_count
        enough = [one for one in new.replicas.values() if one.model_id == model_id and one.sizing.slot_count >= slot_count]
        alone = sum(1 for one in enough if one.phase is Phase.WISHED and self._serves(one))
        return alone + list(ready_groups(new).values()).count(model_id) >= (self.deployments[model_id].replica_count or 0)

    def _serves(self, replica: PlannedReplica) -> bool:
        box = self.boxes.get(replica.node_id)
        return box is not None and box.is_present and box.is_ready(replica.replica_id)

    def _check_reason(self, gone: PlannedReplica, new: Made) -> None:
        """A replica of a satisfied deployment is let go: for a better place that answers, or while idle for another's demand."""
        for replica in self.made.replicas.values():
            if replica.replaces == gone.replica_id and self._serves(replica):
                if self._gains[replica.replica_id] < 1.2:
                    raise BrokenRuleError(f"{gone.replica_id} moved for {self._gains[replica.replica_id]:.2f} times as much")
                self.counts.moves += 1
                return
        is_idle = self._is_idle(gone)
        takers = [one for one in new.replicas.values() if one.node_id == gone.node_id and one.replica_id not in self.made.replicas]
        yields = self._yields_to_a_group(gone, new)
        if not is_idle or (not yields and all(taker.model_id == gone.model_id for taker in takers)):
            raise BrokenRuleError(f"{gone.replica_id} of a satisfied deployment was let go: idle: {is_idle}, for {takers}")
        self.counts.displacements += 1
        self.counts.yielded += yields and not takers

    def _is_idle(self, replica: PlannedReplica) -> bool:
        last = max(replica.since_seconds, self.used_at.get(replica.replica_id, 0.0))
        return replica.model_id not in self.busy and self.clock.now - last >= IDLE_SECONDS

    def _yields_to_a_group(self, gone: PlannedReplica, new: Made) -> bool:
        """Whether its node may be in groups, and a wish of no lower tier lacks one."""
        if gone.model_id not in self.deployments or gone.node_id not in self.boxes:
            return False
        own = self.deployments[gone.model_id].tier
        groups = Counter(group.need.model.model_id for group in new.groups.values() if group.phase is not GroupPhase.BROKEN)
        return self.boxes[gone.node_id].view.inventory.group_offer is not None and any(
            groups[one.model_id] < (one.replica_count or 0) and (one.tier is ServiceTier.DEFAULT or own is ServiceTier.FLEX)
            for one in self.deployments.values()
            if "vllm" in CATALOGUE[one.model_id].engine_kinds
        )

    def _forget(self) -> None:
        self._plans_since_news.clear()
        self._presence.clear()
        self._yielded.clear()

    def _watch(self, before: Made) -> None:
        """No plan comes back, and no model goes back and forth."""
        is_now = shapes(self.made)
        if not self._plans_since_news or self._plans_since_news[-1] != is_now:
            if is_now in self._plans_since_news:
                raise BrokenRuleError(f"a plan came back without an event: {sorted(is_now)}")
            self._plans_since_news.append(is_now)
        moved_from = {replica.replaces for replica in before.replicas.values()}
        left = {(one.model_id, one.node_id) for one in before.replicas.values() if one.replica_id in moved_from}
        came = {(one.model_id, one.node_id) for one in self.made.replicas.values() if one.replaces is not None}
        for place in (places(before) ^ places(self.made)) - left - came - self._yielded:
            changes = self._presence.setdefault(place, [])
            changes.append(place in places(self.made))
            if len(changes) > 1:
                raise BrokenRuleError(f"{place} changed {changes} without an event")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = time.time_ns() % 2**32 if arguments.seed is None else arguments.seed
    churn, started, broken = Churn(seed, spoils=True), time.monotonic(), ""
    try:
        for _ in range(arguments.steps):
            churn.step()
    except BrokenRuleError as error:
        broken = str(error)
    print(f"seed {seed}: {churn.counts.events.total()} events ({churn.counts.event_words()}) in {time.monotonic() - started:.0f} s")
    print(churn.counts.words())
    print(f"broken rules: {broken or 'none'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
