"""PostgreSQL goes away for ten seconds under load, and comes back: stopped in good order, killed, and frozen.

    python -m tests.chaos.database_outage --rounds 6 --seconds 10

prints a line for each round and exits 1 if anything that was promised is broken: answers that were running end whole and are paid, what is
asked meanwhile gets 503 with `Retry-After` and is told so soon, answers come again within seconds of the server's return, no hold stays
open, the books balance, and to the micro-credit nobody paid anything but what clients were shown. Every second client names idempotency
keys, and asks under the same one until it has its answer: none is locked, and none is paid twice.

The coordinator, the node and the server are processes of their own; clients speak HTTP.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Self
from urllib.error import HTTPError

from tests.chaos.coordinator_loss import wait_without_holds
from tests.support.coordinator_process import CoordinatorProcess
from tests.support.pool_processes import SLOT_COUNT, NodeProcess, Pool, new_invite, write_catalogue
from tests.support.postgresql import Cluster, cluster

HOW = ("stopped", "killed", "frozen")
CLIENT_COUNT = SLOT_COUNT + 2
"""So some wait for a place with their keys claimed when the server goes, and are refused then."""
PROMPT_PRICE, COMPLETION_PRICE = 1, 4
"""Micro-credits, as the catalogue says."""
REFUSED_SECONDS_MAX = 10.0
"""A server that stands still is noticed after five seconds, and a connection to it given up after three more."""
BACK_SECONDS_MAX = 10.0
RUN_UP_SECONDS = 2.0


@dataclass
class Round:
    """One absence and what came of it."""

    number: int
    how: str
    ran_through: int = 0
    """Answers that had begun before and ended while the database was away."""
    whole: int = 0
    refused: int = 0
    refused_after_seconds_max: float = 0.0
    keys_answered_later: int = 0
    """Requests that were refused under their key, asked again under it, and answered."""
    back_after_seconds: float = 0.0
    charged_micro_credits: int = 0
    """By what clients were shown."""
    lost_micro_credits: int = 0
    """What the books say beyond that, either way."""
    broken: list[str] = field(default_factory=list)


class Clients:
    """Each asks again as soon as it has its answer, or is refused."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.answers: list[tuple[float, float, int]] = []
        """Whole ones: when their first bytes came and when they ended, by the monotonic clock, and their price."""
        self.began_at: list[float] = []
        """Of all, whole or not."""
        self.refusals: list[tuple[float, float]] = []
        """503 with `Retry-After`: when asked and when told."""
        self.keys_refused: set[str] = set()
        self.keys_answered: set[str] = set()
        self.failures: Counter[str] = Counter()
        """Everything else."""
        # One after the other: at every moment of the run some answer has just begun, and another is about to end.
        starts_seconds = [RUN_UP_SECONDS * number / CLIENT_COUNT for number in range(CLIENT_COUNT)]
        self._threads = [
            threading.Thread(target=self._ask, args=(seconds, bool(number % 2)), daemon=True)
            for number, seconds in enumerate(starts_seconds)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client got no answer and no error"

    def _ask(self, first_after_seconds: float, with_keys: bool) -> None:
        self._stop.wait(first_after_seconds)
        key = None
        while not self._stop.is_set():
            asked_at = time.monotonic()
            if with_keys and (key is None or key in self.keys_answered):
                key = secrets.token_hex()
            try:
                stream = self._pool.stream(idempotency_key=key, stream_options={"include_usage": True})
                began_at, usage = time.monotonic(), {}
                self.began_at.append(began_at)
                for payload in stream.events():
                    if payload != "[DONE]":
                        usage = json.loads(payload).get("usage") or usage
                with self._lock:
                    if stream.done and usage:
                        price = usage["prompt_tokens"] * PROMPT_PRICE + usage["completion_tokens"] * COMPLETION_PRICE
                        self.answers.append((began_at, time.monotonic(), price))
                        self.keys_answered |= {key} if key is not None else set()
                    else:
                        self.failures[str(stream.error or "it just ended")] += 1
            except HTTPError as error:
                words = error.read().decode(errors="replace")
                with self._lock:
                    if error.code == HTTPStatus.SERVICE_UNAVAILABLE and int(error.headers.get("retry-after", 0)) > 0:
                        self.refusals.append((asked_at, time.monotonic()))
                        self.keys_refused |= {key} if key is not None else set()
                    else:
                        self.failures[f"{error.code} {words}"] += 1
                self._stop.wait(0.2)
            except OSError as error:
                with self._lock:
                    self.failures[repr(error)] += 1

    def wait_for_answer(self, since: float, seconds_max: float) -> float:
        """Seconds until an answer began after that time; the bound where none did."""
        give_up_at = time.monotonic() + seconds_max
        while time.monotonic() < give_up_at:
            if began_at := [at for at in self.began_at if at >= since]:
                return began_at[0] - since
            time.sleep(0.02)
        return seconds_max


@contextmanager
def away(server: Cluster, how: str) -> Iterator[None]:
    """Takes the server away, and gives it back."""
    if how == "frozen":
        with server.frozen():
            yield
        return
    server.stop() if how == "stopped" else server.kill()
    try:
        yield
    finally:
        server.start()


def play(pool: Pool, server: Cluster, number: int, how: str, seconds: float) -> Round:
    """One round: load, absence, return, and a look at every micro-credit."""
    result = Round(number, how)
    with pool.client() as client:
        before = client.credits()
    with Clients(pool) as clients:
        time.sleep(RUN_UP_SECONDS)
        with away(server, how):
            gone_at = time.monotonic()
            time.sleep(seconds)
            returns_at = time.monotonic()
        result.back_after_seconds = round(clients.wait_for_answer(returns_at, 3 * BACK_SECONDS_MAX), 2)
        time.sleep(RUN_UP_SECONDS)
    open_hold_count, findings = wait_without_holds(pool)
    with pool.client() as client:
        after = client.credits()
    result.ran_through = sum(began_at < gone_at < ended_at < returns_at for began_at, ended_at, _ in clients.answers)
    result.whole, result.refused = len(clients.answers), len(clients.refusals)
    result.refused_after_seconds_max = round(max((told - asked for asked, told in clients.refusals), default=0.0), 2)
    result.keys_answered_later = len(clients.keys_refused & clients.keys_answered)
    result.charged_micro_credits = sum(price for _, _, price in clients.answers)
    paid = before.available_micro_credits + before.held_micro_credits - after.available_micro_credits - after.held_micro_credits
    result.lost_micro_credits = abs(paid - result.charged_micro_credits)
    result.broken += findings
    result.broken += [f"{count} clients were told: {words}" for words, count in clients.failures.items()]
    for broken, words in (
        (open_hold_count, f"{open_hold_count} holds are still open"),
        (result.lost_micro_credits, f"clients were shown {result.charged_micro_credits} micro-credits and paid {paid}"),
        (not result.ran_through, "no answer ran through: there was no load"),
        (not result.refused, "nobody was refused: the database was there"),
        (not result.keys_answered_later, "nobody was refused under a key and answered under it later"),
        (result.refused_after_seconds_max > REFUSED_SECONDS_MAX, f"somebody waited {result.refused_after_seconds_max} s for a refusal"),
        (result.back_after_seconds > BACK_SECONDS_MAX, f"answers came again after {result.back_after_seconds} s"),
    ):
        result.broken += [words] if broken else []
    return result


@contextmanager
def pool_on_postgresql(folder: Path, answer_seconds: float) -> Iterator[tuple[Pool, Cluster]]:
    """One node, whose answers take so long, and a server that forgets nothing."""
    tokens = int(answer_seconds * 100)
    script = {"tokens": [f" {number}" for number in range(100)], "token_count": min(tokens, 400), "inter_token_ms": 10}
    with cluster(durable=True) as server, ExitStack() as stack:
        url = server.url(server.new_database(empty=True))
        flags = (
            "--catalogue",
            str(write_catalogue(folder / "models", script)),
            "--database-url",
            url,
            "--default-tier-rate",
            "100000/hour",
        )
        coordinator = stack.enter_context(CoordinatorProcess(folder / "coordinator", *flags))
        coordinator.wait_ready()
        pool = Pool(folder, coordinator, [])
        pool.nodes.append(stack.enter_context(NodeProcess(folder / "node", new_invite(pool))))
        pool.wait_connected()
        yield pool, server


def main() -> int:
    """Plays the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    failed_count = 0
    with tempfile.TemporaryDirectory() as folder, pool_on_postgresql(Path(folder), 4.0) as (pool, server):
        for number in range(arguments.rounds):
            result = play(pool, server, number, HOW[number % len(HOW)], arguments.seconds)
            failed_count += bool(result.broken)
            print(json.dumps(asdict(result)), flush=True)
    print(f"{arguments.rounds} rounds, {failed_count} with something broken", flush=True)
    return 1 if failed_count else 0


if __name__ == "__main__":
    sys.exit(main())
