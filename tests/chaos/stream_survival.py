"""Clients' streams survive the death of the nodes that answer them: real agents, real llama.cpp, the built-in model.

    python -m tests.chaos.stream_survival [--kills COUNT] [--boundaries COUNT] [--seed NUMBER]

First a greedy answer of 64 tokens, whose serving agent is killed (`kill -9`) right after the client got chunk k, for every k, until each
boundary was really hit (the event before the first text travels with it): the stream must end with exactly the text of an undisturbed one
and one `[DONE]`, and each node's owner must have earned by the tokens that came from it, and by no other. Then so many random kills, every
fifth of them a freeze (SIGSTOP), under 16 streams at a time: no client sees a failure, and the longest pause is bounded. The clients of
that half ask as clients do, with an engine that remembers prompts, and for less: on two cores an engine has one. Prints a line of
JSON for each, and a summary; exits 1 on any breach.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
import urllib.error
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, Self

from potluck_coordinator.settings import Settings
from tests.chaos.survival_pool import BRIEF, TOKEN_COUNT, Seen, SurvivalPool, ask, ask_afresh, survival_pool, undisturbed
from tests.support.coordinator_process import runs
from tests.support.pool_processes import audit, wait_until

PROMPT_PRICE, COMPLETION_PRICE, FEE_BASIS_POINTS = 1, 4, 500
STREAM_COUNT = 16
FREEZE_EVERY = 5
GAP_SECONDS_MAX: Mapping[str, float] = {"killed": 2.0, "frozen": 4.0}
PAUSE_SECONDS_MIN = Settings.model_fields["link_grace_ms"].default / 2000
"""Where another node goes on, at the least: half of a broken link's grace."""
TRIES_MAX = 12
"""For one boundary: the bytes behind it may be on their way already."""
THROUGH_SECONDS_MAX = 300.0
"""For all streams that were hit, on the one node that is left."""
SPREAD_SECONDS_MAX = 120.0
RESTART_SECONDS = 2.0
"""Until a killed agent is started again. Services' managers wait for 0.1 to 5 s; a start takes a core for a second, and here the cores that
the clients and the coordinator run on are those of the engines."""
PAUSE_SECONDS_MAX = 2.0
"""Before a fault, by chance: half an answer under this load, so that answers are met wherever they are."""
ORPHAN_SECONDS_MAX = 2.0
"""For the engine of a killed agent to be gone: it would answer nobody, and keep a processor from those that do."""


def net(gross_micro_credits: int) -> int:
    """What an owner earns of it."""
    return gross_micro_credits - gross_micro_credits * FEE_BASIS_POINTS // 10_000


@dataclass(frozen=True, slots=True)
class Cut:
    """One killed agent, and what came of its stream."""

    aimed_at: int
    hit: int
    """How many tokens the killed node is paid for."""
    gap_seconds: float
    breaches: tuple[str, ...]


def cut(survival: SurvivalPool, boundary: int, whole: Seen, prompt_tokens: int) -> Cut:
    """Kills the serving agent right after the client got so many pieces of text; both nodes serve when this returns."""
    before = survival.earned()
    stream = ask_afresh(survival.pool)
    serving = survival.number_of(stream.node_id)
    victim = survival.pool.nodes[serving]
    agent, seen = victim.agent(), Seen()
    for payload in stream.events():
        if seen.take(payload) and len(seen.texts) == boundary:
            agent.kill()
    breaches = seen.breaches(prompt_tokens)
    if seen.text != whole.text:
        breaches.append(f"another text: {seen.text!r}")
    after = survival.earned()
    from_killed, from_other = after[serving] - before[serving], after[1 - serving] - before[1 - serving]
    hit, paid = _paid(from_killed, from_other, seen, prompt_tokens)
    # A link that broke has its grace: where the killed node's tokens end there is a pause.
    gap_seconds = seen.times[hit] - seen.times[hit - 1] if 0 < hit < len(seen.times) else 0.0
    if not paid:
        breaches.append(f"the owners earned {from_killed} and {from_other}")
    elif 0 < hit < TOKEN_COUNT and gap_seconds < PAUSE_SECONDS_MIN:
        breaches.append(f"{hit} tokens were paid to the killed node, and no pause came behind them")
    victim.start_again()
    survival.wait_ready()
    return Cut(boundary, hit, round(gap_seconds, 3), tuple(breaches))


