"""`python -m tests.benchmarks.placement`: how good placement's choices are, and what one costs in pools of ten and of a hundred thousand.

Decides the fleets and what is compared. `regret`: on fixed random fleets of unequal nodes, whose speeds and caches change while requests
come and go, each choice is made from words that are half a second old and from a few candidates; what it costs by the nodes' true state is
set against the best of all nodes by that same state. `cost`: processor time of a whole decision, from a request's bytes with a prompt of
24 KB, and of keeping the books behind it. Exits with 1 where the choices cost more than 1.03 times the best, or the large pool more than
three times the small one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

from potluck_coordinator.domain.cost import cost
from potluck_coordinator.domain.forecast import Forecast, Work
from potluck_coordinator.domain.placement import EXPLORE_SHARE, ReplicaView, is_free, lacks_room, place
from potluck_coordinator.domain.prefixes import CacheState, block_names, cached_tokens
from potluck_coordinator.domain.speeds import Speeds
from potluck_coordinator.gateway.prefix_map import PrefixMap
from potluck_coordinator.gateway.prompt_text import prompt_text
from potluck_coordinator.gateway.roster import WARM_MAX, Roster
from potluck_protocol.values import Endpoint
from tests.support.replicas import MODEL, replica_view

REGRET_MAX: Final = 1.03
COST_RATIO_MAX: Final = 3.0
TELEMETRY_SECONDS: Final = 0.5
CHANGE_SECONDS: Final = 20.0
"""Between two changes of one node's speeds: cards heat up and cool down in tens of seconds."""
NODE_COUNTS: Final = (10, 1000, 100_000)
PROMPT_BYTES: Final = 24 * 1024
COUNTED_DECISIONS: Final = 20
FLEETS: Final = ((12, 0.5), (300, 0.6), (300, 0.85))
"""Nodes, and what is asked of them, as a share of what they could answer one at a time in all their slots."""
CHAT: Final = Endpoint.CHAT_COMPLETIONS
USUAL: Final = Forecast(bytes_per_token=4.0, answer_tokens=200.0, prompt_tokens=800.0)


def random_view(number: int, chance: random.Random) -> ReplicaView:
    """One of an unequal pool: cards of different years, some slow at prompts only, behind lines of different length."""
    power = chance.choice((0.25, 0.5, 1.0, 1.0, 1.0, 2.0))
    prefill = 3000 * power * chance.uniform(0.4, 1.2)
    decode = 60 * power**0.6 * chance.uniform(0.7, 1.1)
    slots = chance.choice((4, 8, 8, 16))
    context = chance.choice((8192, 16384, 32768))
    return replica_view(
        f"node{number:06}",
        slot_count=slots,
        context_length_tokens=context,
        kv_capacity_tokens=int(slots * context * chance.choice((0.3, 0.6, 1.0))),
        speeds=Speeds(prefill, 0.9 / decode, 0.1 / decode * chance.uniform(0.3, 1.5), 9, 9, 0.0),
        round_trip_seconds=chance.uniform(0.005, 0.12),
        losses_per_second=chance.choice((1 / 86_400, 1 / 20_000, 1 / 3600)),
        endpoints=(CHAT,),
    )


@dataclass
class Running:
    """One request under way."""

    number: int
    work: Work
    unread_tokens: float
    begins_at: float
    ends_at: float


def _count(expected: float, chance: random.Random) -> int:
    return int(expected) + (chance.random() < expected % 1)


