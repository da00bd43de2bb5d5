"""Several gateways at once: every client meets every node, a gateway is killed under load, the directory is killed during streams.

    python -m tests.chaos.many_gateways --kills 20 --directory-kills 20

prints a line for each show and exits 1 if anything that was promised is broken: each gateway's clients are answered by every node, also by
those of another gateway; a killed gateway's nodes serve again within 5 s, and every gateway comes back; no answer ends early as if it were
whole; a client that asks again under its idempotency key is told the truth; no hold is left open, and the books balance; while the
directory is killed again and again, no stream notices; and while all gateways are restarted one after another, no answer is lost. The
killed gateway is each in turn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from tests.chaos.coordinator_loss import Load, wait_without_holds
from tests.chaos.gateway_pool import (
    BACK_SECONDS_MAX,
    GATEWAY_COUNT,
    SLOTS_PER_NODE,
    Cluster,
    GatewayClient,
    GatewayPool,
    pool_of_gateways,
    serves,
)
from tests.support.coordinator_process import wait_until
from tests.support.namespaces import Host
from tests.support.pool_processes import command
from tests.support.ray_hosts import ray_on_two_hosts
from tests.support.refusals import told_seconds

NODES_BACK_SECONDS_MAX = 5.0
LOAD_SECONDS = 2.0
PLACED_TRIES = 10
STREAMS_PER_GATEWAY = 2
STREAM_TOKENS = 400
"""Four seconds: a directory is back before."""


@dataclass(frozen=True, slots=True)
class Show:
    """One show, what was measured in it, and what of it was not as promised."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    broken: tuple[str, ...] = ()


def everyone_meets_everyone(pool: GatewayPool) -> Show:
    """Requests from clients of each gateway, several at a time, until each node has answered some."""
    pool.spread()
    homes = {node.node_id: home for node, home in pool.homes().items()}
    broken: list[str] = []
    met: dict[str, dict[str, int]] = {}
    refused_count = 0
    for number in range(GATEWAY_COUNT):
        counts = met.setdefault(f"gateway {number}", dict.fromkeys(homes, 0))
        for _ in range(PLACED_TRIES):
            count = SLOTS_PER_NODE * len(pool.nodes)
            with ThreadPoolExecutor(count) as threads:
                for answer in threads.map(lambda number: GatewayClient(pool, number).begin().end(), [number] * count):
                    refused_count += answer.refused_count
                    counts[answer.node_id] = counts.get(answer.node_id, 0) + 1
                    if not answer.is_whole:
                        broken.append(f"a client of gateway {number} got {answer.body[-200:]!r} of node {answer.node_id}")
            if all(counts[node_id] for node_id in homes):
                break
        broken += [f"node {node_id} answered no client of gateway {number}" for node_id in homes if not counts[node_id]]
    crossed = sum(
        count for number in range(GATEWAY_COUNT) for node_id, count in met[f"gateway {number}"].items() if homes.get(node_id) != number
    )
    return Show("everyone meets everyone", {"answers": met, "crossed": crossed, "refused": refused_count}, tuple(broken))