def _paid(from_killed: int, from_other: int, seen: Seen, prompt_tokens: int) -> tuple[int, bool]:
    """How many tokens the killed node was paid for, and whether both were paid for exactly what came from them."""
    told_prompt_tokens = seen.usages[0]["prompt_tokens"] if seen.usages else 0
    for hit in range(TOKEN_COUNT + 1):
        rest = TOKEN_COUNT - hit
        finished_elsewhere = net(prompt_tokens * PROMPT_PRICE + rest * COMPLETION_PRICE) if rest else 0
        if from_killed == net(hit * COMPLETION_PRICE) and from_other == finished_elsewhere:
            return hit, bool(rest) == bool(told_prompt_tokens)
    # It was answered in full before it died.
    whole = net(prompt_tokens * PROMPT_PRICE + TOKEN_COUNT * COMPLETION_PRICE)
    return TOKEN_COUNT, (from_killed, from_other) == (whole, 0)


def every_boundary(survival: SurvivalPool, boundaries: list[int]) -> list[str]:
    """Cuts at each of them; what was broken."""
    whole, prompt_tokens = undisturbed(survival)
    wanted, breaches, cut_count = set(boundaries), [], 0
    while wanted and cut_count < TRIES_MAX * len(boundaries):
        boundary = min(wanted)
        for _ in range(TRIES_MAX):
            done = cut(survival, boundary, whole, prompt_tokens)
            cut_count += 1
            print(json.dumps(asdict(done)), flush=True)
            breaches += [f"boundary {done.hit}: {breach}" for breach in done.breaches]
            wanted.discard(done.hit)
            if boundary not in wanted:
                break
        else:
            breaches.append(f"boundary {boundary} was not hit in {TRIES_MAX} tries")
            wanted.discard(boundary)
    hit_count = len(boundaries) - sum("was not hit" in breach for breach in breaches)
    print(json.dumps({"boundaries": len(boundaries), "hit": hit_count, "cuts": cut_count, "text": whole.text}), flush=True)
    return breaches


