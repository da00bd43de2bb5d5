"""The gateway's process, the directory's process, and the whole coordinator die under load, again and again.

    python -m tests.chaos.coordinator_loss --rounds 50

prints a line for each round and exits 1 if anything that was promised is broken: nodes back within 10 s of the return, accounts, nodes,
keys and catalogue as they were, no hold left open, books that balance, no answer that ends early as if it were whole, and none that breaks
where only the directory died. A gateway or directory returns by itself, so its time counts from
the kill; a coordinator returns when somebody has started another and that one serves.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self
from urllib.error import HTTPError

import psutil

from tests.support.coordinator_process import CoordinatorProcess
from tests.support.pool_processes import NodeProcess, Pool, command, new_invite, write_catalogue
from tests.support.refusals import REFUSED_SECONDS_MAX, told_seconds

BACK_SECONDS_MAX = 10.0
HOLDS_SECONDS_MAX = 10.0
STREAM_COUNT = 4
LOAD_SECONDS = 2.0
VICTIMS = ("gateway", "directory", "coordinator")
SCRIPT = {"tokens": [f" {number}" for number in range(50)], "token_count": 150, "inter_token_ms": 10}


@dataclass(frozen=True, slots=True)
class Round:
    """One kill and what came of it."""

    number: int
    victim: str
    back_after_seconds: float
    answers_complete: int
    answers_broken: int
    open_hold_count: int
    broken: tuple[str, ...]


class Load:
    """Clients that ask again as soon as they have their answer, or none, or when they were told to come again."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.complete = 0
        self.broken = 0
        self.refused = 0
        """Told to come again before anything of an answer came: no answer broke by that, unless it goes on for too long."""
        self.silent_ends: list[str] = []
        """Answers that looked whole and were not: no `[DONE]`, no error, and nothing wrong with the connection."""
        self.failures: Counter[str] = Counter()
        """What clients were told of the others, and how often."""
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(STREAM_COUNT)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self) -> None:
        refused_since = None
        while not self._stop.is_set():
            complete, told = self.ask_once()
            refused_since = None if told is None else refused_since or time.monotonic()
            if refused_since is not None and time.monotonic() - refused_since > REFUSED_SECONDS_MAX:
                with self._lock:
                    self.broken += 1
                    self.failures["refused for too long"] += 1
            self._stop.wait(0.0 if complete else told or 0.1)

    def ask_once(self) -> tuple[bool, float | None]:
        """Whether a complete answer came; else, if it was told so, after how many seconds to come again."""
        complete, silent_end, failure, told = False, "", "", None
        try:
            stream = self._pool.stream()
            stream.read_to_end()
            complete = stream.done
            if not complete and stream.error is None:
                silent_end = f"an answer of {stream.node_id} just ended after {stream.token_count} tokens"
            failure = "" if complete else str(stream.error)
        except HTTPError as error:
            told = told_seconds(error.code, error.headers)
            failure = error.read().decode(errors="replace")
        except Exception as error:  # noqa: BLE001 - while something is dead, clients fail in every way there is, but they notice
            failure = repr(error)
        with self._lock:
            self.complete += complete
            self.broken += not complete and told is None
            self.refused += told is not None
            self.silent_ends += [silent_end] if silent_end else []
            self.failures += Counter([failure] if failure else [])
        return complete, told


def standing(pool: Pool) -> dict[str, Any]:
    """What must survive: who and what there is, without what changes by itself."""
    keep = {
        "accounts": ("account_id", "name"),
        "keys": ("key_prefix", "name", "revoked"),
    }
    found: dict[str, Any] = {
        noun: sorted(tuple(row[name] for name in names) for row in json.loads(command(pool, noun, "list", "--json").stdout))
        for noun, names in keep.items()
    }
    with pool.client() as client:
        found["nodes"] = sorted((node.node_id, node.display_name) for node in client.nodes())
        found["models"] = sorted(model.model_id for model in client.models())
    return found


