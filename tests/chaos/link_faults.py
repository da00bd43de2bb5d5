"""The link between agent and coordinator is cut and healed while streams run: real agents, real llama.cpp, the built-in model.

    python -m tests.chaos.link_faults [--count COUNT] [--seed NUMBER]

Both agents dial through a fault proxy. First so many cuts that are healed within the link's grace: the stream must end with exactly the
undisturbed text, from the one node that began it, in the same attempt. Then as many that are healed only after it: the stream goes on, with
the same text, on the other node, each node's owner earns by the tokens that came from it, and the cut node comes back. One stream at a
time, for what an engine answers in a batch depends on the batch. Prints a line of JSON for each cut, with how long the agent took to come
back once it could, and exits 1 on any breach.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from potluck_coordinator.settings import Settings
from tests.chaos.stream_survival import net
from tests.chaos.survival_pool import (
    CONTEXT_TOKENS,
    MODEL,
    SLOT_COUNT,
    TOKEN_COUNT,
    Seen,
    SurvivalNode,
    SurvivalPool,
    ask_afresh,
    undisturbed,
)
from tests.support.coordinator_process import CoordinatorProcess
from tests.support.fault_proxy import ThreadedProxy, threaded_proxy
from tests.support.pool_processes import ChatStream, Pool, audit, catalogue_entry, new_owner, wait_until
from tests.support.safetensors_model import built_in_gguf

GRACE_SECONDS = Settings.model_fields["link_grace_ms"].default / 1000
WITHIN_SECONDS_MAX = 0.4 * GRACE_SECONDS
"""Of an outage that is to be within the grace: what is left is for the agent to come back, on a machine that is busy."""
AFTER_SECONDS = (1.5 * GRACE_SECONDS, 4 * GRACE_SECONDS)
CUT_AFTER_TEXTS = (3, 40)
"""Pieces of text that the client has when the link is cut, of 64."""
STREAM_SECONDS_MAX = 180.0
"""For an answer on a machine that has much else to do."""
SIGNS_OF_MOVING = frozenset({"session_ended", "node_gone", "node_connected", "attempt_stalled", "attempt_failed"})
PROMPT_PRICE, COMPLETION_PRICE = 1, 4


class ProxiedNode(SurvivalNode):
    """Its agent knows no other way to the link port than through the proxy."""

    def __init__(self, folder: Path, invite: str, proxy: ThreadedProxy) -> None:
        self._proxy = proxy
        super().__init__(folder, invite)

    def _environment(self) -> dict[str, str]:
        return {**super()._environment(), "POTLUCK_NODE_SCRIPTED_ENGINE": "true"}

    def _run(self, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        file = self.folder / "state" / "node.json"
        identity = json.loads(file.read_text())
        identity["connection"]["link_port"] = self._proxy.port
        # Where it would ask, after some failed dials, for the port that is not cut.
        identity["url"] = "http://127.0.0.1:9"
        file.write_text(json.dumps(identity))
        return super()._run(environment)


@dataclass
class CutPool(SurvivalPool):
    """A pool whose links can be cut."""

    proxies: list[ThreadedProxy]

    def log_since(self, position: int) -> list[dict]:
        """The coordinator's events from there on."""
        return [json.loads(line) for line in self.pool.coordinator.log()[position:].splitlines() if line.startswith("{")]


def real_entry(_: Path) -> str:
    """The built-in model on llama.cpp."""
    return catalogue_entry(MODEL, built_in_gguf(), "llamacpp", CONTEXT_TOKENS, SLOT_COUNT)


def scripted_entry(folder: Path) -> str:
    """As many tokens from a script, for machines that have no time: it says the same whatever it goes on behind."""
    script = folder / "scripted.json"
    script.write_text(json.dumps({"tokens": [f" {number}" for number in range(100)], "token_count": 400, "inter_token_ms": 40}))
    return catalogue_entry(MODEL, script, "scripted", CONTEXT_TOKENS, SLOT_COUNT)


