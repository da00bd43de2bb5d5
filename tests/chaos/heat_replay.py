"""A recorded card gets hot under one of two nodes: who serves, which caps are set, and when, in a real pool under constant load.

    python -m tests.chaos.heat_replay

plays `tests/fixtures/heat/rtx_3090.json` four to thirty times as fast as it was recorded, prints what came of it as JSON, and exits 1
where a promise is broken. Times are the trace's. `--unheeded` switches the policy off, and must exit 1: it shows that the checks can fail.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

from potluck_node.domain.thermal import DWELL_SECONDS, PATIENCE_SECONDS
from potluck_node.domain.thermal_ladder import PowerRange, ThermalRung, caps_milliwatts
from tests.support.coordinator_process import CoordinatorProcess
from tests.support.heat_trace import Pace, Trace, load_trace
from tests.support.pool_processes import MODEL, SLOT_COUNT, NodeProcess, Pool, new_invite, write_catalogue

TRACE = "rtx_3090"
MADE_FOR_MILLIWATTS = 350_000
CAPS = tuple(caps_milliwatts(PowerRange(100_000, MADE_FOR_MILLIWATTS, 385_000), None).values())
CLIENTS = 12
"""Six for each node's eight slots; when the hot one has four, they still find one, and when it has none, some wait."""
ANSWER = {"tokens": [" word"], "token_count": 10, "inter_token_ms": 20}
SLACK_SECONDS = 12.0
"""A look, a heartbeat, and the answers that were placed just before; 0.4 s of the machine's where the trace goes fastest."""
SHED_SHARE_MAX = 0.85
"""Of its share before, before the throttle point. Four slots of twelve that are taken instead of six would be two thirds; on a busy machine
some of the time passes before the coordinator has heard of it."""
RECOVERED_SHARE_MIN = 0.8


@dataclass(frozen=True, slots=True)
class Answer:
    """One request, by the trace's time at its beginning."""

    at_seconds: float
    node_id: str
    status: int


@dataclass(frozen=True, slots=True)
class Step:
    """A rung that was taken, or a cap that was set, by the trace's time."""

    at_seconds: float
    value: int


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of it."""

    rungs: tuple[Step, ...]
    caps: tuple[Step, ...]
    shares: dict[str, float]
    """Of the hot node, by stretch of the trace."""
    answer_count: int
    failed_count: int
    listed: dict[str, Any]
    """What the pool's list of nodes said of the card after its hottest."""
    broken: tuple[str, ...]


class HeatedPool:
    """A coordinator and two nodes, of which the first one's card follows the trace."""

    def __init__(self, pool: Pool, hot: NodeProcess) -> None:
        self.pool = pool
        self.hot = hot
        self.trace = load_trace(TRACE)
        self.pace = Pace(self.trace)
        self.began_at = 0.0

    def begin(self) -> None:
        """Starts the trace."""
        self.hot.agent().send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while not self.steps("began"):
            assert time.monotonic() < deadline, "the trace did not begin"
            time.sleep(0.05)
        self.began_at = self._written()[0]["unix_seconds"]

    def seconds(self, unix_seconds: float | None = None) -> float:
        """Of the trace."""
        return self.pace.seconds((time.time() if unix_seconds is None else unix_seconds) - self.began_at)

    def steps(self, what: str) -> tuple[Step, ...]:
        """What the node did, oldest first."""
        lines = [line for line in self._written() if line["what"] == what]
        return tuple(Step(round(self.seconds(line["unix_seconds"]), 1), line["value"]) for line in lines)

    def listed(self) -> dict[str, Any]:
        """The hot card as `potluck nodes list --json` has it."""
        with self.pool.client() as client:
            (card,) = next(node.cards for node in client.nodes() if node.node_id == self.hot.node_id)
        return asdict(card)

    def _written(self) -> list[dict[str, Any]]:
        path = self.hot.folder / "heat.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextmanager
def heated_pool(folder: Path, *, unheeded: bool = False) -> Iterator[HeatedPool]:
    """Starts everything, waits until both nodes serve, and stops it."""
    catalogue = write_catalogue(folder / "models", ANSWER)
    with ExitStack() as stack:
        coordinator = stack.enter_context(CoordinatorProcess(folder / "coordinator", "--catalogue", str(catalogue)))
        coordinator.wait_ready()
        pool = Pool(folder, coordinator, [])
        for name, follows in (("hot", "1"), ("cool", "0")):
            given = {
                "POTLUCK_TEST_HEAT": str(folder / name),
                "POTLUCK_TEST_HEAT_TRACE": TRACE,
                "POTLUCK_TEST_HEAT_FOLLOWS": follows,
                "POTLUCK_TEST_HEAT_UNHEEDED": "1" if unheeded else "",
            }
            # Each of the two processes that a node has inherits it.
            os.environ.update(given)
            try:
                node = stack.enter_context(NodeProcess(folder / name, new_invite(pool), module="tests.support.heated_agent"))
            finally:
                for variable in given:
                    del os.environ[variable]
            pool.nodes.append(node)
        pool.wait_connected()
        yield HeatedPool(pool, pool.nodes[0])


async def offer_load(heated: HeatedPool, until_seconds: float) -> tuple[list[Answer], dict[str, Any]]:
    """The same number of requests all the time, one after another from each client; the answers, and the card as the pool lists it."""
    answers: list[Answer] = []
    url = f"{heated.pool.url}/v1/chat/completions"
    headers = {"authorization": f"Bearer {heated.pool.api_key}"}
    body = {"model": MODEL, "max_tokens": ANSWER["token_count"], "messages": [{"role": "user", "content": "count"}]}

    async def client(session: aiohttp.ClientSession) -> None:
        while heated.seconds() < until_seconds:
            began_at = heated.seconds()
            async with session.post(url, json=body, headers=headers) as response:
                await response.read()
                answers.append(Answer(began_at, response.headers.get("x-potluck-node", ""), response.status))

    async def watcher() -> dict[str, Any]:
        told_by = heated.pace.passed_seconds(heated.trace.phase("edge").ends_at)
        await asyncio.sleep(max(0.0, told_by - (time.time() - heated.began_at)))
        return await asyncio.to_thread(heated.listed)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        watching = asyncio.create_task(watcher())
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
        return answers, await watching


def play(heated: HeatedPool, until_seconds: float) -> Replay:
    """Plays the trace until then."""
    trace = heated.trace
    heated.begin()
    answers, listed = asyncio.run(offer_load(heated, until_seconds))
    rungs, caps = heated.steps("rung"), heated.steps("cap")
    shares = {name: share_of(heated.hot.node_id, answers, *window) for name, window in windows(trace, rungs, until_seconds).items()}
    failed_count = sum(answer.status != 200 for answer in answers)
    replay = Replay(rungs, caps, shares, len(answers), failed_count, listed, ())
    return Replay(rungs, caps, shares, len(answers), failed_count, listed, tuple(broken_promises(replay, trace, until_seconds)))


def windows(trace: Trace, rungs: tuple[Step, ...], until_seconds: float) -> dict[str, tuple[float, float]]:
    """The stretches over which the hot node's share is told, in the trace's seconds."""
    shed_at = next((step.at_seconds for step in rungs if step.value >= ThermalRung.HALF), trace.throttles_at() - 2 * SLACK_SECONDS)
    drained_at = next((step.at_seconds for step in rungs if step.value >= ThermalRung.DRAIN), trace.phase("hot").ends_at)
    back_at = next((step.at_seconds for step in rungs if step.at_seconds > drained_at and step.value == ThermalRung.CAP_3), until_seconds)
    found = {
        "before": (0.0, trace.phase("heating").begins_at),
        "shed, before the throttle point": (shed_at + SLACK_SECONDS / 2, trace.throttles_at()),
        "drained": (drained_at + SLACK_SECONDS, trace.phase("edge").ends_at),
    }
    return found | ({"recovered": (back_at + SLACK_SECONDS, until_seconds)} if until_seconds - back_at > 2 * SLACK_SECONDS else {})


