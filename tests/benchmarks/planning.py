"""`python -m tests.benchmarks.planning --nodes 10 100 1000 --deployments 20`: what one plan costs, by the size of the pool.

Decides the pool: boxes of one to four RTX 3090, machines without cards, sites, owners, groups, and wishes for about half of what there is;
and, for plans in which much changes at once, one of equal boxes with a card each. Everything goes through the directory's `Planner`, as in
a coordinator. Milliseconds are processor time of the planning thread, and those of `loop` the longest that an event loop beside it waited
for its turn; garbage is collected as in the directory's process. `--check` compares each plan with one that remembers no fit.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from potluck_coordinator.directory import planner as planner_module
from potluck_coordinator.directory.directory import spare_collections
from potluck_coordinator.directory.planner import Planner, PoolFacts, Wishes
from potluck_coordinator.domain.catalogue import CatalogueEntry, Deployment, ServiceTier
from potluck_coordinator.domain.fit.architecture import ModelArchitecture
from potluck_coordinator.domain.fit.corrections import NOTHING_LEARNED
from potluck_coordinator.domain.node_view import NodeView
from potluck_coordinator.domain.planning.sizing import Sizer
from potluck_coordinator.domain.planning.words import IDLE_SECONDS
from potluck_protocol.values import AccountId, EngineState, GroupOffer, ModelFile, ModelId, NodeId, PeerMeasurement
from tests.support.planning import AWQ, GIB, card_entry, cards, machine_entry, node, status

NOW_SECONDS: Final = 1000.0
SITE_NODES: Final = 10
OFFER_SHARE: Final = 0.2
"""Of the sites: their owners let boxes be grouped."""
CPU_SHARE: Final = 0.25
HUGE: Final = ModelArchitecture("huge", 100, 12_288, 96, 8, 128, 40_960, 128_256, 8192, quantization=AWQ)
"""Of 190 billion parameters in 4 bits, more than four RTX 3090 hold."""
SLOW_SECONDS: Final = 60.0
"""A step that took longer is said, and larger pools are left out."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one step took."""

    milliseconds: float
    peak_bytes: int
    result: Any


def pool(node_count: int, seed: int) -> dict[NodeId, NodeView]:
    """Unequal nodes, the same ones for the same seed."""
    draw = random.Random(seed)
    return {view.node_id: view for view in (_node(draw, number) for number in range(node_count))}


def _node(draw: random.Random, number: int) -> NodeView:
    name, site = f"node{number:05}", number // SITE_NODES
    owner = f"owner{draw.randrange(1 + number // 3)}"
    if draw.random() < CPU_SHARE:
        memory_gib = draw.choice((8, 16, 32, 64)) * draw.choice((0.96, 0.97, 0.98))
        return node(name, memory_gib=memory_gib, cpu_count=draw.choice((4, 8, 16)), kinds=("llamacpp",), owner=owner)
    card_count = draw.choice((1, 1, 1, 1, 2, 2, 3, 4))
    offers = random.Random(f"site {site}").random() < OFFER_SHARE
    made = node(name, cards=cards(card_count, node=name), memory_gib=64 * draw.choice((0.96, 0.98)), cpu_count=16, owner=owner)
    held = {card.uuid: draw.randrange(400) << 20 for card in made.inventory.accelerators[:1] if draw.random() < 0.3}
    if not offers:
        return replace(made, card_foreign_bytes=held, disk_free_bytes=500 * GIB)
    offer = GroupOffer(f"site{site}", f"10.{site // 250}.{site % 250}.{1 + number % SITE_NODES}", 29_600)
    peers = [NodeId(f"node{site * SITE_NODES + other:05}") for other in range(SITE_NODES) if site * SITE_NODES + other != number]
    return replace(
        made,
        owner_account_id=AccountId(f"site{site}"),
        inventory=replace(made.inventory, group_offer=offer),
        peer_measurements={peer: PeerMeasurement(peer, 200, 1_000_000_000) for peer in peers},
        card_foreign_bytes=held,
    )


def catalogue() -> tuple[CatalogueEntry, ...]:
    """One model of each kind; wishes repeat them under other names."""
    return (
        card_entry("8b"),
        machine_entry("small", 3 * GIB),
        card_entry("32b"),
        card_entry("8b", model_id="8b-gguf", engine_kinds=("llamacpp",), slot_count=2),
        card_entry("70b"),
        machine_entry("middling", 7 * GIB),
    )