def lose_a_gateway(pool: GatewayPool, number: int) -> Show:
    """`kill -9` under load."""
    pool.spread()
    broken: list[str] = []
    held = [node for node, home in pool.homes().items() if home == number]
    with Load(pool) as load:
        time.sleep(LOAD_SECONDS)
        key = {"idempotency-key": f"show-{time.time_ns()}"}
        begun = GatewayClient(pool, number).begin(token_count=140, **key)
        begun.wait_begun()
        pool.gateways()[number].kill()
        killed_at = time.monotonic()
        with suppress(AssertionError):
            pool.wait_linked(NODES_BACK_SECONDS_MAX * 4)
        back_seconds = time.monotonic() - killed_at
        homes = pool.homes()
        broken += _told_the_truth(pool, next(other for other in range(GATEWAY_COUNT) if other != number), key)
        wait_until(lambda: serves(pool, number), BACK_SECONDS_MAX, "the gateway is back")
        whole_seconds = time.monotonic() - killed_at
        time.sleep(LOAD_SECONDS)
    if begun.end().is_whole:
        broken.append("the gateway had answered before it was killed")
    if back_seconds > NODES_BACK_SECONDS_MAX:
        broken.append(f"the nodes served again after {back_seconds:.1f} s")
    if load.complete == 0:
        broken.append("no answer was complete: there was no load")
    figures = {
        "number": number,
        "nodes_held": len(held),
        "went_to_another": sum(homes[node] not in {None, number} for node in held),
        "nodes_back_seconds": round(back_seconds, 2),
        "gateway_back_seconds": round(whole_seconds, 2),
        **_figures_of(load),
    }
    return Show("a gateway is killed", figures, (*broken, *_wrong_in_the_books(pool), *load.silent_ends))


def _told_the_truth(pool: GatewayPool, number: int, key: dict[str, str]) -> list[str]:
    """A client whose gateway died asks another one again under its key: first that it may be running, then that it is over, and charged."""
    said: list[str] = []
    give_up_at = time.monotonic() + BACK_SECONDS_MAX
    while time.monotonic() < give_up_at:
        response = GatewayClient(pool, number).ask(token_count=140, **key)
        error = json.loads(response.read()).get("error", {}) if response.status != HTTPStatus.OK else {}
        if told_seconds(response.status, response.headers) is None:
            said.append(error.get("code", str(response.status)))
        if said[-1:] == ["idempotency_key_spent"]:
            return [] if set(said) <= {"idempotency_key_in_flight", "idempotency_key_spent"} else [f"a client was told {said}"]
        time.sleep(float(response.headers.get("retry-after", 0.5)))
    return [f"a client that asked again under its key was told {said}"]


def lose_the_directory(pool: GatewayPool, kill_count: int) -> Show:
    """Killed again and again, as soon as it is back, while streams of both gateways run."""
    pool.spread()
    broken: list[str] = []
    back: list[float] = []
    whole_count, refused_count = 0, 0
    for _ in range(kill_count):
        with ThreadPoolExecutor(STREAMS_PER_GATEWAY * GATEWAY_COUNT) as threads:
            numbers = [number for number in range(GATEWAY_COUNT) for _ in range(STREAMS_PER_GATEWAY)]
            begun = list(threads.map(lambda number: GatewayClient(pool, number).begin(token_count=STREAM_TOKENS).wait_begun(), numbers))
            answers = [threads.submit(client.end) for client in begun]
            pool.directory().kill()
            killed_at = time.monotonic()
            if any(answer.done() for answer in answers):
                broken.append("a stream had ended before the kill")
            wait_until(lambda: _answers(pool), BACK_SECONDS_MAX, "the directory is back")
            back.append(time.monotonic() - killed_at)
            for answer in (one.result() for one in answers):
                refused_count += answer.refused_count
                whole_count += answer.is_whole
                if not answer.is_whole:
                    broken.append(f"a stream of node {answer.node_id} noticed: {answer.body[-200:]!r}")
    figures = {
        "kills": kill_count,
        "streams_whole": whole_count,
        "streams_refused_at_first": refused_count,
        "back_seconds_max": round(max(back), 2),
    }
    return Show("the directory is killed", figures, (*broken, *_wrong_in_the_books(pool)))


