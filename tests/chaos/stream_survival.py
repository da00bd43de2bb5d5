"""Clients' streams survive the death of the nodes that answer them: real agents, real llama.cpp, the built-in model.

    python -m tests.chaos.stream_survival [--kills COUNT] [--boundaries COUNT] [--seed NUMBER]

First a greedy answer of 64 tokens, whose serving agent is killed (`kill -9`) right after the client got chunk k, for every k, until each
boundary was really hit (the event before the first text travels with it): the stream must end with exactly the text of an undisturbed one
and one `[DONE]`, and each node's owner must have earned by the tokens that came from it, and by no other. Then so many random kills, every
fifth of them a freeze (SIGSTOP), under 16 streams at a time: no client sees a failure, and the longest pause is bounded. Prints a line of
JSON for each, and a summary; exits 1 on any breach.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any, Self

from potluck import Client
from potluck_protocol.values import EngineState
from tests.support.coordinator_process import CoordinatorProcess
from tests.support.pool_processes import ChatStream, NodeProcess, Pool, audit, catalogue_entry, command, wait_until
from tests.support.safetensors_model import built_in_gguf

MODEL = "smollm2-135m-instruct"
TOKEN_COUNT = 64
PROMPT = "Tell me a short story about a lighthouse."
PROMPT_PRICE, COMPLETION_PRICE, FEE_BASIS_POINTS = 1, 4, 500
STREAM_COUNT = SLOT_COUNT = 16
"""As many slots for each replica: one of the two is to carry all streams while the other is away."""
CONTEXT_TOKENS = 512
FREEZE_EVERY = 5
GAP_SECONDS_MAX: Mapping[str, float] = {"killed": 2.0, "frozen": 4.0}
PAUSE_SECONDS_MIN = 0.5
"""Where another node goes on, at the least: half of a broken link's grace."""
TRIES_MAX = 12
"""For one boundary: the bytes behind it may be on their way already."""
BACK_SECONDS_MAX = 60.0
THROUGH_SECONDS_MAX = 300.0
"""For all streams that were hit, on the one node that is left."""


class SurvivalNode(NodeProcess):
    """A node that serves the built-in model."""

    def _environment(self) -> dict[str, str]:
        return {**super()._environment(), "POTLUCK_NODE_MODELS_ALLOWED": MODEL, "POTLUCK_NODE_SCRIPTED_ENGINE": "false"}


@dataclass
class SurvivalPool:
    """Two nodes of two owners; the operator asks."""

    pool: Pool
    owner_keys: list[str]

    def earned(self) -> list[int]:
        """By each node's owner, once nothing is held any more."""
        with self.pool.client() as client, ExitStack() as stack:
            wait_until(lambda: client.credits().held_micro_credits == 0, 10, "every hold is settled")
            owners = [stack.enter_context(Client(self.pool.url, api_key=key)) for key in self.owner_keys]
            return [owner.credits().earned_micro_credits for owner in owners]

    def ready_nodes(self) -> set[str]:
        with self.pool.client() as client:
            placeable = sum(model.ready_replica_count for model in client.models() if model.model_id == MODEL)
            ready = {
                node.node_id
                for node in client.nodes()
                if node.connection == "connected" and any(engine.state is EngineState.READY for engine in node.engines)
            }
        return ready if placeable >= len(ready) else set()

    def wait_ready(self, count: int = 2) -> None:
        deadline = time.monotonic() + BACK_SECONDS_MAX
        while len(self.ready_nodes()) < count:
            assert time.monotonic() < deadline, f"fewer than {count} nodes serve\n{self.pool.coordinator.log()[-3000:]}"
            # Looking costs what it looks at: two cores carry the engines, too.
            time.sleep(0.3)

    def number_of(self, node_id: str) -> int:
        return [node.node_id for node in self.pool.nodes].index(node_id)


@contextmanager
def survival_pool(folder: Path) -> Iterator[SurvivalPool]:
    """Starts it, waits until both nodes serve, and stops everything."""
    folder.mkdir(parents=True, exist_ok=True)
    catalogue = folder / "catalogue.toml"
    catalogue.write_text(catalogue_entry(MODEL, built_in_gguf(), "llamacpp", CONTEXT_TOKENS, SLOT_COUNT))
    with ExitStack() as stack:
        coordinator = stack.enter_context(CoordinatorProcess(folder / "coordinator", "--catalogue", str(catalogue)))
        coordinator.wait_ready()
        survival = SurvivalPool(Pool(folder, coordinator, []), [])
        for number in range(2):
            made = command(survival.pool, "accounts", "create", f"owner-{number}", "--json")
            account_id = json.loads(made.stdout)["account_id"]
            key = command(survival.pool, "keys", "create", "--account", account_id, "--json")
            survival.owner_keys.append(json.loads(key.stdout)["api_key"])
            token = command(survival.pool, "tokens", "create", "--account", account_id, "--json")
            invite = json.loads(token.stdout)["invite"]
            survival.pool.nodes.append(stack.enter_context(SurvivalNode(folder / f"node-{number}", invite, _own_core(number))))
        survival.wait_ready()
        yield survival


def _own_core(number: int) -> tuple[str, ...]:
    """Each node has a part of the machine to itself, as two machines would: engines that share cores wait for each other's threads."""
    cores = sorted(os.sched_getaffinity(0))
    return ("taskset", "-c", str(cores[number % len(cores)]))