def kill(pool: Pool, victim: str, catalogue: Path, stack: ExitStack) -> float:
    """Kills it; for the whole coordinator also starts another. The monotonic seconds from which nodes have 10 s to be back."""
    coordinator = pool.coordinator
    if victim != "coordinator":
        coordinator.actor(f"{victim.title()}Actor").kill()
        return time.monotonic()
    endpoints = json.loads(coordinator.endpoints_file.read_text())
    for process in coordinator.processes():
        kill_process(process)
    coordinator.process.wait(10)
    ports = (endpoints["http"], endpoints["grpc"], endpoints["link"])
    pool.coordinator = stack.enter_context(CoordinatorProcess(coordinator.data_dir, "--catalogue", str(catalogue), ports=ports))
    pool.coordinator.wait_ready()
    return time.monotonic()


def kill_process(process: psutil.Process) -> None:
    """Some die of their parent's death first."""
    try:
        os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def wait_without_holds(pool: Pool) -> tuple[int, list[str]]:
    """How many holds are still open once they should all be settled, and what the audit finds."""
    give_up_at = time.monotonic() + HOLDS_SECONDS_MAX
    while True:
        report = json.loads(command(pool, "audit", "--json").stdout)
        if report["open_hold_count"] == 0 or time.monotonic() > give_up_at:
            return report["open_hold_count"], report["findings"]
        time.sleep(0.2)


def play(pool: Pool, number: int, catalogue: Path, stack: ExitStack) -> Round:
    """One round: load, kill, return, and a look at everything."""
    victim = VICTIMS[number % len(VICTIMS)]
    before = standing(pool)
    broken: list[str] = []
    with Load(pool) as load:
        time.sleep(LOAD_SECONDS)
        returned_at = kill(pool, victim, catalogue, stack)
        pool.wait_connected()
        back_after_seconds = time.monotonic() - returned_at
        time.sleep(LOAD_SECONDS)
    if back_after_seconds > BACK_SECONDS_MAX:
        broken.append(f"nodes were back after {back_after_seconds:.1f} s")
    if (after := standing(pool)) != before:
        broken.append(f"changed: {before} is now {after}")
    open_hold_count, findings = wait_without_holds(pool)
    if open_hold_count:
        broken.append(f"{open_hold_count} holds are still open")
    broken += load.silent_ends
    if load.complete == 0:
        broken.append("no answer was complete: there was no load")
    # Neither is a client sent away: what needs the books waits for them.
    not_answered = load.broken + load.refused
    if victim == "directory" and not_answered:
        broken.append(f"{not_answered} answers broke, although only the directory died: {dict(load.failures)}")
    return Round(number, victim, round(back_after_seconds, 2), load.complete, not_answered, open_hold_count, (*broken, *findings))


@contextmanager
def pool_to_break(folder: Path, node_count: int) -> Iterator[tuple[Pool, Path, ExitStack]]:
    """As `running_pool`, with a stack for the coordinators that come after the first."""
    catalogue = write_catalogue(folder / "models", SCRIPT)
    with ExitStack() as stack:
        coordinator = stack.enter_context(CoordinatorProcess(folder / "coordinator", "--catalogue", str(catalogue)))
        coordinator.wait_ready()
        pool = Pool(folder, coordinator, [])
        for number in range(node_count):
            pool.nodes.append(stack.enter_context(NodeProcess(folder / f"node-{number}", new_invite(pool))))
        pool.wait_connected()
        yield pool, catalogue, stack


def main() -> int:
    """Plays the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--nodes", type=int, default=2)
    arguments = parser.parse_args()
    failed_count = 0
    with tempfile.TemporaryDirectory() as folder, pool_to_break(Path(folder), arguments.nodes) as (pool, catalogue, stack):
        for number in range(arguments.rounds):
            result = play(pool, number, catalogue, stack)
            failed_count += bool(result.broken)
            print(json.dumps(asdict(result)), flush=True)
    print(f"{arguments.rounds} rounds, {failed_count} with something broken", flush=True)
    return 1 if failed_count else 0


if __name__ == "__main__":
    sys.exit(main())