def restart_all(pool: GatewayPool) -> Show:
    """`potluck coordinator restart` under load: every gateway is another process afterwards, and no answer has noticed."""
    pool.spread()
    before = {number: process.pid for number, process in pool.gateways().items()}
    with Load(pool) as load:
        time.sleep(LOAD_SECONDS)
        with ThreadPoolExecutor(GATEWAY_COUNT) as threads:
            begun = list(
                threads.map(lambda number: GatewayClient(pool, number).begin(token_count=STREAM_TOKENS // 2), range(GATEWAY_COUNT))
            )
            answers = [threads.submit(client.end) for client in begun]
            began_at = time.monotonic()
            done = command(pool, "coordinator", "restart", "--json", "--data-dir", str(pool.coordinator.data_dir))
            seconds = time.monotonic() - began_at
            whole = [answer.result().is_whole for answer in answers]
        pool.wait_connected()
        time.sleep(LOAD_SECONDS)
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    served = [step["gateway"] for step in steps if step["state"] == "serving"]
    broken = [] if all(whole) else [f"streams that ran were whole: {whole}"]
    if done.returncode or served != list(range(GATEWAY_COUNT)):
        broken.append(f"the command ended with {done.returncode}: {done.stdout}{done.stderr}")
    if any(pool.gateways()[number].pid == pid for number, pid in before.items()):
        broken.append("a gateway is the same process as before")
    if load.broken:
        broken.append(f"{load.broken} answers broke: {dict(load.failures)}")
    figures = {"seconds": round(seconds, 1), **_figures_of(load), "steps": len(steps)}
    return Show("all gateways are restarted", figures, (*broken, *_wrong_in_the_books(pool), *load.silent_ends))


def _figures_of(load: Load) -> dict[str, Any]:
    return {"answers_complete": load.complete, "answers_broken": load.broken, "refused": load.refused}


def _wrong_in_the_books(pool: GatewayPool) -> list[str]:
    open_hold_count, findings = wait_without_holds(pool)
    return [*([f"{open_hold_count} holds are still open"] if open_hold_count else []), *findings]


def _answers(pool: GatewayPool) -> bool:
    """Whether the directory answers: to look at accounts takes it."""
    return pool.coordinator.get("/v1/models", pool.api_key + "x")[0] == HTTPStatus.UNAUTHORIZED


def shows(pool: GatewayPool, kill_count: int, directory_kill_count: int) -> Iterator[Callable[[], Show]]:
    """All of them, in their order."""
    yield lambda: everyone_meets_everyone(pool)
    for number in range(kill_count):
        yield partial(lose_a_gateway, pool, number % GATEWAY_COUNT)
    yield lambda: restart_all(pool)
    if directory_kill_count:
        yield lambda: lose_the_directory(pool, directory_kill_count)


def play_on_two_hosts(arguments: list[str]) -> int:
    """This program once more, on the first of two hosts with a Ray node each."""
    with ray_on_two_hosts() as (own, other, ray_address, environment):
        cluster = ["--cluster", own.address, other.name, other.address, ray_address]
        again = [*own.wrap, sys.executable, "-m", "tests.chaos.many_gateways", *arguments, *cluster]
        return subprocess.run(again, env=environment, check=False).returncode


def main() -> int:
    """Plays them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=4, help="of gateways [4]")
    parser.add_argument("--directory-kills", type=int, default=20, help="during streams [20]")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--two-hosts", action="store_true", help="the gateways on two hosts: network namespaces, for which it takes root")
    parser.add_argument("--cluster", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.two_hosts:
        return play_on_two_hosts([word for word in sys.argv[1:] if word != "--two-hosts"])
    cluster = Cluster()
    if arguments.cluster:
        own_address, name, address, ray_address = arguments.cluster
        cluster = Cluster(Host(name, address), own_address, ray_address)
    failed_count = 0
    with tempfile.TemporaryDirectory() as folder, pool_of_gateways(Path(folder), arguments.nodes, cluster) as pool:
        for play in shows(pool, arguments.kills, arguments.directory_kills):
            show = play()
            failed_count += bool(show.broken)
            print(json.dumps(asdict(show)), flush=True)
    print(f"{failed_count} shows with something broken", flush=True)
    return 1 if failed_count else 0


if __name__ == "__main__":
    sys.exit(main())
