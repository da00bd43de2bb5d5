"""How the pool holds under pressure, in the simulator: goodput beside the peers and an oracle, fairness, a polite account under a flood.

    python -m tests.simulation.pressure            # three seeds, half an hour each
    python -m tests.simulation.pressure --json --seeds 1 --hours 0.1

Prints what comes out beside what is wanted; exit code 1 where something is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import replace
from statistics import fmean

from potluck_coordinator.domain.fairness import COMPLETION_WEIGHT, PROMPT_WEIGHT, service
from potluck_coordinator.simulation.asking import Outcome, Request
from potluck_coordinator.simulation.engine_model import EngineModel
from potluck_coordinator.simulation.figures import jain_index
from potluck_coordinator.simulation.scenario import NodeClass, Scenario, Users
from potluck_coordinator.simulation.scenario_file import load_scenario
from potluck_coordinator.simulation.world import World

WARM_UP_SECONDS = 120.0
ENGINE = EngineModel(2500, 0.02, 0.001, kv_tokens=40_000)
NODE_COUNT = 6
SLOT_COUNT = 36
PROMPT_TOKENS_MAX = 2000
REFUSAL_SECONDS_MAX = 0.05
"""Whoever is refused later than this had been let in to wait."""


def goodput(seeds: range, hours: float) -> dict[str, float]:
    """Of each policy, in requests a second that met the objective, over all seeds."""
    scenario = replace(load_scenario("twelve-unequal"), hours=hours)
    return {policy: fmean(World(scenario, policy, seed).run().goodput_per_second for seed in seeds) for policy in scenario.policies}


def fairness(seed: int, hours: float) -> dict[str, float]:
    """Four accounts that always have requests waiting, with unlike requests: who is given how much, by the live weights' words."""
    kinds = (("short", 4.0, 150, 80), ("long", 2.0, 1200, 400), ("talker", 3.0, 100, 600), ("reader", 3.0, 1800, 50))
    users = tuple(
        Users(name, 1, requests_per_second=4 * rate, prompt_tokens=prompt, answer_tokens=answer, retries_max=0, patience_seconds=3600)
        for name, rate, prompt, answer in kinds
    )
    nodes = (NodeClass("node", NODE_COUNT, ENGINE, slot_count=SLOT_COUNT),)
    world = World(Scenario("backlogged", "", hours, nodes, users, warm_up_seconds=WARM_UP_SECONDS, queue_wait_seconds=30), "ours", seed)
    world.run()
    given, gap = given_and_gap(world.requests, WARM_UP_SECONDS, world.scenario.seconds - WARM_UP_SECONDS)
    # Sheng et al., theorem 4.4: twice the more expensive of the longest prompt and of all that the engines hold.
    most = max(PROMPT_WEIGHT * max(one.prompt_tokens for one in world.requests), COMPLETION_WEIGHT * NODE_COUNT * ENGINE.kv_tokens)
    return {"jain": jain_index(list(given.values())) or 0.0, "gap": gap, "bound": 2 * most}


def given_and_gap(requests: list[Request], begin: float, end: float) -> tuple[dict[str, float], float]:
    """What each account was given in a time, and the largest difference between two of them at any moment of it."""
    events = []
    for request in requests:
        if request.first_token_at is not None:
            events.append((request.first_token_at, request.account_id, service(request.prompt_tokens, 0)))
            tokens = request.delivered_tokens
            for part in range(10):
                at = request.first_token_at + (part + 0.5) / 10 * (request.last_token_at - request.first_token_at)
                events.append((at, request.account_id, service(0, tokens / 10)))
    given: dict[str, float] = defaultdict(float, {str(request.account_id): 0.0 for request in requests})
    gap = 0.0
    for at, account_id, amount in sorted(events):
        if begin <= at < end:
            given[account_id] += amount
            gap = max(gap, max(given.values()) - min(given.values()))
    return dict(given), gap