class World:
    """A fleet whose true state is known: what the gateway counts itself is known to it at once, all else half a second late."""

    def __init__(self, seed: int, node_count: int) -> None:
        self.chance = random.Random(seed)
        self.now = 0.0
        self.true = [random_view(number, self.chance) for number in range(node_count)]
        self.told = list(self.true)
        """By the node's last word."""
        self.running: list[list[Running]] = [[] for _ in self.true]
        self.roster = Roster(lambda _: USUAL)
        self.prefixes = PrefixMap(lambda _: CacheState(capacity_tokens=1e9))
        self.read_at: dict[str, list[int]] = {}
        self.news: list[tuple[float, int, ReplicaView]] = []
        self.throttled: dict[int, float] = {}
        for number in range(node_count):
            self.enter(number)

    def counted(self, number: int, view: ReplicaView) -> ReplicaView:
        """The view with what is under way there, which the gateway knows."""
        running = self.running[number]
        waiting = [one for one in running if one.begins_at > self.now]
        return view._replace(
            in_flight_count=len(running),
            committed_tokens=sum(one.work.tokens for one in running),
            prefill_backlog_tokens=sum(one.unread_tokens for one in waiting),
            prefill_since_seconds=min(
                (one.begins_at - one.unread_tokens / view.speeds.prefill_tokens_per_second for one in waiting), default=0.0
            ),
        )

    def enter(self, number: int) -> None:
        self.roster.enter(self.true[number].node_id, [self.counted(number, self.told[number])])

    def pass_time(self, seconds: float) -> None:
        """Requests end, nodes throttle and recover, and what they were like half a second ago is heard now."""
        self.now += seconds
        for number, running in enumerate(self.running):
            left = [one for one in running if one.ends_at > self.now]
            begun = any(self.now - seconds < one.begins_at <= self.now for one in running)
            if begun or len(left) < len(running):
                self.running[number] = left
                self.enter(number)
        for _ in range(_count(len(self.true) * seconds / CHANGE_SECONDS, self.chance)):
            self._change(self.chance.randrange(len(self.true)))
        while self.news and self.news[0][0] <= self.now:
            _, number, view = self.news.pop(0)
            self.told[number] = view
            self.enter(number)

    def _change(self, number: int) -> None:
        view = self.true[number]
        factor = self.throttled.pop(number, None)
        if factor is None:
            factor = self.throttled[number] = self.chance.uniform(1.0, 1.7)
            speeds = view.speeds
            changed = Speeds(
                speeds.prefill_tokens_per_second / factor, speeds.decode_base_seconds * factor**0.3, speeds.decode_each_seconds, 9, 9, 0.0
            )
        else:
            speeds = view.speeds
            changed = Speeds(
                speeds.prefill_tokens_per_second * factor, speeds.decode_base_seconds / factor**0.3, speeds.decode_each_seconds, 9, 9, 0.0
            )
        self.true[number] = view._replace(speeds=changed)
        self.news.append((self.now + TELEMETRY_SECONDS, number, self.true[number]))

    def dispatch(self, number: int, work: Work, cached: float) -> None:
        terms = cost(self.counted(number, self.true[number]), work, self.now, cached)
        begins_at = self.now + terms.waiting_seconds + terms.reading_seconds
        unread = max(1.0, work.prompt_tokens - cached)
        self.running[number].append(Running(number, work, unread, begins_at, begins_at + terms.writing_seconds))
        self.enter(number)


@dataclass(frozen=True, slots=True)
class Regret:
    """Of one fleet."""

    seed: int
    node_count: int
    decision_count: int
    ratio: float
    """Mean true cost of what was chosen, to that of the best of all."""
    warm_share: float
    busy_share: float