class Crowd:
    """So many clients, each with one stream after the other."""

    def __init__(self, survival: SurvivalPool, prompt_tokens: int, stream_count: int) -> None:
        self._survival = survival
        self._prompt_tokens = prompt_tokens
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._running: dict[int, tuple[str, Seen]] = {}
        self.finished: list[Seen] = []
        self.breaches: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(stream_count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(120)

    def running(self) -> list[tuple[str, Seen]]:
        """The node that began each, as far as that is known, and what was seen."""
        with self._lock:
            return list(self._running.values())

    def are_over(self, streams: list[tuple[str, Seen]]) -> bool:
        return not {id(seen) for _, seen in streams} & {id(seen) for _, seen in self.running()}

    def is_spread(self) -> bool:
        """Whether each node gives text to three of eight streams at the least."""
        counts = Counter(node_id for node_id, seen in self.running() if seen.texts)
        return all(8 * counts[node.node_id] >= 3 * len(self._threads) for node in self._survival.pool.nodes)

    def _run(self, number: int) -> None:
        while not self._stopping.is_set():
            seen = Seen(token_count=BRIEF.token_count)
            try:
                with self._lock:
                    self._running[number] = ("", seen)
                stream = ask(self._survival.pool, BRIEF)
                with self._lock:
                    self._running[number] = (stream.node_id, seen)
                for payload in stream.events():
                    seen.take(payload)
            except urllib.error.HTTPError as error:
                seen.error = f"{error.code}: {error.read().decode()}"
            except Exception as error:  # noqa: BLE001 - whatever it is, a client saw it
                seen.error = f"{type(error).__name__}: {error}"
            if not seen.done_count:
                # Whoever asks again at once only takes a processor from those that answer.
                self._stopping.wait(1.0)
            breaches = seen.breaches(self._prompt_tokens)
            with self._lock:
                self._running.pop(number, None)
                self.finished.append(seen)
                self.breaches += breaches


@dataclass(frozen=True, slots=True)
class Fault:
    """One, and the streams that its node was giving text to."""

    fault: str
    streams: int
    texts: tuple[int, ...]
    """How many each had got."""
    gap_seconds: tuple[float, ...]
    """From the shortest."""
    seconds: float
    """Until all streams that were under way were over."""


def strike(survival: SurvivalPool, crowd: Crowd, fault: str, draw: random.Random) -> Fault:
    """Kills or freezes a node that somebody's answer comes from, and returns when all streams that were under way are over.

    A killed agent is started again after a moment, as a machine's service manager does. A frozen one goes on as soon as its streams
    have gone on elsewhere, with an engine that is still at work on them.
    """
    node_id = draw.choice([node_id for node_id, seen in crowd.running() if seen.texts])
    victim = survival.pool.nodes[survival.number_of(node_id)]
    engines = victim.agent().children(recursive=True)
    lost_at = time.monotonic()
    everyone = crowd.running()
    hit = [(seen, len(seen.texts)) for serving, seen in everyone if serving == node_id and seen.texts]
    if fault == "killed":
        victim.agent().kill()
        wait_until(lambda: not any(runs(engine) for engine in engines), ORPHAN_SECONDS_MAX, "the killed agent's engine is gone, too")
        time.sleep(RESTART_SECONDS)
        victim.start_again()
    else:
        victim.agent().suspend()
        wait_until(lambda: all(len(seen.texts) > count + 1 or seen.is_over for seen, count in hit), THROUGH_SECONDS_MAX, "they went on")
        victim.agent().resume()
    # With two nodes a stream that has lost both has nowhere to go: the next fault waits until all of these are through.
    wait_until(partial(crowd.are_over, everyone), THROUGH_SECONDS_MAX, "the streams are over")
    gaps = sorted(round(seen.longest_gap(lost_at), 3) for seen, _ in hit)
    return Fault(fault, len(hit), tuple(count for _, count in hit), tuple(gaps), round(time.monotonic() - lost_at, 1))


def under_load(
    survival: SurvivalPool,
    kill_count: int,
    draw: random.Random,
    stream_count: int = STREAM_COUNT,
    gap_seconds_max: Mapping[str, float] = GAP_SECONDS_MAX,
) -> list[str]:
    """Random kills and freezes under many streams; what was broken."""
    whole, prompt_tokens = undisturbed(survival, BRIEF)
    gaps: dict[str, list[float]] = {"killed": [], "frozen": []}
    with Crowd(survival, prompt_tokens, stream_count) as crowd:
        for number in range(kill_count):
            fault = "frozen" if number % FREEZE_EVERY == FREEZE_EVERY - 1 else "killed"
            survival.wait_ready()
            # A node that has just come back is on trial, and gets one request at a time.
            wait_until(crowd.is_spread, SPREAD_SECONDS_MAX, "streams come from both nodes")
            time.sleep(draw.uniform(0.0, PAUSE_SECONDS_MAX))
            struck = strike(survival, crowd, fault, draw)
            gaps[fault] += struck.gap_seconds
            print(json.dumps(asdict(struck)), flush=True)
    breaches = crowd.breaches
    summary: dict[str, Any] = {"faults": kill_count, "streams": len(crowd.finished), "failures": len(breaches)}
    for fault, seconds in gaps.items():
        p99 = sorted(seconds)[ceil(0.99 * len(seconds)) - 1] if seconds else 0.0
        median = sorted(seconds)[len(seconds) // 2] if seconds else 0.0
        summary[fault] = {"streams": len(seconds), "gap_median_seconds": round(median, 3), "gap_p99_seconds": round(p99, 3)}
        if p99 > gap_seconds_max[fault]:
            breaches.append(f"{fault}: the gap's p99 is {p99:.2f} s, and may be {gap_seconds_max[fault]} s")
    summary["same_text"] = sum(seen.text == whole.text for seen in crowd.finished)
    breaches += [f"another text: {seen.text!r}" for seen in crowd.finished if not seen.error and seen.text != whole.text]
    print(json.dumps(summary), flush=True)
    return breaches


def main() -> int:
    """Both shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="random faults under load; 0 leaves them out")
    parser.add_argument("--streams", type=int, default=STREAM_COUNT, help="at a time, under those")
    parser.add_argument("--boundaries", type=int, default=TOKEN_COUNT, help="so many chunk boundaries, from the first on")
    parser.add_argument("--seed", type=int, default=4, help="of the random faults")
    options = parser.parse_args()
    # Whoever ends it leaves no pool behind; in the background of a script Ctrl-C is ignored.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as folder, survival_pool(Path(folder)) as survival:
        breaches = every_boundary(survival, list(range(1, options.boundaries + 1))) if options.boundaries else []
        if options.kills:
            breaches += under_load(survival, options.kills, random.Random(options.seed), options.streams)
        survival.earned()
        breaches += audit(survival.pool)
    for breach in breaches:
        print(json.dumps({"broken": breach}), flush=True)
    print(json.dumps({"ok": not breaches}), flush=True)
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
