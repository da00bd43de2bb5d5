"""Conversations find the replica that has read them: real agents, real llama.cpp, the built-in model, and other policies beside ours.

    python -m tests.chaos.prefix_sessions [--sessions COUNT] [--turns COUNT] [--rounds COUNT] [--json]

Four replicas of SmolLM2 on llama.cpp answer conversations of several turns, each of which begins with a long text of its own. The same
conversations, of other texts, are placed by ours, by round robin, and by an oracle that knows whose turn it is and sends each conversation
to one replica. Then requests that share nothing are placed by ours and by least loaded, in turns. All go through the same coordinator,
engines and clients; only the choice among free replicas differs. Exits 1 where ours does not reach 0.9 of the oracle's cached prompt
tokens, needs more than 0.6 of round robin's mean time to the first token, or, with nothing shared, more than 1.05 of least loaded's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest import mock

import aiohttp
import psutil
import structlog

from potluck_coordinator.directory.bootstrap import OPERATOR_ACCOUNT_ID
from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_coordinator.domain import stall
from potluck_coordinator.domain.placement import Placement, ReplicaView, has_slot
from potluck_coordinator.gateway.inference_request import InferenceRequest
from potluck_protocol.connection import Invite, certificate_hash
from potluck_protocol.values import ModelId
from tests.support.coordinator import Coordinator, running_coordinator
from tests.support.pool_processes import NodeProcess, catalogue_entry
from tests.support.safetensors_model import built_in_gguf

MODEL: Final = ModelId("smollm2-135m-instruct")
REPLICAS: Final = 4
SLOTS: Final = 4
CONTEXT_TOKENS: Final = 2048
DOCUMENT_WORDS: Final = 150
"""What a conversation begins with: some 400 tokens."""
TURN_WORDS: Final = 25
ALONE_WORDS: Final = 100
"""Of a request that shares nothing."""
ANSWER_TOKENS: Final = 8
CLIENTS: Final = 2
"""At a time: the engines share two cores, and more would measure their quarrel."""
CACHED_SHARE_MIN: Final = 0.9
FIRST_TOKEN_SHARE_MAX: Final = 0.6
ALONE_SHARE_MAX: Final = 1.05
READY_SECONDS_MAX: Final = 120.0

Choose = Callable[[InferenceRequest, list[ReplicaView]], ReplicaView]


class SessionNode(NodeProcess):
    """A node that serves the built-in model."""

    def _environment(self) -> dict[str, str]:
        return {**super()._environment(), "POTLUCK_NODE_MODELS_ALLOWED": MODEL, "POTLUCK_NODE_SCRIPTED_ENGINE": "false"}


class RoundRobin:
    """One after the other, whatever they hold or do."""

    def __init__(self) -> None:
        self._number = 0

    def __call__(self, request: InferenceRequest, replicas: list[ReplicaView]) -> ReplicaView:
        self._number += 1
        return replicas[self._number % len(replicas)]


class Oracle:
    """Each conversation stays where it began; they are shared out evenly."""

    def __call__(self, request: InferenceRequest, replicas: list[ReplicaView]) -> ReplicaView:
        number = int(json.loads(request.body)["user"].rpartition("-")[2])
        return replicas[number % len(replicas)]


class LeastLoaded:
    """The fewest requests under way, equals by chance."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self, request: InferenceRequest, replicas: list[ReplicaView]) -> ReplicaView:
        least = min(replica.in_flight_count for replica in replicas)
        return self._random.choice([replica for replica in replicas if replica.in_flight_count == least])


@dataclass
class Outcome:
    """What one policy's requests came to."""

    policy: str
    first_token_seconds: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def cached_share(self) -> float:
        return self.cached_tokens / self.prompt_tokens

    @property
    def first_token_seconds_mean(self) -> float:
        return statistics.fmean(self.first_token_seconds)