@contextmanager
def cut_pool(folder: Path, entry: Callable[[Path], str] = real_entry) -> Iterator[CutPool]:
    """Two nodes of two owners behind a proxy each, once both serve."""
    folder.mkdir(parents=True, exist_ok=True)
    catalogue = folder / "catalogue.toml"
    catalogue.write_text(entry(folder))
    with ExitStack() as stack:
        coordinator = stack.enter_context(CoordinatorProcess(folder / "coordinator", "--catalogue", str(catalogue)))
        link_port = coordinator.wait_ready()["link"]
        cut = CutPool(Pool(folder, coordinator, []), [], [])
        for number in range(2):
            key, invite = new_owner(cut.pool, f"owner-{number}")
            cut.owner_keys.append(key)
            cut.proxies.append(stack.enter_context(threaded_proxy(link_port)))
            node = ProxiedNode(folder / f"node-{number}", invite, cut.proxies[-1])
            cut.pool.nodes.append(stack.enter_context(node))
        cut.wait_ready()
        assert all(proxy.proxy.connection_count for proxy in cut.proxies), "every link goes through its proxy"
        yield cut


class Reader(threading.Thread):
    """One client, reading its stream to the end."""

    def __init__(self, stream: ChatStream) -> None:
        super().__init__(name="reader", daemon=True)
        self.stream = stream
        self.seen = Seen()

    def run(self) -> None:
        try:
            for payload in self.stream.events():
                self.seen.take(payload)
        except Exception as error:  # noqa: BLE001 - whatever it is, a client saw it
            self.seen.error = f"{type(error).__name__}: {error}"

    def longest_gap(self, since: float) -> float:
        """The longest pause that ended after that moment."""
        times = self.seen.times
        return max((after - before for before, after in itertools.pairwise(times) if after > since), default=0.0)

    def breaches(self, whole: Seen, prompt_tokens: int) -> list[str]:
        found = self.seen.breaches(prompt_tokens)
        return found if self.seen.text == whole.text else [*found, f"another text: {self.seen.text!r}"]


@dataclass(frozen=True, slots=True)
class Outage:
    """One cut, and what came of it."""

    kind: str
    outage_seconds: float
    texts_before: int
    """Pieces of text that the client had when it was cut."""
    back_seconds: float
    """From the heal until the agent's link was up again."""
    gap_seconds: float
    """The longest pause that the client saw."""
    breaches: tuple[str, ...]


def outage(cut: CutPool, kind: str, draw: random.Random, whole: Seen, prompt_tokens: int) -> Outage:
    """One cut of the link that has a stream; all is well again when this returns."""
    before = cut.earned()
    reader = Reader(ask_afresh(cut.pool))
    serving = cut.number_of(reader.stream.node_id)
    agent_log, coordinator_log = len(cut.pool.nodes[serving].log()), len(cut.pool.coordinator.log())
    reader.start()
    texts = draw.randint(*CUT_AFTER_TEXTS)
    wait_until(lambda: len(reader.seen.texts) >= texts or not reader.is_alive(), STREAM_SECONDS_MAX, "the stream has begun")
    texts_before = len(reader.seen.texts)
    seconds = draw.uniform(0, WITHIN_SECONDS_MAX) if kind == "within" else draw.uniform(*AFTER_SECONDS)
    cut_at = time.monotonic()
    cut.proxies[serving].do(lambda proxy: proxy.cut(refuse=True))
    time.sleep(seconds)
    cut.proxies[serving].do(lambda proxy: proxy.heal())
    healed_at = time.monotonic()
    wait_until(lambda: bool(resumed_counts(cut, serving, agent_log)), STREAM_SECONDS_MAX, "the link is up again")
    back_seconds = time.monotonic() - healed_at
    reader.join(STREAM_SECONDS_MAX)
    cut.wait_ready()
    events = [event["event"] for event in cut.log_since(coordinator_log)]
    earned = [after - was for after, was in zip(cut.earned(), before, strict=True)]
    breaches = reader.breaches(whole, prompt_tokens)
    if texts_before >= TOKEN_COUNT:
        breaches.append("the stream was over before the cut")
    of_kind = stayed if kind == "within" else moved
    breaches += of_kind(events, resumed_counts(cut, serving, agent_log), earned, serving, prompt_tokens)
    gap_seconds = reader.longest_gap(cut_at)
    return Outage(kind, round(seconds, 3), texts_before, round(back_seconds, 3), round(gap_seconds, 3), tuple(breaches))


