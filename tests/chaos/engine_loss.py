"""An engine dies, hangs, does not fit, keeps crashing, or dies of a request: what its node does, and what clients see of it.

    python -m tests.chaos.engine_loss

prints a line for each fault and exits 1 if a bound is broken. The engines are real llama.cpp processes with a tiny model. Only of the
request that kills, the scripted engine dies: none is known for llama.cpp. It takes three minutes, most of them waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import urllib.error
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from potluck_node.domain.breaker import CRASHES_MAX, OPEN_FIRST_SECONDS
from tests.support.coordinator_process import wait_until
from tests.support.pool_processes import LLAMACPP_MODEL, MODEL, ChatStream, NodeProcess, Pool, audit, running_pool

CONTEXT_TOKENS = 2048
TOKENS_BEFORE = 50
ANSWER_TOKENS = CONTEXT_TOKENS - 200
"""Two seconds of the tiny model's, more or less."""
TRIES_MAX = 5
"""To meet an answer on its way: where the machine has other work, the whole of it may have gone out before the fault comes."""
KNOWN_SECONDS_MAX = {"killed": 5.0, "stopped": 35.0}
BACK_SECONDS_MAX = 20.0
IDLE_SECONDS = 10.0
IDLE_CPU_SHARE_MAX = 0.2
"""Of one processor, for an agent that has nothing to do but its beats."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One fault: its figures, and the promises that it broke."""

    fault: str
    figures: dict[str, Any]
    broken: tuple[str, ...]


def engine_pids(node: NodeProcess, kind: str = "llamacpp") -> list[int]:
    """The engine processes of one kind that live on the node."""
    found = []
    for child in node.agent().children():
        try:
            if f"{kind}_server" in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def new_engine_pid(node: NodeProcess, old_pid: int, kind: str = "llamacpp") -> int:
    """The engine that came after the old one, once it is there."""
    wait_until(
        lambda: any(pid != old_pid for pid in engine_pids(node, kind)), BACK_SECONDS_MAX + OPEN_FIRST_SECONDS, "there is another engine"
    )
    return next(pid for pid in engine_pids(node, kind) if pid != old_pid)


def long_answer(pool: Pool) -> ChatStream:
    return pool.stream(model=LLAMACPP_MODEL, max_tokens=ANSWER_TOKENS, ignore_eos=True, stream_options={"include_usage": True})


def serves(pool: Pool, **fields: Any) -> bool:
    """Whether a whole answer comes."""
    stream = pool.stream(**{"model": LLAMACPP_MODEL, "max_tokens": 8, **fields})
    stream.read_to_end()
    return stream.done and stream.token_count > 0


def back_seconds(pool: Pool, node: NodeProcess, old_pid: int) -> float:
    """Until another engine is there and has answered a client."""
    began = time.monotonic()
    new_engine_pid(node, old_pid)
    pool.wait_connected(LLAMACPP_MODEL)
    assert serves(pool)
    return time.monotonic() - began


@dataclass(frozen=True, slots=True)
class Loss:
    """An answer whose engine met a fault."""

    pid: int
    stream: ChatStream
    known_seconds: float
    completion_tokens: int
    """By the usage record; 0 where none came."""

    @property
    def was_over(self) -> bool:
        """All of it had been made before the fault, of which it then says nothing. A shorter one without an error is none of these."""
        return self.stream.done and self.completion_tokens == ANSWER_TOKENS


def lose_once(pool: Pool, order: signal.Signals) -> Loss:
    (pid,) = engine_pids(pool.nodes[0])
    stream = long_answer(pool)
    stream.read_tokens(TOKENS_BEFORE)
    os.killpg(pid, order)
    began = time.monotonic()
    completion_tokens = 0
    for payload in stream.events():
        if '"usage":{' in payload:
            completion_tokens = json.loads(payload)["usage"]["completion_tokens"]
    return Loss(pid, stream, time.monotonic() - began, completion_tokens)


def lose(pool: Pool, fault: str, order: signal.Signals) -> Outcome:
    """The engine is killed, or stopped and so hangs, in the middle of an answer."""
    node = pool.nodes[0]
    tries = 0
    while (loss := lose_once(pool, order)).was_over and tries < TRIES_MAX:
        tries += 1
        # Nobody waits for anything of a stopped engine, so nobody would end it.
        with suppress(ProcessLookupError):
            os.killpg(loss.pid, signal.SIGKILL)
        back_seconds(pool, node, loss.pid)
    came_back_seconds = back_seconds(pool, node, loss.pid)
    error = loss.stream.error or {}
    broken = []
    if loss.known_seconds > KNOWN_SECONDS_MAX[fault]:
        broken.append(f"the client knew after {loss.known_seconds:.1f} s")
    if loss.stream.done or error.get("code") != "engine_failed" or "the engine ended" not in error.get("message", ""):
        ending = "whole" if loss.stream.done else "cut off"
        told = f"{ending} after {loss.stream.token_count} texts and {loss.completion_tokens} tokens: {error}"
        broken.append(f"the answer did not end with a clear error but {told}")
    if came_back_seconds > BACK_SECONDS_MAX:
        broken.append(f"it served again after {came_back_seconds:.1f} s")
    if psutil.pid_exists(loss.pid):
        broken.append("the old engine still lives")
    figures = {
        "seconds_until_the_client_knew": round(loss.known_seconds, 2),
        "seconds_until_it_served_again": round(came_back_seconds, 2),
        "told": error.get("message"),
        "answers_that_were_over_before": tries,
    }
    return Outcome(fault, figures, (*broken, *audit(pool)))


def kill(pool: Pool) -> Outcome:
    return lose(pool, "killed", signal.SIGKILL)


