"""A shard group of two owners' nodes, from the first wish to the loss of each of its members: what everybody sees, when, and who is paid.

    python -m tests.engines.group_loss [FAULT…]

prints lines of JSON: how one vLLM alone fares on machines of the members' size, the group, and each fault (all of them if none is named).
It exits 1 if a promise is broken. The model is the built-in one with so many words that it takes more than the kernel allows a member.
It needs root, `ip netns`, memory control groups and vLLM's environment (`make test-engines` makes it). Every fault costs another start of
two vLLMs.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tests.engines.alone import Alone, alone
from tests.support.coordinator_process import wait_gone, wait_until
from tests.support.group_pool import (
    COMPLETION_PRICE,
    MODEL,
    PROMPT,
    PROMPT_PRICE,
    TOKENS,
    GroupPool,
    SiteNode,
    group_pool,
    kill,
    limit_bytes,
    stage_weight_bytes,
)
from tests.support.large_model import large_folder

BROKEN_SECONDS_MAX = 5.0
FREED_SECONDS_MAX = 15.0
"""From the loss to the end of the last process: five for the engine to end by itself, and some for two busy processors."""
FEE_BASIS_POINTS = 500
_TOO_BIG = re.compile(r"would hold [\d.]+ of [\d.]+ GiB|alone take [\d.]+ of [\d.]+ GiB")
_STAGE = re.compile(r"serves stage (\d+) of 2, (\d+) of (\d+) layers.*its engine counted ([\d,]+)")
_BROKE = re.compile(r"its group broke: (.*)|formed anew after: (.*)")


@dataclass(frozen=True, slots=True)
class Formed:
    """The group as it came to be."""

    explained: dict[str, str]
    """What `potluck explain` says of each node."""
    ready_seconds: float
    text: str
    listeners: dict[str, list[tuple[str, int]]]
    """What listens on each member's host, loopback left out."""
    price_micro_credits: int
    earned_micro_credits: dict[str, int]
    counted_weight_bytes: dict[str, int]
    """What the engine of each stage counted, by `potluck explain`."""
    file_weight_bytes: dict[str, int]
    """What the model's file has of the stage's layers and end."""

    def broken(self) -> list[str]:
        """The promises that were not kept."""
        broken = [f"{name} could hold the model: {words}" for name, words in self.explained.items() if not _TOO_BIG.search(words)]
        broken += [f"{name} is no stage: {self.explained[name]}" for name in ("ann", "bob") if "serves stage" not in self.explained[name]]
        if "does not trust" not in self.explained["eve"]:
            broken.append(f"eve is left out for another reason: {self.explained['eve']}")
        fee = self.price_micro_credits * FEE_BASIS_POINTS // 10_000
        if sum(self.earned_micro_credits.values()) != self.price_micro_credits - fee or not self.price_micro_credits:
            broken.append(f"of {self.price_micro_credits} the owners got {self.earned_micro_credits}, and the fee is {fee}")
        if not all(self.earned_micro_credits[name] for name in ("ann", "bob")) or self.earned_micro_credits["eve"]:
            broken.append(f"not both members' owners, and nobody else, were paid: {self.earned_micro_credits}")
        return broken + self._broken_shares()

    def _broken_shares(self) -> list[str]:
        counted, earned = self.counted_weight_bytes, self.earned_micro_credits
        if counted != self.file_weight_bytes:
            return [f"the engines counted {counted}, and the file has {self.file_weight_bytes}"]
        parts = {name: sum(earned.values()) * size / sum(counted.values()) for name, size in counted.items()}
        return [f"{name} earned {earned[name]}, by its weights {part:.1f}" for name, part in parts.items() if abs(earned[name] - part) > 1]


