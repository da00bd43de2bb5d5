"""Two nodes of two owners that serve the built-in model, and what clients see of the streams they answer.

What `stream_survival` plays its faults on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from potluck import Client
from potluck_protocol.values import EngineState
from tests.support.coordinator_process import CoordinatorProcess
from tests.support.pool_processes import ChatStream, NodeProcess, Pool, catalogue_entry, new_owner, wait_until
from tests.support.requantized import built_in_q4_0

MODEL = "smollm2-135m-instruct"
TOKEN_COUNT = 64
SLOT_COUNT = 16
"""Of each replica: one of the two is to carry all streams while the other is away."""
CONTEXT_TOKENS = 512
BACK_SECONDS_MAX = 60.0


@dataclass(frozen=True, slots=True)
class Question:
    """Something whose greedy answer is at least so long."""

    messages: tuple[dict[str, str], ...]
    token_count: int = TOKEN_COUNT


LIST = Question(({"role": "user", "content": "List the first thirty numbers."},))
"""Numbers show what is lost or repeated. Between any two tokens the engine's choice is clear, whatever else is in its batch."""
BRIEF = Question(({"role": "system", "content": ""}, *LIST.messages), token_count=24)
"""Without the system message that the model's template puts first. What a lost node's answers hold is read again by the other's one core,
some 350 tokens/s, one behind the other: ten such answers are most of a second."""
ANY_PACE = ("env", "POTLUCK_COORDINATOR_ANSWER_TOKEN_SECONDS_MAX=10")
"""Sixteen answers on one processor are slower than a pool promises by default; it would refuse some of those that begin anew."""


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
    catalogue.write_text(catalogue_entry(MODEL, built_in_q4_0(), "llamacpp", CONTEXT_TOKENS, SLOT_COUNT))
    with ExitStack() as stack:
        coordinator = stack.enter_context(CoordinatorProcess(folder / "coordinator", "--catalogue", str(catalogue), wrap=ANY_PACE))
        coordinator.wait_ready()
        survival = SurvivalPool(Pool(folder, coordinator, []), [])
        for number in range(2):
            key, invite = new_owner(survival.pool, f"owner-{number}")
            survival.owner_keys.append(key)
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
    token_count: int = TOKEN_COUNT
    """Of a whole answer."""
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
    def is_over(self) -> bool:
        return bool(self.done_count or self.error)

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
        if len(self.texts) != self.token_count:
            found.append(f"{len(self.texts)} pieces of text")
        if len(self.usages) != 1 or self.usages[0]["completion_tokens"] != self.token_count:
            found.append(f"usage {self.usages}")
        elif prompt_tokens and self.usages[0]["prompt_tokens"] not in {prompt_tokens, 0}:
            found.append(f"usage {self.usages}, of {prompt_tokens} prompt tokens")
        return found


def ask(pool: Pool, question: Question = LIST, **fields: Any) -> ChatStream:
    return pool.stream(
        model=MODEL,
        max_tokens=question.token_count,
        temperature=0,
        **fields,
        messages=question.messages,
        stream_options={"include_usage": True},
    )


def ask_afresh(pool: Pool, question: Question = LIST) -> ChatStream:
    """Without the engine's memory of earlier prompts: what it reads with its help it rounds differently, also where nothing fails."""
    return ask(pool, question, cache_prompt=False)


def undisturbed(survival: SurvivalPool, question: Question = LIST) -> tuple[Seen, int]:
    """An answer that nothing happens to, and its prompt's tokens."""
    seen = Seen(token_count=question.token_count)
    for payload in ask_afresh(survival.pool, question).events():
        seen.take(payload)
    assert not seen.breaches(0), seen
    return seen, seen.usages[0]["prompt_tokens"]