def stop(pool: Pool) -> Outcome:
    return lose(pool, "stopped", signal.SIGSTOP)


def answer_to(pool: Pool, **fields: Any) -> tuple[int, dict[str, Any]]:
    """Status and error of a request that gets none of its answer, or only a part."""
    try:
        stream = pool.stream(**fields)
        stream.read_to_end()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]
    return 200, stream.error or {}


def kill_by_request(pool: Pool) -> Outcome:
    """The same request twice, each time the end of its engine; then nobody runs it again, and everything else still is."""
    node = pool.nodes[0]
    lethal = {"model": MODEL, "scripted": {"exit_after_tokens": 3, "tokens": ["last", "words"]}}
    told, broken = [], []
    for _ in range(2):
        (pid,) = engine_pids(node, "scripted")
        told.append(answer_to(pool, **lethal)[1].get("code"))
        new_engine_pid(node, pid, "scripted")
        pool.wait_connected(MODEL)
    (pid,) = engine_pids(node, "scripted")
    status, error = answer_to(pool, **lethal)
    told.append(error.get("code"))
    if told != ["engine_failed", "request_refused", "request_refused"] or status != 422:
        broken.append(f"clients were told {told}, at last with status {status}")
    if engine_pids(node, "scripted") != [pid]:
        broken.append("a third engine died of it")
    if not serves(pool, model=MODEL, scripted={"token_count": 3}):
        broken.append("another request was not answered")
    return Outcome("killed by a request", {"told": told, "status": status, "engines_lost": 2}, tuple(broken))


def failures_told(node: NodeProcess) -> list[str]:
    """The last line of each failure of the llama.cpp engine that the agent logged."""
    lines = [json.loads(line) for line in node.log().splitlines() if '"engine_failed"' in line]
    return [line["failure"].splitlines()[-1] for line in lines if line.get("model_id") == LLAMACPP_MODEL]


def starve(pool: Pool) -> Outcome:
    """The engine's first start asks for more memory than fits; the pool is up, so a later one did not."""
    steps = [line.partition("next: ")[2].partition(" of")[0] for line in failures_told(pool.nodes[0]) if line.startswith("out of memory")]
    with pool.client() as client:
        engines = [engine for listed in client.nodes() for engine in listed.engines if engine.model_id == LLAMACPP_MODEL]
    used = [engine.memory_utilization_percent for engine in engines]
    broken = [] if (steps, used) == (["90 %", "85 %"], [85]) else [f"the steps were {steps}, and it runs with {used}"]
    if not serves(pool):
        broken.append("it does not serve")
    return Outcome("out of memory", {"stepped_to": steps, "runs_with_percent": used}, tuple(broken))


def crash_on_and_on(pool: Pool) -> Outcome:
    """Five crashes of its own making open the breaker; a minute later one start is tried, and this one stays."""
    node = pool.nodes[0]
    crashed_at, ready_pids = [], []
    for _ in range(CRASHES_MAX):
        pool.wait_connected(LLAMACPP_MODEL)
        (pid,) = engine_pids(node)
        ready_pids.append(pid)
        os.kill(pid, signal.SIGSEGV)
        crashed_at.append(time.monotonic())
        wait_until(lambda pid=pid: not psutil.pid_exists(pid), 10, "the engine is gone")
        # The pool hears of it before it is asked whether there is another.
        wait_until(lambda: pool.connected_count(LLAMACPP_MODEL) == 0, 10, "the pool knows")
    wait_until(lambda: f"{CRASHES_MAX} crashes within" in node.status_words(), 10, "the breaker is open")
    words = next(line for line in node.status_words().splitlines() if f"{CRASHES_MAX} crashes within" in line)
    agent = node.agent()
    before = agent.cpu_times()
    time.sleep(IDLE_SECONDS)
    after = agent.cpu_times()
    cpu_share = (after.user + after.system - before.user - before.system) / IDLE_SECONDS
    started_meanwhile = engine_pids(node)
    new_engine_pid(node, ready_pids[-1])
    open_seconds = time.monotonic() - crashed_at[-1]
    pool.wait_connected(LLAMACPP_MODEL)
    broken = []
    if started_meanwhile:
        broken.append("an engine was started while the breaker was open")
    if not OPEN_FIRST_SECONDS <= open_seconds <= OPEN_FIRST_SECONDS + 10:
        broken.append(f"the next start came after {open_seconds:.1f} s")
    if cpu_share > IDLE_CPU_SHARE_MAX:
        broken.append(f"the agent used {cpu_share:.0%} of a processor meanwhile")
    if not serves(pool):
        broken.append("the engine that was tried does not serve")
    figures = {
        "crashes": len(crashed_at),
        "seconds_between": [round(later - earlier, 1) for earlier, later in pairwise(crashed_at)],
        "told": words.strip(),
        "agent_cpu_share_while_open": round(cpu_share, 3),
        "seconds_until_the_next_start": round(open_seconds, 1),
    }
    return Outcome("five crashes", figures, tuple(broken))


POOLS: dict[str, tuple[Callable[[Pool], Outcome], ...]] = {
    "potluck": (kill, stop, kill_by_request),
    "tests.support.starved_agent": (starve, crash_on_and_on),
}
"""Which agent the faults are played on: its entry, and the faults in their order."""


def main() -> int:
    """Plays every fault once."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    failed = False
    for node_module, faults in POOLS.items():
        with (
            tempfile.TemporaryDirectory() as folder,
            running_pool(Path(folder), node_module=node_module, with_llamacpp=True, llamacpp_context_tokens=CONTEXT_TOKENS) as pool,
        ):
            for fault in faults:
                outcome = fault(pool)
                failed = failed or bool(outcome.broken)
                print(json.dumps(asdict(outcome)), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