class Pool:
    """The coordinator in this process, its four nodes, and whoever places."""

    def __init__(self, coordinator: Coordinator, http: aiohttp.ClientSession) -> None:
        self._coordinator = coordinator
        self._http = http
        self._placing = coordinator.gateway.requests._placing
        self._ours = self._placing.place

    def use(self, choose: Choose | None) -> None:
        """Places by that from now on; None: by ours."""

        def place(request: InferenceRequest, excluded: frozenset[str], work: Any, _: Any = None) -> Placement:
            kinds = self._coordinator.gateway._links.roster().kinds(request.model_id)
            able = [replica for kind in kinds for replica in kind.replicas() if has_slot(replica) and replica.node_id not in excluded]
            able.sort(key=lambda replica: replica.replica_id)
            return Placement(choose(request, able) if able and choose is not None else None, (), work)

        self._placing.place = self._ours if choose is None else place  # type: ignore[method-assign,assignment]

    def ready_count(self) -> int:
        return self._placing.ready_replica_count(MODEL)

    async def ask(self, outcome: Outcome, user: str, messages: list[dict[str, str]]) -> str:
        """One request, streamed; its text."""
        body = {
            "model": MODEL,
            "user": user,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        headers = {"authorization": f"Bearer {self._coordinator.operator_key}"}
        began, text, first_at = time.monotonic(), "", 0.0
        async with self._http.post(f"{self._coordinator.url}/v1/chat/completions", json=body, headers=headers) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                assert "error" not in event, event
                if usage := event.get("usage"):
                    outcome.prompt_tokens += usage["prompt_tokens"]
                    outcome.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
                for choice in event["choices"]:
                    if piece := choice["delta"].get("content"):
                        first_at, text = first_at or time.monotonic(), text + piece
        assert first_at, "no token came"
        outcome.first_token_seconds.append(first_at - began)
        return text


def words(chance: random.Random, count: int) -> str:
    return " ".join("".join(chance.choices("abcdefghiklmnoprstuvw", k=chance.randint(2, 6))) for _ in range(count))


class Talks:
    """Conversations that one policy places."""

    def __init__(self, policy: str, choose: Choose | None, count: int) -> None:
        self.outcome = Outcome(policy)
        self._choose = choose
        self._chance = random.Random(f"talks by {policy}")
        self._talks = [[{"role": "system", "content": words(self._chance, DOCUMENT_WORDS)}] for _ in range(count)]

    async def next_turns(self, pool: Pool) -> None:
        """One of each, a few at a time: nobody's come one right after the other."""
        pool.use(self._choose)
        for talk in self._talks:
            talk.append({"role": "user", "content": words(self._chance, TURN_WORDS)})
        waiting = list(enumerate(self._talks))

        async def client() -> None:
            while waiting:
                number, talk = waiting.pop(0)
                talk.append({"role": "assistant", "content": await pool.ask(self.outcome, f"session-{number}", talk)})

        await asyncio.gather(*(client() for _ in range(CLIENTS)))


async def ask_alone(pool: Pool, outcome: Outcome, seed: str, count: int) -> None:
    """Requests that share nothing, a few at a time."""
    chance = random.Random(seed)
    prompts = [words(chance, ALONE_WORDS) for _ in range(count)]

    async def client() -> None:
        while prompts:
            await pool.ask(outcome, "nobody", [{"role": "user", "content": prompts.pop()}])

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


@dataclass(frozen=True, slots=True)
class Report:
    """The figures, and whether they are good enough."""

    cached_to_oracle: float
    first_token_to_round_robin: float
    alone_to_least_loaded: float
    cached_share: dict[str, float]
    first_token_seconds: dict[str, float]

    def breaches(self) -> list[str]:
        found = []
        if self.cached_to_oracle < CACHED_SHARE_MIN:
            found.append(f"cached prompt tokens are {self.cached_to_oracle:.3f} of the oracle's, not {CACHED_SHARE_MIN}")
        if self.first_token_to_round_robin > FIRST_TOKEN_SHARE_MAX:
            found.append(f"the first token needs {self.first_token_to_round_robin:.3f} of round robin's time, not {FIRST_TOKEN_SHARE_MAX}")
        if self.alone_to_least_loaded > ALONE_SHARE_MAX:
            found.append(f"with nothing shared it needs {self.alone_to_least_loaded:.3f} of least loaded's time, not {ALONE_SHARE_MAX}")
        return found


async def invite_from(coordinator: Coordinator) -> str:
    """As `potluck tokens create` makes it."""
    token, secret = await coordinator.directory.accounts.create_join_token(OPERATOR_ACCOUNT_ID, 0)
    authority = CertificateAuthority.load_or_create(coordinator.settings.certificate_authority_dir, int(time.time() * 1000))
    return Invite(coordinator.url, certificate_hash(authority.ca_certificate_pem), token.token_id, secret).encode()


def let_everywhere(pid: int) -> None:
    """The processes of a node, thread by thread, may use all processors: else two that were put on the same one would be slow together."""
    agent = psutil.Process(pid)
    for process in (agent, *agent.children(recursive=True)):
        for thread in process.threads():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread.id, range(os.cpu_count() or 1))