def resumed_counts(cut: CutPool, number: int, position: int) -> list[int]:
    """How many attempts each new link of the node has taken up again."""
    lines = cut.pool.nodes[number].log()[position:].splitlines()
    return [json.loads(line)["resumed_count"] for line in lines if line.startswith("{") and '"event": "link_up"' in line]


def stayed(events: list[str], resumed: list[int], earned: list[int], serving: int, prompt_tokens: int) -> list[str]:
    """What speaks against the stream's having stayed where it was, in its one attempt."""
    found = [f"the coordinator says {name}" for name in events if name in SIGNS_OF_MOVING]
    if resumed != [1]:
        found.append(f"the agent's new links resumed {resumed} attempts")
    whole_pay = net(prompt_tokens * PROMPT_PRICE + TOKEN_COUNT * COMPLETION_PRICE)
    right = [whole_pay if number == serving else 0 for number in range(len(earned))]
    return found if earned == right else [*found, f"the owners earned {earned}, and the answer is {whole_pay}"]


def moved(events: list[str], resumed: list[int], earned: list[int], serving: int, prompt_tokens: int) -> list[str]:
    """What speaks against the stream's having gone on elsewhere, each token paid once, to whoever it came from."""
    found = [] if "session_ended" in events else ["the cut node's session did not end"]
    if any(resumed):
        found.append(f"the agent's new links resumed {resumed} attempts")
    prompt = prompt_tokens * PROMPT_PRICE
    shares = {(net(hit * COMPLETION_PRICE), net(prompt + (TOKEN_COUNT - hit) * COMPLETION_PRICE)) for hit in range(1, TOKEN_COUNT)}
    return found if (earned[serving], earned[1 - serving]) in shares else [*found, f"the owners earned {earned}"]


def summary_of(outages: list[Outage]) -> dict:
    """For one kind."""
    back, gaps = (sorted(getattr(one, name) for one in outages) for name in ("back_seconds", "gap_seconds"))
    return {
        "kind": outages[0].kind,
        "count": len(outages),
        "back_seconds": {"median": back[len(back) // 2], "max": back[-1]},
        "gap_seconds": {"median": gaps[len(gaps) // 2], "max": gaps[-1]},
        "broken": sum(bool(one.breaches) for one in outages),
    }


def main() -> int:
    """Both halves of the show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="so many cuts of each kind")
    parser.add_argument("--seed", type=int, default=4, help="of when, and for how long")
    options = parser.parse_args()
    draw, failed = random.Random(options.seed), False
    with tempfile.TemporaryDirectory() as folder, cut_pool(Path(folder)) as cut:
        whole, prompt_tokens = undisturbed(cut)
        for kind in ("within", "after"):
            outages = []
            for _ in range(options.count):
                outages.append(outage(cut, kind, draw, whole, prompt_tokens))
                print(json.dumps(asdict(outages[-1])), flush=True)
            print(json.dumps(summary_of(outages)), flush=True)
            failed = failed or any(one.breaches for one in outages)
        findings = audit(cut.pool)
    print(json.dumps({"ok": not failed and not findings, "audit": findings}), flush=True)
    return 1 if failed or findings else 0


if __name__ == "__main__":
    sys.exit(main())