@dataclass(frozen=True, slots=True)
class Loss:
    """One fault and what came of it."""

    fault: str
    lost: str
    client_seconds: float
    client_error: str
    broken_seconds: float
    reason: str
    freed_seconds: float
    back_seconds: float
    text_is_the_same: bool
    eve_served: bool
    findings: tuple[str, ...]

    def broken(self) -> list[str]:
        """The promises that were not kept."""
        broken = list(self.findings)
        if self.broken_seconds > BROKEN_SECONDS_MAX or self.client_seconds > BROKEN_SECONDS_MAX:
            broken.append(f"the client knew after {self.client_seconds:.1f} s and the operator after {self.broken_seconds:.1f} s")
        if not self.client_error or not self.reason:
            broken.append(f"no clear reason: {self.client_error!r}, {self.reason!r}")
        if self.freed_seconds > FREED_SECONDS_MAX:
            broken.append(f"the last process of the old generation ended after {self.freed_seconds:.1f} s")
        if not self.text_is_the_same:
            broken.append("the group that was formed anew says something else")
        if self.eve_served:
            broken.append("eve was taken in")
        return broken


def form(pool: GroupPool) -> Formed:
    """Asks for the model, and waits until the group has answered."""
    wait_until(lambda: len(json.loads(pool.potluck("nodes", "--json"))) == len(pool.nodes), 60, f"every node has joined\n{pool.logs()}")
    began = time.monotonic()
    pool.potluck("deploy", MODEL, "--replicas", "1")
    pool.wait_ready()
    ready_seconds = time.monotonic() - began
    # What a stage counted comes with a heartbeat.
    wait_until(lambda: len(_stages(pool)) == 2, 15, f"both engines have counted their weights\n{pool.potluck('explain', MODEL)}")
    before = {name: pool.credits(name)["earned_micro_credits"] for name in pool.nodes}
    stream = pool.stream(PROMPT, max_tokens=TOKENS, stream_options={"include_usage": True})
    events = [json.loads(event) for event in stream.events() if event != "[DONE]"]
    usage = next(event["usage"] for event in events if event.get("usage"))
    price = usage["prompt_tokens"] * PROMPT_PRICE + usage["completion_tokens"] * COMPLETION_PRICE
    wait_until(lambda: sum(_earned(pool, before).values()) > 0, 30, f"the answer is settled\n{pool.logs()}")
    verdicts = pool.verdicts()
    stages = _stages(pool)
    return Formed(
        explained={name: f"{row['verdict']}: {row['reason']}" for name, row in verdicts.items()},
        ready_seconds=round(ready_seconds, 1),
        text="".join(choice["delta"].get("content") or "" for event in events for choice in event.get("choices", ())),
        listeners={name: [found for found in pool.nodes[name].host.listeners() if not _is_loopback(found[0])] for name in pool.nodes},
        price_micro_credits=price,
        earned_micro_credits=_earned(pool, before),
        counted_weight_bytes={name: int(found[4].replace(",", "")) for name, found in stages.items()},
        file_weight_bytes={name: stage_weight_bytes(pool.model_folder, _layers(found)) for name, found in stages.items()},
    )


def _stages(pool: GroupPool) -> dict[str, re.Match[str]]:
    return {name: found for name, row in pool.verdicts().items() if (found := _STAGE.search(row["reason"]))}


def _layers(found: re.Match[str]) -> range:
    """Of a stage of two."""
    rank, own, all_of_them = int(found[1]) - 1, int(found[2]), int(found[3])
    return range(own) if rank == 0 else range(all_of_them - own, all_of_them)


def lose(pool: GroupPool, fault: str, text: str) -> Loss:
    """One answer, one fault in the middle of it; the group serves again when this returns."""
    node, process = FAULTS[fault](pool)
    members = [pool.leader(), pool.member()]
    engines = [process for member in members for process in member.engine_processes()]
    stream = pool.stream("Count from one to five hundred, in words.", max_tokens=1_500)
    stream.read_tokens(3)
    lost_at = kill(process)
    stream.read_to_end()
    client_seconds = time.monotonic() - lost_at
    reason = _reason_of_the_break(pool)
    broken_seconds = time.monotonic() - lost_at
    wait_gone(engines, 60)
    freed_seconds = time.monotonic() - lost_at
    if fault.endswith("agent"):
        node.start_again()
    back_at = time.monotonic()
    wait_until(lambda: pool.ready_count() == 0, 30, "the broken group is no replica")
    pool.wait_ready()
    return Loss(
        fault=fault,
        lost=node.folder.name,
        client_seconds=round(client_seconds, 2),
        client_error=(stream.error or {}).get("message", ""),
        broken_seconds=round(broken_seconds, 2),
        reason=reason,
        freed_seconds=round(freed_seconds, 2),
        back_seconds=round(time.monotonic() - back_at, 1),
        text_is_the_same=pool.greedy(PROMPT, TOKENS) == text,
        eve_served=bool(pool.nodes["eve"].engine_processes()),
        findings=tuple(json.loads(pool.potluck("audit", "--json"))["findings"]),
    )