@asynccontextmanager
async def session_pool(folder: Path) -> AsyncIterator[Pool]:
    """Starts it, waits until all four serve, and stops everything."""
    folder.mkdir(parents=True, exist_ok=True)
    catalogue = folder / "own.toml"
    catalogue.write_text(catalogue_entry(MODEL, await asyncio.to_thread(built_in_gguf), "llamacpp", CONTEXT_TOKENS, SLOTS))
    async with AsyncExitStack() as stack:
        # Who else is at work on this machine may keep an engine from it for longer than the gateway bears; the choices are judged here.
        stack.enter_context(mock.patch.multiple(stall, FIRST_TOKEN_SECONDS_MIN=120.0, HUNG_SECONDS_MIN=60.0))
        settings = {"catalogue_file": catalogue, "default_tier_rate": "100000/hour"}
        coordinator = await stack.enter_async_context(running_coordinator(folder / "coordinator", **settings))
        http = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)))
        pool, nodes = Pool(coordinator, http), []
        for number in range(REPLICAS):
            invite = await invite_from(coordinator)
            # In a thread: what it talks to is this process.
            # An engine that sees one processor takes one thread: several wait for each other, and on a machine that others use very long.
            node = await asyncio.to_thread(SessionNode, folder / f"node-{number}", invite, ("taskset", "-c", "0"))
            nodes.append(node)
            stack.push_async_callback(asyncio.to_thread, node.__exit__)
        deadline = time.monotonic() + READY_SECONDS_MAX
        while pool.ready_count() < REPLICAS:
            assert time.monotonic() < deadline, f"{pool.ready_count()} of {REPLICAS} replicas serve"
            await asyncio.sleep(0.3)
        for node in nodes:
            let_everywhere(node.process.pid)
        yield pool


async def converse(pool: Pool, sessions: int, turns: int) -> dict[str, Outcome]:
    """What the same conversations come to, by policy."""
    talks = [Talks(name, choose, sessions) for name, choose in (("ours", None), ("round robin", RoundRobin()), ("oracle", Oracle()))]
    for turn in range(turns):
        # In turns, and each of them first at times: what changes on this machine meanwhile changes for all.
        for number in range(len(talks)):
            await talks[(turn + number) % len(talks)].next_turns(pool)
    return {each.outcome.policy: each.outcome for each in talks}


async def compare(folder: Path, sessions: int, turns: int, rounds: int) -> Report:
    async with session_pool(folder) as pool:
        await ask_alone(pool, Outcome("warming up"), "warm", 2 * REPLICAS)
        talked = await converse(pool, sessions, turns)
        alone = {"ours": Outcome("ours"), "least loaded": Outcome("least loaded")}
        least_loaded = LeastLoaded(5)
        for number in range(rounds):
            for name in ("ours", "least loaded") if number % 2 else ("least loaded", "ours"):
                pool.use(None if name == "ours" else least_loaded)
                await ask_alone(pool, alone[name], f"alone {name} {number}", 2 * REPLICAS)
        share = {name: outcome.cached_share for name, outcome in talked.items()}
        seconds = {name: outcome.first_token_seconds_mean for name, outcome in talked.items()}
        return Report(
            cached_to_oracle=share["ours"] / share["oracle"],
            first_token_to_round_robin=seconds["ours"] / seconds["round robin"],
            alone_to_least_loaded=alone["ours"].first_token_seconds_mean / alone["least loaded"].first_token_seconds_mean,
            cached_share=share,
            first_token_seconds=seconds | {f"{name}, nothing shared": outcome.first_token_seconds_mean for name, outcome in alone.items()},
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=7, help="conversations of each policy; no multiple of four, for round robin's sake")
    parser.add_argument("--turns", type=int, default=6, help="of each conversation")
    parser.add_argument("--rounds", type=int, default=10, help="of requests that share nothing")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(compare(Path(folder), options.sessions, options.turns, options.rounds))
    broken = report.breaches()
    if options.json:
        print(json.dumps({**asdict(report), "broken": broken}))
        return 1 if broken else 0
    for name, seconds in report.first_token_seconds.items():
        cached = f", {report.cached_share[name]:.1%} of prompt tokens cached" if name in report.cached_share else ""
        print(f"{name}: first token after {seconds * 1000:.0f} ms in the mean{cached}")
    print(
        f"cached, to the oracle's: {report.cached_to_oracle:.3f}; first token, to round robin's: {report.first_token_to_round_robin:.3f}; "
        f"with nothing shared, to least loaded's: {report.alone_to_least_loaded:.3f}"
    )
    for words_of_breach in broken:
        print(words_of_breach)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