def regret(seed: int, node_count: int = 300, decision_count: int = 1500, load: float = 0.55) -> Regret:
    """Choices of one fleet against the best ones."""
    world = World(seed, node_count)
    chance = world.chance
    chosen_seconds = best_seconds = 0.0
    warm_count = decided = 0
    sessions = [chance.randbytes(2048) for _ in range(node_count)]
    capacity = sum(view.slot_count for view in world.true)
    mean_seconds = statistics.mean(cost(view, Work(800.0, 200.0), 0.0).total_seconds for view in world.true)
    shares = []
    for turn in range(decision_count * 3):
        world.pass_time(chance.expovariate(load * capacity / mean_seconds))
        work, prompt, session = _request(chance, sessions)
        names = block_names(prompt)
        depths = world.prefixes.holders(names, world.now, WARM_MAX)
        warm = {replica_id: cached_tokens(depth, len(prompt), work.prompt_tokens) for replica_id, depth in depths.items()}
        curiosity = chance.random()
        explores = curiosity < EXPLORE_SHARE
        drawn = world.roster.draw(MODEL, work, endpoint=CHAT, tokens_min=1, warm={} if explores else warm, chance=chance.random)
        placement = place(drawn, work, chance.random(), world.now, curiosity=curiosity)
        if placement.chosen is None:
            continue
        number = int(placement.chosen.node_id.removeprefix("node"))
        true_cached = (
            {
                view.replica_id: cached_tokens(world.prefixes.depth(view.replica_id, names, world.now)[0], len(prompt), work.prompt_tokens)
                for view in world.true
            }
            if warm
            else {}
        )
        if turn >= decision_count // 2:
            true_views = (world.counted(other, view) for other, view in enumerate(world.true))
            able = [view for view in true_views if is_free(view) and not lacks_room(view, work)]
            totals = {view.node_id: cost(view, work, world.now, true_cached.get(view.replica_id, 0.0)).total_seconds for view in able}
            mine = cost(
                world.counted(number, world.true[number]), work, world.now, true_cached.get(placement.chosen.replica_id, 0.0)
            ).total_seconds
            best = min([*totals.values(), mine])
            chosen_seconds, best_seconds, decided = chosen_seconds + mine, best_seconds + best, decided + 1
            warm_count += true_cached.get(placement.chosen.replica_id, 0.0) > 0
            shares.append(sum(len(running) for running in world.running) / capacity)
        world.dispatch(number, work, true_cached.get(placement.chosen.replica_id, 0.0))
        world.prefixes.read(placement.chosen.replica_id, names, world.now)
        sessions[session] = prompt if len(prompt) < 40_000 else chance.randbytes(2048)
        if decided >= decision_count:
            break
    return Regret(seed, node_count, decided, chosen_seconds / best_seconds, warm_count / decided, statistics.mean(shares))


def _request(chance: random.Random, sessions: list[bytes]) -> tuple[Work, bytes, int]:
    """The next turn of somebody's conversation: its prompt goes on where the last one ended."""
    session = chance.randrange(len(sessions))
    prompt = sessions[session] + chance.randbytes(int(min(20_000, chance.lognormvariate(6.5, 1.0))))
    return Work(len(prompt) / 4, min(2000.0, chance.lognormvariate(5.0, 0.9))), prompt, session


class Desk:
    """A pool of so many replicas of a few kinds, and requests with a prompt of 24 KB."""

    def __init__(self, node_count: int) -> None:
        chance = self._chance = random.Random(7)
        self._random = chance.random
        self._views = [random_view(number, chance) for number in range(node_count)]
        self._roster = Roster(lambda _: USUAL)
        for view in self._views:
            busy = chance.randrange(view.slot_count + 1)
            self._roster.enter(view.node_id, [view._replace(in_flight_count=busy, committed_tokens=900.0 * busy)])
        self._prefixes = PrefixMap(lambda _: CacheState(capacity_tokens=1e9))
        self._work = Work(PROMPT_BYTES / 4, 200.0)
        text = "".join(chance.choices("abcdefghijklmnop     ", k=PROMPT_BYTES))
        self._body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 300}).encode()
        names = block_names(prompt_text(CHAT, self._body))
        for number in range(WARM_MAX):
            self._prefixes.read(self._views[number].replica_id, names[: 30 + 20 * number], 0.0)

    def decide(self) -> None:
        """From the body to the choice."""
        prompt = prompt_text(CHAT, self._body)
        names = block_names(prompt)
        depths = self._prefixes.holders(names, 1.0, WARM_MAX)
        warm = {replica_id: cached_tokens(depth, len(prompt), self._work.prompt_tokens) for replica_id, depth in depths.items()}
        drawn = self._roster.draw(MODEL, self._work, endpoint=CHAT, tokens_min=6000, warm=warm, chance=self._random)
        assert place(drawn, self._work, self._random(), 1.0).chosen is not None

    def change(self) -> None:
        """One replica gets a request more, or has one less."""
        view = self._chance.choice(self._views)
        self._roster.enter(view.node_id, [view._replace(in_flight_count=self._chance.randrange(view.slot_count))])