@dataclass
class Seen:
    """What one client saw of one stream."""

    texts: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    roles: int = 0
    done_count: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    usages: list[dict[str, int]] = field(default_factory=list)
    error: str | None = None

    def take(self, payload: str) -> bool:
        """Notes one event; whether it brought text."""
        if payload == "[DONE]":
            self.done_count += 1
            return False
        event: dict[str, Any] = json.loads(payload)
        if "error" in event:
            self.error = json.dumps(event["error"])
            return False
        self.ids.add(event["id"])
        if event.get("usage"):
            self.usages.append(event["usage"])
        (choice,) = event["choices"] or [{}]
        delta = choice.get("delta") or {}
        self.roles += "role" in delta
        if choice.get("finish_reason"):
            self.finish_reasons.append(choice["finish_reason"])
        if text := delta.get("content"):
            self.texts.append(text)
            self.times.append(time.monotonic())
            return True
        return False

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def longest_gap(self, since: float) -> float:
        """The longest pause between two pieces of text that ends after a moment."""
        return max((after - before for before, after in pairwise(self.times) if after > since), default=0.0)

    def breaches(self, prompt_tokens: int) -> list[str]:
        """What is wrong with it, whatever its text."""
        found = [f"the client saw {self.error}"] if self.error else []
        if self.done_count != 1:
            found.append(f"{self.done_count} times [DONE]")
        if len(self.ids) != 1 or self.roles != 1 or self.finish_reasons != ["length"]:
            found.append(f"ids {len(self.ids)}, roles {self.roles}, ends {self.finish_reasons}")
        if len(self.texts) != TOKEN_COUNT:
            found.append(f"{len(self.texts)} pieces of text")
        if len(self.usages) != 1 or self.usages[0]["completion_tokens"] != TOKEN_COUNT:
            found.append(f"usage {self.usages}")
        elif prompt_tokens and self.usages[0]["prompt_tokens"] not in {prompt_tokens, 0}:
            found.append(f"usage {self.usages}, of {prompt_tokens} prompt tokens")
        return found


def ask(pool: Pool) -> ChatStream:
    """Without the engine's memory of earlier prompts: what it reads with its help it rounds differently, also where nothing fails."""
    return pool.stream(
        model=MODEL,
        max_tokens=TOKEN_COUNT,
        temperature=0,
        cache_prompt=False,
        messages=[{"role": "user", "content": PROMPT}],
        stream_options={"include_usage": True},
    )


def undisturbed(survival: SurvivalPool) -> tuple[Seen, int]:
    """An answer that nothing happens to, and its prompt's tokens."""
    seen = Seen()
    for payload in ask(survival.pool).events():
        seen.take(payload)
    assert not seen.breaches(0), seen
    return seen, seen.usages[0]["prompt_tokens"]


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
    stream = ask(survival.pool)
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

    def _run(self, number: int) -> None:
        while not self._stopping.is_set():
            seen = Seen()
            try:
                with self._lock:
                    self._running[number] = ("", seen)
                stream = ask(self._survival.pool)
                with self._lock:
                    self._running[number] = (stream.node_id, seen)
                for payload in stream.events():
                    seen.take(payload)
            except Exception as error:  # noqa: BLE001 - whatever it is, a client saw it
                seen.error = f"{type(error).__name__}: {error}"
            breaches = seen.breaches(self._prompt_tokens)
            with self._lock:
                self._running.pop(number, None)
                self.finished.append(seen)
                self.breaches += breaches


def under_load(
    survival: SurvivalPool,
    kill_count: int,
    draw: random.Random,
    stream_count: int = STREAM_COUNT,
    gap_seconds_max: Mapping[str, float] = GAP_SECONDS_MAX,
) -> list[str]:
    """Random kills and freezes under many streams; what was broken."""
    whole, prompt_tokens = undisturbed(survival)
    gaps: dict[str, list[float]] = {"killed": [], "frozen": []}
    with Crowd(survival, prompt_tokens, stream_count) as crowd:
        for number in range(kill_count):
            fault = "frozen" if number % FREEZE_EVERY == FREEZE_EVERY - 1 else "killed"
            time.sleep(draw.uniform(0.0, 1.0))
            wait_until(lambda: any(seen.texts for _, seen in crowd.running()), BACK_SECONDS_MAX, "a stream has begun")
            node_id = draw.choice([node_id for node_id, seen in crowd.running() if seen.texts])
            victim = survival.pool.nodes[survival.number_of(node_id)]
            lost_at = time.monotonic()
            everyone = crowd.running()
            hit = [seen for serving, seen in everyone if serving == node_id and seen.texts]
            victim.agent().send_signal(signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
            # With two nodes a stream that has lost both has nowhere to go: the next fault waits until all of these are through.
            wait_until(partial(crowd.are_over, everyone), THROUGH_SECONDS_MAX, "the streams are over")
            victim.start_again() if fault == "killed" else victim.agent().send_signal(signal.SIGCONT)
            survival.wait_ready()
            found = [seen.longest_gap(lost_at) for seen in hit]
            gaps[fault] += found
            print(json.dumps({"fault": fault, "streams": len(hit), "gap_seconds_max": round(max(found, default=0.0), 3)}), flush=True)
    breaches = crowd.breaches
    summary: dict[str, Any] = {"faults": kill_count, "streams": len(crowd.finished), "failures": len(breaches)}
    for fault, seconds in gaps.items():
        p99 = sorted(seconds)[ceil(0.99 * len(seconds)) - 1] if seconds else 0.0
        summary[fault] = {"streams": len(seconds), "gap_p99_seconds": round(p99, 3)}
        if p99 > gap_seconds_max[fault]:
            breaches.append(f"{fault}: the gap's p99 is {p99:.2f} s, and may be {gap_seconds_max[fault]} s")
    # Of answers in batches the last bits depend on what else is in the batch, also where nothing fails.
    summary["same_text"] = sum(seen.text == whole.text for seen in crowd.finished)
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