def politeness(seed: int, hours: float) -> dict[str, float]:
    """The first token of an account that asks now and then: alone, and while another asks ten times as often, more than there is."""
    polite = Users("polite", 1, requests_per_second=1.5, prompt_tokens=400, answer_tokens=200, retries_max=0)
    flooder = Users("flooder", 1, requests_per_second=15, prompt_tokens=400, answer_tokens=200, retries_max=0)
    nodes = (NodeClass("node", NODE_COUNT, ENGINE, slot_count=SLOT_COUNT),)
    found = {}
    for name, users in (("alone", (polite,)), ("flooded", (polite, flooder))):
        scenario = Scenario("polite", "", hours, nodes, users, warm_up_seconds=WARM_UP_SECONDS, queue_wait_seconds=10)
        found[name] = World(scenario, "ours", seed).run().users["polite"].first_token_seconds.p99 or 0.0
    return found


def late_refusals(seed: int, hours: float) -> dict[str, float]:
    """Two engines whose requests share a cache, from cold on asked five times what they can do: who is refused after waiting."""
    engine = EngineModel(2500, 0.03, 0.0015, kv_tokens=6000)
    users = Users("burst", 4, requests_per_second=27, prompt_tokens=240, prompt_spread=1.0, answer_tokens=100, answer_spread=0.8)
    users = replace(users, answer_tokens_max=400, retries_max=0)
    nodes = (NodeClass("node", 2, engine, slot_count=64, context_tokens=2048),)
    world = World(Scenario("burst", "", hours, nodes, (users,), queue_wait_seconds=2), "ours", seed)
    world.run()
    refused = [request.ended_at - request.arrived_at for request in world.requests if request.outcome is Outcome.REFUSED]
    return {"refused": len(refused), "late": sum(seconds > REFUSAL_SECONDS_MAX for seconds in refused) / max(1, len(refused))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hours", type=float, default=0.5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measured(range(1, arguments.seeds + 1), arguments.hours)
    if arguments.json:
        print(
            json.dumps([{"what": what, "value": value, "wanted": words, "holds": holds} for what, value, words, holds in found], indent=2)
        )
    else:
        for what, value, words, holds in found:
            print(f"{'holds ' if holds else 'MISSED'}  {what:62} {value:10.3f}  {words}")
    return 0 if all(holds for *_, holds in found) else 1


def measured(seeds: range, hours: float) -> list[tuple[str, float, str, bool]]:
    """Each figure: what it is, its value, what is wanted, and whether that holds."""
    good = goodput(seeds, hours)
    rows = [(f"goodput a second, {policy}", value, "", True) for policy, value in good.items()]
    for peer, least in (("round-robin", 1.5), ("least-connections", 1.2), ("power-of-two", 1.2), ("oracle", 0.9)):
        ratio = good["ours"] / max(good[peer], 1e-9)
        rows.append((f"goodput, ours over {peer}", min(ratio, 999.0), f">= {least}", ratio >= least))
    fair = [fairness(seed, hours) for seed in seeds]
    jain, gap, bound = min(each["jain"] for each in fair), max(each["gap"] for each in fair), fair[0]["bound"]
    rows += [
        ("Jain's index of four backlogged accounts", jain, ">= 0.99", jain >= 0.99),
        ("largest gap", gap, f"<= {bound:.0f}", gap <= bound),
    ]
    polite = [politeness(seed, hours) for seed in seeds]
    alone, flooded = fmean(each["alone"] for each in polite), fmean(each["flooded"] for each in polite)
    rows.append(("polite account's first token p99, alone, s", alone, "", True))
    rows.append(("the same while another floods at ten times, s", flooded, f"<= {1.5 * alone:.3f}", flooded <= 1.5 * alone))
    late = fmean(late_refusals(seed, hours)["late"] for seed in seeds)
    rows.append(("refusals after 50 ms, at five times the capacity, share", late, "<= 0.01", late <= 0.01))
    return rows


if __name__ == "__main__":
    sys.exit(main())