def microseconds(work: Any, count: int = 300, tries: int = 9) -> float:
    """Processor time of one, the lowest of several tries: whatever else runs here makes it longer, and nothing makes it shorter."""
    found = []
    for _ in range(tries):
        began = time.process_time_ns()
        for _ in range(count):
            work()
        found.append((time.process_time_ns() - began) / count / 1000)
    return min(found)


@dataclass(frozen=True, slots=True)
class DecisionCost:
    """In a pool of so many."""

    node_count: int
    decide_us: float
    change_us: float


def decision_costs() -> Iterator[DecisionCost]:
    """Of each size of pool."""
    for node_count in NODE_COUNTS:
        desk = Desk(node_count)
        gc.collect()
        gc.freeze()
        yield DecisionCost(node_count, microseconds(desk.decide), microseconds(desk.change))
        gc.unfreeze()


def decide_counted(node_count: int) -> None:
    """Under callgrind: only the decisions are counted, not what builds the pool."""
    desk = Desk(node_count)
    desk.decide()
    subprocess.run(["callgrind_control", "--instr=on", str(os.getpid())], check=True, stdout=subprocess.DEVNULL)
    for _ in range(COUNTED_DECISIONS):
        desk.decide()
    subprocess.run(["callgrind_control", "--instr=off", str(os.getpid())], check=True, stdout=subprocess.DEVNULL)


def instructions(node_count: int) -> int:
    """Of one decision, by callgrind: the same whatever else this machine does."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                *("valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out"),
                *(sys.executable, "-m", "tests.benchmarks.placement", "--counted", str(node_count)),
            ],
            env={**os.environ, "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            check=True,
        )
    collected = re.search(r"Collected : (\d+)", done.stderr)
    assert collected is not None, done.stderr
    return int(collected[1]) // COUNTED_DECISIONS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="fleets to choose in")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument("--instructions", action="store_true", help="count a decision's instructions with valgrind, too: minutes")
    parser.add_argument("--counted", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.counted:
        decide_counted(options.counted)
        return 0
    regrets = [regret(seed, node_count, load=load) for seed in range(options.seeds) for node_count, load in FLEETS]
    costs = list(decision_costs())
    ratios = {"time": costs[-1].decide_us / costs[0].decide_us}
    if options.instructions:
        counts = {node_count: instructions(node_count) for node_count in (NODE_COUNTS[0], NODE_COUNTS[-1])}
        ratios["instructions"] = counts[NODE_COUNTS[-1]] / counts[NODE_COUNTS[0]]
    met = all(each.ratio <= REGRET_MAX for each in regrets) and all(ratio <= COST_RATIO_MAX for ratio in ratios.values())
    if options.json:
        print(
            json.dumps(
                {"regret": [asdict(each) for each in regrets], "cost": [asdict(each) for each in costs], "ratios": ratios, "met": met}
            )
        )
        return 0 if met else 1
    for each in regrets:
        fleet = f"fleet {each.seed}, {each.node_count:>4} nodes, {each.busy_share:4.0%} of slots taken"
        print(f"{fleet}: {each.ratio:.4f} of the best cost over {each.decision_count} choices, {each.warm_share:.0%} warm")
    print(f"the worst fleet {max(each.ratio for each in regrets):.4f}, may be {REGRET_MAX}")
    for one in costs:
        print(f"{one.node_count:>7} nodes: a decision {one.decide_us:.0f} us, a change {one.change_us:.0f} us")
    for name, ratio in ratios.items():
        print(f"{name}: the largest pool costs {ratio:.2f} times the smallest, may be {COST_RATIO_MAX}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
