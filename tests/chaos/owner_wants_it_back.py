"""The owner wants the machine back while it answers: how fast it is theirs, and whether any client notices.

    python -m tests.chaos.owner_wants_it_back [--words WORD,…] [--tiny]

Two real agents with llama.cpp and the built-in model (`--tiny`: a random one of half a megabyte), and clients that ask again and again. One
of the nodes is told to finish, meets the end of its hours, is told to pause, and gets another program on its card; between these it comes
back each time. There is no card: NVML is `tests.support.visited_agent`'s, the other program a process that sleeps. Prints a line of JSON
for each and exits 1 if a bound is broken: the measured seconds until the node takes no more, until its answers are handed over, until the
engine's process is gone with its memory, and every error that a client saw. It takes some five minutes, most of them waiting.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil

from potluck_node.domain.rest import GIB, LEFT_SECONDS
from potluck_protocol.values import NodeState
from tests.chaos.survival_pool import ANY_PACE
from tests.support import visited_agent
from tests.support.coordinator_process import CoordinatorProcess, runs
from tests.support.pool_processes import NodeProcess, Pool, audit, catalogue_entry, new_invite, wait_until
from tests.support.safetensors_model import built_in_gguf
from tests.support.steady_clients import SteadyClients
from tests.support.tiny_gguf import write_tiny_gguf

MODEL = "small"
CLIENT_COUNT = 3
ANY_PACE_OR_WAIT = (*ANY_PACE, "POTLUCK_COORDINATOR_QUEUE_DEADLINE_SECONDS=120")
"""An answer of an engine that shares two cores with another takes up to half a minute: whoever would be next may have to wait so long."""
SLOT_COUNT = 4
"""Of each replica: one of the two is to carry all clients while the other rests."""
CONTEXT_TOKENS = 2048
ANSWER_TOKENS, ANSWER_TOKENS_TINY = 300, 600
"""Some seconds long, even where three at a time share two busy cores; and with room for what a random model has written, which is of more
tokens when it is read again."""
DRAIN_SECONDS = 4.0
ADMISSION_SECONDS_MAX = {"finish": 2.0, "hours": 2.0, "pause": 2.0, "visitor": 8.0}
"""From the owner's word, or the edge, or the program's first byte on the card: cards are read every five seconds."""
STOP_SECONDS_MAX = 8.0
"""For an engine to be gone after what ran on it has ended or was handed back; it is killed after five."""
GAP_SECONDS_MAX = 30.0
"""Between two tokens of an answer that moved: `stream_survival` bounds it tightly. Here both nodes share their processors, also with
whatever else the machine does."""
BACK_SECONDS_MAX = 60.0
VISITOR_BYTES = 8 * GIB


class OwnersNode(NodeProcess):
    """A node whose owner types commands and has a settings file."""

    def _environment(self) -> dict[str, str]:
        return {**super()._environment(), "POTLUCK_NODE_MODELS_ALLOWED": MODEL, "POTLUCK_NODE_SCRIPTED_ENGINE": "false"}

    def settings(self, text: str) -> None:
        file = self.folder / "config" / "potluck" / "node.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"drain_seconds = {DRAIN_SECONDS}\n{text}")

    def says(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "potluck", "node", *arguments]
        return subprocess.Popen(command, env=self._environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def start_anew(self, settings: str) -> None:
        self.settings(settings)
        self.process.terminate()
        self.start_again()

    def control(self) -> dict[str, Any]:
        return json.loads((self.folder / "state" / "control.json").read_text())

    def visitor(self, visitor: dict[str, int] | None) -> None:
        file = self.folder / "state" / visited_agent.VISITOR
        if visitor is None:
            file.unlink()
            return
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps(visitor))
        draft.rename(file)

    def event_at(self, name: str, after: float, **fields: str) -> tuple[float, dict[str, Any]] | None:
        """When the agent first logged it after that time, in Unix seconds."""
        for line in self.log().splitlines():
            if f'"{name}"' not in line:
                continue
            event = json.loads(line)
            at = datetime.fromisoformat(event["timestamp"]).timestamp()
            if event["event"] == name and at >= after and all(event.get(key) == value for key, value in fields.items()):
                return at, event
        return None


@dataclass
class Shown:
    """One way to want it back: its figures, and the promises that were broken."""

    word: str
    figures: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def within(self, name: str, seconds: float | None, seconds_max: float) -> None:
        self.figures[name] = None if seconds is None else round(seconds, 2)
        if seconds is None or seconds > seconds_max:
            self.broken.append(f"{name}: {seconds if seconds is None else round(seconds, 2)}, {seconds_max} allowed")


@dataclass
class Show:
    """The pool, and its node whose owner comes back."""

    pool: Pool
    node: OwnersNode
    tokens_max: int

    def engines(self) -> list[psutil.Process]:
        return [child for child in self.node.agent().children(recursive=True) if runs(child)]

    def wait_serving(self) -> float:
        return self.pool.wait_connected(MODEL, BACK_SECONDS_MAX)

    def pool_state(self) -> NodeState:
        with self.pool.client() as client:
            return next(node.state for node in client.nodes() if node.node_id == self.node.node_id)

    def play(self, word: str, begin: Callable[[], float], *, finishes: bool) -> Shown:
        """Lets the owner come while clients are served; `begin` does it and returns when it was, in Unix seconds."""
        shown = Shown(word)
        with SteadyClients(self.pool, CLIENT_COUNT, model=MODEL, max_tokens=self.tokens_max, ignore_eos=True) as clients:
            wait_until(lambda: clients.under_way(self.node.node_id), 30, "an answer is under way on the node")
            engines = self.engines()
            shown.figures["engine_memory_mb"] = round(sum(process.memory_info().rss for process in engines) / 1e6)
            said_at = begin()
            moved = clients.under_way(self.node.node_id, said_at)
            gone_at = self._gone_at(engines, said_at)
            wait_until(lambda: self.node.event_at("memory_free", said_at), 10, "the node says that its memory is free")
            wait_until(lambda: self.pool_state() is NodeState.PAUSED, 10, "the pool knows that the node is paused")
            # What moved goes on elsewhere for a while.
            time.sleep(3)
        self._judge(shown, said_at, gone_at, finishes=finishes)
        shown.figures["answers"] = len(clients.answers)
        shown.figures["answers_under_way_there"] = len(moved)
        shown.within("longest_gap_of_an_answer_that_moved", max((answer.gap_seconds_max for answer in moved), default=0.0), GAP_SECONDS_MAX)
        shown.figures["client_errors"] = clients.troubles
        shown.broken += [f"a client saw: {trouble}" for trouble in clients.troubles]
        late = [answer for answer in clients.answers if answer.first_node_id == self.node.node_id and answer.began_at > gone_at]
        if late:
            shown.broken.append(f"{len(late)} answers began there after the machine was its owner's")
        shown.broken += [f"audit: {finding}" for finding in audit(self.pool)]
        return shown

    @staticmethod
    def _gone_at(engines: list[psutil.Process], said_at: float) -> float:
        """When the last process of the engine had ended."""
        assert engines, "the engine is there"
        while any(runs(process) for process in engines):
            assert time.time() - said_at < 60, "the engine lives on"
            time.sleep(0.01)
        return time.time()

    def _judge(self, shown: Shown, said_at: float, gone_at: float, *, finishes: bool) -> None:
        posture = "finish" if finishes else "hand_over"
        patience = DRAIN_SECONDS if finishes else 0.0
        admission_max = ADMISSION_SECONDS_MAX[shown.word]
        # The agent's own log says when it began to refuse: from that line on `attempts` takes nothing.
        stopped, handed, free = (
            self.node.event_at("rest", said_at - 1.5, posture=posture),
            self.node.event_at("handed_back", said_at - 1.5),
            self.node.event_at("memory_free", said_at - 1.5),
        )
        shown.within("seconds_to_stop_admitting", None if stopped is None else stopped[0] - said_at, admission_max)
        shown.within("seconds_to_hand_over", None if handed is None else handed[0] - said_at, admission_max + patience + 0.5)
        shown.figures["answers_handed_over"] = None if handed is None else handed[1]["count"]
        gone_max = admission_max + patience + STOP_SECONDS_MAX
        shown.within("seconds_until_the_engine_was_gone", gone_at - said_at, gone_max)
        shown.within("seconds_until_the_node_said_so", None if free is None else free[0] - said_at, gone_max)
        if free is not None and free[0] < gone_at - 0.1:
            shown.broken.append("the node said that memory is free while its engine lived")
        left = sum(process.memory_info().rss for process in self.engines())
        shown.figures["engine_memory_left_mb"] = round(left / 1e6)
        if left:
            shown.broken.append(f"{left} bytes are still held")


def by_command(word: str) -> Callable[[Show], Shown]:
    def played(show: Show) -> Shown:
        commands: list[subprocess.Popen[str]] = []

        def begin() -> float:
            before = show.node.control()["said_at_unix_ms"]
            commands.append(show.node.says(word, "--json"))
            wait_until(lambda: show.node.control()["said_at_unix_ms"] != before, 20, "the word is said")
            return float(show.node.control()["said_at_unix_ms"]) / 1000

        shown = show.play(word, begin, finishes=word == "finish")
        told, errors = commands[0].communicate(timeout=60)
        if commands[0].returncode or not json.loads(told)["memory_free"]:
            shown.broken.append(f"the command ended with {commands[0].returncode}: {told}{errors}")
        assert show.node.says("resume").wait(30) == 0
        shown.within("seconds_until_it_served_again", show.wait_serving(), BACK_SECONDS_MAX)
        return shown

    return played


def hours(show: Show) -> Shown:
    now = datetime.now().astimezone()
    edge = (now + timedelta(seconds=75)).replace(second=0, microsecond=0)
    show.node.start_anew(f'hours = ["{edge - timedelta(hours=1):%H:%M}-{edge:%H:%M}"]')
    show.wait_serving()

    def begin() -> float:
        while time.time() < edge.timestamp():
            time.sleep(0.01)
        return edge.timestamp()

    shown = show.play("hours", begin, finishes=True)
    show.node.start_anew("")
    shown.within("seconds_until_it_served_again", show.wait_serving(), BACK_SECONDS_MAX)
    return shown


def visitor(show: Show) -> Shown:
    with subprocess.Popen(["sleep", "600"]) as program:
        try:

            def begin() -> float:
                show.node.visitor({"pid": program.pid, "bytes": VISITOR_BYTES})
                return time.time()

            shown = show.play("visitor", begin, finishes=False)
            words = [line for line in show.node.status_words().splitlines() if "another program" in line]
            shown.figures["told"] = " ".join(words).strip(" |")
            if "sleep" not in shown.figures["told"]:
                shown.broken.append("the owner is not told which program it is")
        finally:
            program.kill()
    show.node.visitor(None)
    left_at = time.time()
    wait_until(lambda: not show.node.status_words().count("paused, memory free"), LEFT_SECONDS + 20, "the node serves again")
    shown.within("seconds_until_it_took_work_again", time.time() - left_at, LEFT_SECONDS + 15)
    if time.time() - left_at < LEFT_SECONDS:
        shown.broken.append("it came back before the program had stayed away")
    shown.within("seconds_until_it_served_again", show.wait_serving(), BACK_SECONDS_MAX)
    return shown


WORDS: dict[str, Callable[[Show], Shown]] = {
    "finish": by_command("finish"),
    "hours": hours,
    "pause": by_command("pause"),
    "visitor": visitor,
}


@contextmanager
def show_of(folder: Path, *, tiny: bool) -> Iterator[Show]:
    """A coordinator and two nodes with one replica each."""
    models = folder / "models"
    models.mkdir(parents=True)
    model = write_tiny_gguf(models / "tiny.gguf") if tiny else built_in_gguf()
    catalogue = models / "catalogue.toml"
    catalogue.write_text(catalogue_entry(MODEL, model, "llamacpp", CONTEXT_TOKENS, SLOT_COUNT))
    with ExitStack() as stack:
        coordinator = stack.enter_context(CoordinatorProcess(folder / "coordinator", "--catalogue", str(catalogue), wrap=ANY_PACE_OR_WAIT))
        coordinator.wait_ready()
        pool = Pool(folder, coordinator, [])
        for number, module in enumerate(("tests.support.visited_agent", "potluck")):
            node = OwnersNode(folder / f"node-{number}", new_invite(pool), module=module)
            pool.nodes.append(stack.enter_context(node))
            node.start_anew("")
        pool.wait_connected(MODEL, BACK_SECONDS_MAX)
        owners = pool.nodes[0]
        assert isinstance(owners, OwnersNode)
        yield Show(pool, owners, ANSWER_TOKENS_TINY if tiny else ANSWER_TOKENS)


def main() -> int:
    """Plays every word once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", default=",".join(WORDS), help="which, with commas between")
    parser.add_argument("--tiny", action="store_true", help="a random model of half a megabyte")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder, show_of(Path(folder), tiny=options.tiny) as show:
        for word in options.words.split(","):
            shown = WORDS[word](show)
            failed = failed or bool(shown.broken)
            print(json.dumps(asdict(shown)), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