def share_of(node_id: str, answers: list[Answer], since_seconds: float, until_seconds: float) -> float:
    """How many of the requests of that time the node answered."""
    nodes = [answer.node_id for answer in answers if since_seconds <= answer.at_seconds < until_seconds]
    return round(nodes.count(node_id) / len(nodes), 3) if nodes else -1.0


def broken_promises(replay: Replay, trace: Trace, until_seconds: float) -> Iterator[str]:
    """What should have been so, and was not."""
    rungs, caps, shares = replay.rungs, replay.caps, replay.shares
    climbs = [step for step in rungs if step.at_seconds < trace.phase("cooling").ends_at]
    ripples = [phase for phase in trace.phases if phase.name in {"ripple", "edge"}]
    for phase in ripples:
        if moved := [step for step in rungs if phase.begins_at < step.at_seconds < phase.ends_at]:
            yield f"the {phase.name} of a degree moved the card: {moved}"
    if not climbs or climbs[0].at_seconds > trace.throttles_at():
        yield "nothing was done before the throttle point"
    if [step.value for step in climbs] != sorted(step.value for step in climbs):
        yield f"it did not climb step by step: {climbs}"
    raised = next((number for number in range(1, len(caps)) if caps[number].value > caps[number - 1].value), len(caps))
    lowered = [step.value for step in caps[:raised] if step.at_seconds < trace.throttles_at()]
    if len(lowered) < 2 or (lowered[0], lowered[-1]) != (CAPS[0], CAPS[-1]):
        yield f"the cap was not stepped down before slots went: {caps}"
    if not 0 < shares["shed, before the throttle point"] <= SHED_SHARE_MAX * shares["before"]:
        yield f"the hot node's share did not fall before the throttle point: {shares}"
    if shares["drained"] > 0.02:
        yield f"a drained node got requests: {shares}"
    if replay.failed_count:
        yield f"{replay.failed_count} requests failed"
    if replay.listed["thermal_rung"] < ThermalRung.DRAIN or replay.listed["throttle_seconds"] < SLACK_SECONDS:
        yield f"the pool's list did not show the heat: {replay.listed}"
    yield from broken_recovery(replay, trace, until_seconds)


def broken_recovery(replay: Replay, trace: Trace, until_seconds: float) -> Iterator[str]:
    """The way back: one rung at a time, each after the card was cool for long, and at last all of it."""
    steps = [step for step in replay.rungs if step.at_seconds >= trace.phase("cool").begins_at]
    values = [step.value for step in steps]
    expected = [rung for rung in reversed(ThermalRung) if rung < max((step.value for step in replay.rungs), default=0)]
    if not values or values != expected[: len(values)]:
        yield f"it did not come down a rung at a time: {values}"
    waits = [after.at_seconds - before.at_seconds for before, after in itertools.pairwise(steps)]
    if waits and min(waits) < PATIENCE_SECONDS - 1:
        yield f"it came down after {min(waits)} s of being cool, not {PATIENCE_SECONDS}"
    gaps = [after.at_seconds - before.at_seconds for before, after in itertools.pairwise(replay.rungs)]
    if gaps and min(gaps) < DWELL_SECONDS - 1:
        yield f"two changes within {min(gaps)} s"
    last_caps = [step.value for step in replay.caps][-3:]
    if until_seconds >= trace.phases[-1].ends_at - 1 and (values[-1:] != [0] or last_caps != [CAPS[1], CAPS[0], MADE_FOR_MILLIWATTS]):
        yield f"it is not back at full power: {values}, {replay.caps}"
    if "recovered" in replay.shares and replay.shares["recovered"] < RECOVERED_SHARE_MIN * replay.shares["before"]:
        yield f"its share did not come back: {replay.shares}"


def main() -> int:
    """Plays the whole trace."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--unheeded", action="store_true", help="with the policy switched off")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, heated_pool(Path(folder), unheeded=asked.unheeded) as heated:
        replay = play(heated, load_trace(TRACE).phases[-1].ends_at)
    print(json.dumps({"slots": SLOT_COUNT, "clients": CLIENTS, **asdict(replay)}, indent=1))
    return 1 if replay.broken else 0


if __name__ == "__main__":
    sys.exit(main())