def _not_killed(name: str, one: Alone) -> list[str]:
    if one.kernel_kill_count and one.failure == "out_of_memory":
        return []
    return [f"with {name}'s memory one process was to be killed by the kernel, and was: {one}"]


def _agent(of: Callable[[GroupPool], SiteNode]) -> Callable[[GroupPool], tuple[SiteNode, psutil.Process]]:
    def chosen(pool: GroupPool) -> tuple[SiteNode, psutil.Process]:
        node = of(pool)
        return node, node.agent()

    return chosen


def _engine(of: Callable[[GroupPool], SiteNode], place: int) -> Callable[[GroupPool], tuple[SiteNode, psutil.Process]]:
    def chosen(pool: GroupPool) -> tuple[SiteNode, psutil.Process]:
        node = of(pool)
        return node, node.engine_processes()[place]

    return chosen


FAULTS: dict[str, Callable[[GroupPool], tuple[SiteNode, psutil.Process]]] = {
    "member's agent": _agent(GroupPool.member),
    "leader's engine": _engine(GroupPool.leader, 1),
    "leader's agent": _agent(GroupPool.leader),
    "member's engine": _engine(GroupPool.member, 1),
    "member's worker": _engine(GroupPool.member, -1),
    "member's launcher": _engine(GroupPool.member, 0),
}


def _earned(pool: GroupPool, before: dict[str, int]) -> dict[str, int]:
    return {name: pool.credits(name)["earned_micro_credits"] - earned for name, earned in before.items()}


def _reason_of_the_break(pool: GroupPool) -> str:
    reasons: list[str] = []

    def is_told() -> bool:
        found = (_BROKE.search(row["reason"]) for row in pool.verdicts().values())
        reasons.extend(words[1] or words[2] for words in found if words)
        return bool(reasons)

    wait_until(is_told, 30, f"`potluck explain` says why the group broke\n{pool.logs()}")
    return reasons[0]


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in {"::1", "::ffff:127.0.0.1"}


def main() -> int:
    """Runs the named faults once each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of: {', '.join(FAULTS)}")
    faults = parser.parse_args().faults
    if unknown := [fault for fault in faults if fault not in FAULTS]:
        parser.error(f"there is no fault {unknown[0]!r}; there are: {', '.join(FAULTS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends this ends the pool with it
    model_folder = large_folder()
    whole = alone(model_folder)
    alone_broken = [] if whole.text else [f"one process with all the memory failed: {whole.failure}"]
    limited = {name: alone(model_folder, limit_bytes(model_folder, name)) for name in ("ann", "bob")}
    alone_broken += [broken for name, one in limited.items() for broken in _not_killed(name, one)]
    tries = {"this machine": whole, **limited}
    print(json.dumps({"alone": {name: asdict(one) for name, one in tries.items()}, "broken": alone_broken}), flush=True)
    with tempfile.TemporaryDirectory() as folder, group_pool(Path(folder) / "pool", model_folder) as pool:
        formed = form(pool)
        broken = formed.broken() + ([] if formed.text == whole.text else [f"one process says something else: {whole.text!r}"])
        print(json.dumps({**asdict(formed), "broken": broken}), flush=True)
        failed = bool(alone_broken or broken)
        for fault in faults or FAULTS:
            loss = lose(pool, fault, formed.text)
            failed = failed or bool(loss.broken())
            print(json.dumps({**asdict(loss), "broken": loss.broken()}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