def wishes(node_count: int, deployment_count: int) -> tuple[dict[ModelId, CatalogueEntry], tuple[Deployment, ...]]:
    """A model on every node, one that only groups hold, and others for about half of the pool."""
    kinds = catalogue()
    file = ModelFile(ModelId("huge"), f"hf:org/huge@{'a' * 40}", "model.safetensors", "0" * 64, int(HUGE.weight_bytes))
    huge = card_entry("70b", model_id="huge", architecture=HUGE, slot_count=2, file=file)
    entries = [machine_entry("tiny"), huge] + [
        replace(kind, model_id=ModelId(f"{kind.model_id}-{number}"), file=replace(kind.file, model_id=ModelId(f"{kind.model_id}-{number}")))
        for number in range(max(0, deployment_count - 2))
        if (kind := kinds[number % len(kinds)]).file is not None
    ]
    each = max(1, node_count // (2 * max(1, deployment_count - 2)))
    deployments = [
        Deployment(ModelId("tiny"), None, ServiceTier.FLEX),
        Deployment(ModelId("huge"), 1),
        *(Deployment(entry.model_id, each, list(ServiceTier)[number % 2]) for number, entry in enumerate(entries[2:])),
    ]
    return {entry.model_id: entry for entry in entries}, tuple(deployments[:deployment_count])


class Run:
    """One pool's planner, step by step."""

    def __init__(self, node_count: int, deployment_count: int, seed: int, *, allocations: bool) -> None:
        self.planner = Planner({}, {}, 0, NOTHING_LEARNED, NOW_SECONDS)
        entries, deployments = wishes(node_count, deployment_count)
        self.facts = PoolFacts(deployments, entries, pool(node_count, seed))
        self.now = NOW_SECONDS
        self._allocations = allocations

    def advance(self) -> Cost:
        self.now += 1.0
        return self.cost(lambda: self.planner.advance(self.facts, self.now))

    def cost(self, step: Callable[[], Any]) -> Cost:
        if self._allocations:
            tracemalloc.start()
        began = time.thread_time()
        result = step()
        milliseconds = 1000 * (time.thread_time() - began)
        peak_bytes = tracemalloc.get_traced_memory()[1] if self._allocations else 0
        tracemalloc.stop()
        return Cost(milliseconds, peak_bytes, result)

    def obey(self, wished: Wishes) -> None:
        """Every node runs what is wished of it, and says so."""
        nodes = {
            node_id: replace(
                view,
                engines=tuple(
                    status(
                        engine.replica_id,
                        engine.model.model_id,
                        EngineState.READY,
                        group_id=engine.group.group_id if engine.group else "",
                        group_generation=engine.group.generation if engine.group else 0,
                    )
                    for engine in wished.engines.get(node_id, ())
                ),
            )
            for node_id, view in self.facts.nodes.items()
        }
        self.facts = replace(self.facts, nodes=nodes)

    def settle(self) -> None:
        for _ in range(4):
            self.obey(self.advance().result)

    def change(self, **changes: Any) -> None:
        self.facts = replace(self.facts, **changes)


def steps(run: Run, seed: int) -> Mapping[str, Cost]:
    """Each step's cost, in the order in which they happen."""
    found = {"whole": run.advance()}
    run.obey(found["whole"].result)
    run.settle()
    found["steady"] = run.advance()
    run.change(nodes=run.facts.nodes | pool(len(run.facts.nodes) + 1, seed + 1) | run.facts.nodes)  # type: ignore[operator]
    found["join"] = run.advance()
    run.obey(found["join"].result)
    run.settle()
    gone = min(replica.node_id for replica in run.planner.replicas.values())
    run.change(nodes={node_id: view for node_id, view in run.facts.nodes.items() if node_id != gone})
    found["leave"] = run.advance()
    run.obey(found["leave"].result)
    run.settle()
    *rest, last = run.facts.deployments
    run.change(deployments=(*rest, replace(last, replica_count=(last.replica_count or 0) + 1)))
    found["demand"] = run.advance()
    found["explain"] = run.cost(lambda: run.planner.explain(run.facts, rest[-1].model_id, run.now))
    found["standings"] = run.cost(lambda: run.planner.standings(run.facts, run.now))
    return found


def changes_at_once(node_count: int, seed: int) -> Mapping[str, Cost]:
    """Plans of equal boxes, in which much changes at once, or which all say that they stand in one place."""
    boxes = {view.node_id: view for view in (node(f"node{number:05}", cards=1, owner=f"owner{number}") for number in range(node_count))}
    entries, _ = wishes(node_count, 2)
    entries |= {entry.model_id: entry for entry in (card_entry("8b"), card_entry("8b", model_id="other"))}
    everywhere = Deployment(ModelId("8b"), None)

    def run(*deployments: Deployment) -> Run:
        fresh = Run(node_count, 0, seed, allocations=False)
        fresh.change(nodes=boxes, catalogue=entries, deployments=deployments)
        return fresh

    found = {"half of the nodes get a replica": run(Deployment(ModelId("8b"), node_count // 2)).advance()}
    idle = run(everywhere)
    idle.settle()
    idle.now += IDLE_SECONDS
    idle.change(deployments=(everywhere, Deployment(ModelId("other"), node_count // 4)))
    found["a quarter as many are wished for in the place of idle ones"] = idle.advance()
    near = run(Deployment(ModelId("huge"), 1))
    offers = (GroupOffer("home", f"10.0.{number // 250}.{1 + number % 250}", 29_600) for number in range(node_count))
    near.change(
        nodes={
            box.node_id: replace(box, inventory=replace(box.inventory, group_offer=offer))
            for box, offer in zip(boxes.values(), offers, strict=True)
        }
    )
    found["all name one site and nobody trusts"] = near.advance()
    return found


async def longest_wait_ms(run: Run) -> float:
    """The longest that a loop waits for its turn while a whole plan is made beside it, as `directory.nodes` has it made."""
    longest, planning = 0.0, asyncio.create_task(asyncio.to_thread(run.advance))
    while not planning.done():
        began = time.monotonic()
        await asyncio.sleep(0.001)
        longest = max(longest, time.monotonic() - began - 0.001)
    await planning
    return 1000 * longest


class Forgetful(Sizer):
    """Asks the fit each time anew."""

    def size_on_kind(self, *arguments: Any) -> Any:
        self._known.clear()
        return super().size_on_kind(*arguments)


def is_same_without_memory(node_count: int, deployment_count: int, seed: int) -> bool:
    """Whether a planner that remembers no fit makes the same of a pool."""
    made: list[Any] = []
    for sizer in (Sizer, Forgetful):
        planner_module.Sizer = sizer  # type: ignore[misc]
        run = Run(node_count, deployment_count, seed, allocations=False)
        made.append([run.advance().result.engines, run.advance().result.engines])
    planner_module.Sizer = Sizer  # type: ignore[misc]
    return bool(made[0] == made[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000, 3000])
    parser.add_argument("--deployments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--allocations", action="store_true", help="also trace memory, which makes everything slower")
    parser.add_argument("--check", action="store_true", help="compare with plans that remember no fit; slow from 100 nodes on")
    arguments = parser.parse_args()
    spare_collections()
    differs = False
    for node_count in arguments.nodes:
        began = time.monotonic()
        run = Run(node_count, arguments.deployments, arguments.seed, allocations=arguments.allocations)
        found = steps(run, arguments.seed)
        waited = asyncio.run(longest_wait_ms(Run(node_count, arguments.deployments, arguments.seed, allocations=False)))
        words = ", ".join(f"{name} {cost.milliseconds:.1f}" for name, cost in found.items())
        print(f"{node_count} nodes, {len(run.planner.replicas)} replicas, {len(run.planner.groups)} groups: ms {words}; loop {waited:.1f}")
        print("; ".join(f"{name}: ms {cost.milliseconds:.1f}" for name, cost in changes_at_once(node_count, arguments.seed).items()))
        if arguments.allocations:
            print(", ".join(f"{name} {cost.peak_bytes / 1e6:.1f} MB at most" for name, cost in found.items()))
        if arguments.check:
            same = is_same_without_memory(node_count, arguments.deployments, arguments.seed)
            differs = differs or not same
            print(f"without memory of fits: {'the same' if same else 'ANOTHER PLAN'}")
        sys.stdout.flush()
        if time.monotonic() - began > SLOW_SECONDS:
            print("larger pools are left out")
            break
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())
