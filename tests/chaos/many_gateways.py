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
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.coordinator_loss import Load, wait_without_holds
from tests.support.coordinator_process import CoordinatorProcess, wait_until
from tests.support.namespaces import Host
from tests.support.pool_processes import MODEL, SLOT_COUNT, NodeProcess, Pool, command, new_invite, write_catalogue
from tests.support.ray_hosts import ray_on_two_hosts

GATEWAY_COUNT = 2
NODES_BACK_SECONDS_MAX = 5.0
GATEWAYS_BACK_SECONDS_MAX = 30.0
LOAD_SECONDS = 2.0
SCRIPT = {"tokens": [f" {number}" for number in range(50)], "token_count": 150, "inter_token_ms": 10}
SPREAD_TRIES = 20
SLOTS_PER_NODE = 2
"""As many clients ask at a time: a gateway's own nodes are not enough for its clients."""
PLACED_TRIES = 10


@dataclass(frozen=True, slots=True)
class Show:
    """One show, what was measured in it, and what of it was not as promised."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    broken: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the gateways are: all on this host, or the second one on another, which joined a Ray cluster of this one's."""

    other: Host | None = None
    own_address: str = "127.0.0.1"
    ray_address: str = ""

    def address(self, number: int) -> str:
        """Of a gateway."""
        return self.other.address if self.other is not None and number else self.own_address

    def wrap(self, number: int) -> tuple[str, ...]:
        """What puts a command on a gateway's host."""
        return self.other.wrap if self.other is not None and number else ()


CLUSTER = Cluster()


def gateways(pool: Pool) -> dict[int, psutil.Process]:
    """Every gateway's process that serves now, by its number."""
    return _gateways_of_hosts() if CLUSTER.other is not None else _gateways_of_log(pool)


def _gateways_of_hosts() -> dict[int, psutil.Process]:
    """By their network namespaces: what the other host's gateway logs goes to Ray's files there."""
    here = Path("/proc/self/ns/net").readlink()
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter(["cmdline"]):
        with suppress(psutil.NoSuchProcess, OSError):
            if "".join(process.info["cmdline"] or ()).startswith("ray::GatewayActor") and _is_of_this_show(process):
                found[int(Path(f"/proc/{process.pid}/ns/net").readlink() != here)] = process
    return found


def _is_of_this_show(process: psutil.Process) -> bool:
    """Others may run coordinators on this machine; ours have our token."""
    return process.environ().get("RAY_AUTH_TOKEN_PATH") == os.environ["RAY_AUTH_TOKEN_PATH"]


def _gateways_of_log(pool: Pool) -> dict[int, psutil.Process]:
    found: dict[int, psutil.Process] = {}
    for line in pool.coordinator.log().splitlines():
        with suppress(ValueError, psutil.NoSuchProcess, KeyError):
            event = json.loads(line)
            if event["event"] == "actor_serving" and event["actor"] == "GatewayActor":
                found[event["number"]] = psutil.Process(event["process_id"])
    return {number: process for number, process in found.items() if process.is_running() and process.status() != psutil.STATUS_ZOMBIE}


def listening_ports(process: psutil.Process) -> set[int]:
    return {connection.laddr.port for connection in process.net_connections("tcp") if connection.status == psutil.CONN_LISTEN}


def gateway_of(pool: Pool, node: NodeProcess) -> int | None:
    """The number of the gateway that has the node's link; None where it has none now."""
    if CLUSTER.other is not None:
        last = json.loads((node.folder / "state" / "gateways.json").read_text())["last"]
        return int(last.startswith(CLUSTER.other.address))
    for number, process in gateways(pool).items():
        with suppress(psutil.NoSuchProcess):
            ports = listening_ports(process)
            links = [one for one in node.agent().net_connections("tcp") if one.status == psutil.CONN_ESTABLISHED and one.raddr]
            ends = {one.raddr.port for one in process.net_connections("tcp") if one.raddr and one.laddr.port in ports}
            if any(one.laddr.port in ends and one.raddr.port in ports for one in links):
                return number
    return None


def spread(pool: Pool) -> None:
    """Sees to it that each gateway has a node: the kernel deals connections to a shared port at random."""
    for _ in range(SPREAD_TRIES):
        homes = {node: gateway_of(pool, node) for node in pool.nodes}
        if set(homes.values()) >= set(range(GATEWAY_COUNT)):
            return
        one = next(node for node in pool.nodes if list(homes.values()).count(homes[node]) > 1)
        one.process.terminate()
        one.process.wait(20)
        _forget_gateway(one, next(number for number in range(GATEWAY_COUNT) if number not in homes.values()))
        one.start_again()
        pool.wait_connected()
    raise AssertionError(f"after {SPREAD_TRIES} tries the nodes are with {homes.values()}")


def _forget_gateway(node: NodeProcess, wanted: int) -> None:
    """The node dials anew: on one host wherever the kernel has it, on two the gateway that is wanted first."""
    file = node.folder / "state" / "gateways.json"
    known = json.loads(file.read_text())["known"] if CLUSTER.other is not None else []
    file.unlink(missing_ok=True)
    there = [address for address in known if address.startswith(f"{CLUSTER.address(wanted)}:")]
    if there:
        file.write_text(json.dumps({"last": there[0], "known": known}))


class Client:
    """One client's connection, which leads to one gateway; made so often until it does."""

    def __init__(self, pool: Pool, number: int) -> None:
        port = pool.coordinator.wait_ready()["http"]
        self._api_key = pool.api_key
        for _ in range(64):
            self.connection = http.client.HTTPConnection(CLUSTER.address(number), port, timeout=60)
            self.connection.request("GET", "/metrics", headers={"authorization": f"Bearer {self._api_key}"})
            if b'potluck_nodes_connected{gateway="%d"}' % number in self.connection.getresponse().read():
                return
            self.connection.close()
        raise AssertionError(f"no connection out of 64 led to gateway {number}")

    def ask(self, *, token_count: int = 100, stream: bool = True, **headers: str) -> http.client.HTTPResponse:
        body = {"model": MODEL, "stream": stream, "max_tokens": token_count, "messages": [{"role": "user", "content": "count"}]}
        sent = {"authorization": f"Bearer {self._api_key}", "content-type": "application/json", **headers}
        self.connection.request("POST", "/v1/chat/completions", json.dumps(body), sent)
        return self.connection.getresponse()

    def answer(self, **wanted: Any) -> tuple[str, bytes]:
        """Which node answered, and with what."""
        response = self.ask(**wanted)
        return response.headers.get("x-potluck-node", ""), response.read()


def everyone_meets_everyone(pool: Pool) -> Show:
    """Requests from clients of each gateway, several at a time, until each node has answered some."""
    spread(pool)
    homes = {node.node_id: gateway_of(pool, node) for node in pool.nodes}
    broken: list[str] = []
    met: dict[str, dict[str, int]] = {}
    for number in range(GATEWAY_COUNT):
        counts = met.setdefault(f"gateway {number}", dict.fromkeys(homes, 0))
        for _ in range(PLACED_TRIES):
            count = SLOTS_PER_NODE * len(pool.nodes)
            with ThreadPoolExecutor(count) as threads:
                # Each dials and asks at once: a connection that brings nothing for ten seconds is closed.
                for node_id, body in threads.map(lambda number: Client(pool, number).answer(), [number] * count):
                    if not body.rstrip().endswith(b"[DONE]"):
                        broken.append(f"a client of gateway {number} got {body[-200:]!r} of node {node_id}")
                    counts[node_id] = counts.get(node_id, 0) + 1
            if all(counts[node_id] for node_id in homes):
                break
        broken += [f"node {node_id} answered no client of gateway {number}" for node_id in homes if not counts[node_id]]
    crossed = sum(
        count for number in range(GATEWAY_COUNT) for node_id, count in met[f"gateway {number}"].items() if homes.get(node_id) != number
    )
    return Show("everyone meets everyone", {"answers": met, "crossed": crossed}, tuple(broken))


def lose_a_gateway(pool: Pool, number: int) -> Show:
    """`kill -9` under load."""
    spread(pool)
    broken: list[str] = []
    held = [node for node in pool.nodes if gateway_of(pool, node) == number]
    with Load(pool) as load:
        time.sleep(LOAD_SECONDS)
        key = {"idempotency-key": f"show-{time.time_ns()}"}
        begun = Client(pool, number).ask(token_count=140, **key)
        begun.read1(1)
        gateways(pool)[number].kill()
        killed_at = time.monotonic()
        with suppress(AssertionError):
            pool.wait_connected(seconds_max=NODES_BACK_SECONDS_MAX * 4)
        back_seconds = time.monotonic() - killed_at
        others = sum(gateway_of(pool, node) not in {None, number} for node in held)
        broken += _told_the_truth(pool, next(other for other in range(GATEWAY_COUNT) if other != number), key)
        wait_until(lambda: len(gateways(pool)) == GATEWAY_COUNT, GATEWAYS_BACK_SECONDS_MAX, "every gateway is back")
        whole_seconds = time.monotonic() - killed_at
        time.sleep(LOAD_SECONDS)
    if back_seconds > NODES_BACK_SECONDS_MAX:
        broken.append(f"the nodes served again after {back_seconds:.1f} s")
    open_hold_count, findings = wait_without_holds(pool)
    if open_hold_count:
        broken.append(f"{open_hold_count} holds are still open")
    if load.complete == 0:
        broken.append("no answer was complete: there was no load")
    broken += [*findings, *load.silent_ends]
    figures = {
        "number": number,
        "nodes_held": len(held),
        "went_to_another": others,
        "nodes_back_seconds": round(back_seconds, 2),
        "gateway_back_seconds": round(whole_seconds, 2),
        "answers_complete": load.complete,
        "answers_broken": load.broken,
    }
    return Show("a gateway is killed", figures, tuple(broken))


def _told_the_truth(pool: Pool, number: int, key: dict[str, str]) -> list[str]:
    """A client whose gateway died asks another one again under its key: first that it may be running, then that it is over, and charged."""
    said: list[str] = []
    give_up_at = time.monotonic() + GATEWAYS_BACK_SECONDS_MAX
    while time.monotonic() < give_up_at:
        response = Client(pool, number).ask(token_count=140, **key)
        error = json.loads(response.read()).get("error", {}) if response.status != 200 else {}
        said.append(error.get("code", str(response.status)))
        if said[-1] == "idempotency_key_spent":
            return [] if set(said) <= {"idempotency_key_in_flight", "idempotency_key_spent"} else [f"a client was told {said}"]
        time.sleep(float(response.headers.get("retry-after", 0.5)))
    return [f"a client that asked again under its key was told {said}"]


def lose_the_directory(pool: Pool, kill_count: int) -> Show:
    """Killed again and again, as soon as it is back, while streams of both gateways run."""
    spread(pool)
    kill_count_left, broken, back = kill_count, [], []
    complete = 0
    with ThreadPoolExecutor(2 * GATEWAY_COUNT) as threads:
        while kill_count_left:
            clients = [Client(pool, number) for number in range(GATEWAY_COUNT) for _ in range(2)]
            answers = [threads.submit(client.answer, token_count=400) for client in clients]
            time.sleep(0.3)
            directory = pool.coordinator.actor("DirectoryActor")
            directory.kill()
            killed_at = time.monotonic()
            kill_count_left -= 1
            for answer in answers:
                node_id, body = answer.result()
                whole = body.rstrip().endswith(b"[DONE]") and b'"error"' not in body
                complete += whole
                if not whole:
                    broken.append(f"a stream of node {node_id} noticed: {body[-200:]!r}")
            wait_until(lambda: _answers(pool), GATEWAYS_BACK_SECONDS_MAX, "the directory is back")
            back.append(round(time.monotonic() - killed_at, 2))
    open_hold_count, findings = wait_without_holds(pool)
    if open_hold_count:
        broken.append(f"{open_hold_count} holds are still open")
    return Show(
        "the directory is killed", {"kills": kill_count, "streams_whole": complete, "round_seconds_max": max(back)}, (*broken, *findings)
    )


def restart_all(pool: Pool) -> Show:
    """`potluck coordinator restart` under load: every gateway is another process afterwards, and no answer has noticed."""
    spread(pool)
    before = {number: process.pid for number, process in gateways(pool).items()}
    with Load(pool) as load:
        time.sleep(LOAD_SECONDS)
        clients = [Client(pool, number) for number in range(GATEWAY_COUNT)]
        with ThreadPoolExecutor(len(clients)) as threads:
            answers = [threads.submit(client.answer, token_count=400) for client in clients]
            time.sleep(0.3)
            began_at = time.monotonic()
            done = command(pool, "coordinator", "restart", "--json", "--data-dir", str(pool.coordinator.data_dir))
            seconds = time.monotonic() - began_at
            whole = [body.rstrip().endswith(b"[DONE]") and b'"error"' not in body for _, body in (answer.result() for answer in answers)]
        pool.wait_connected()
        time.sleep(LOAD_SECONDS)
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    served = [step["gateway"] for step in steps if step["state"] == "serving"]
    broken = [] if all(whole) else [f"streams that ran were whole: {whole}"]
    if done.returncode or served != list(range(GATEWAY_COUNT)):
        broken.append(f"the command ended with {done.returncode}: {done.stdout}{done.stderr}")
    if any(gateways(pool)[number].pid == pid for number, pid in before.items()):
        broken.append("a gateway is the same process as before")
    if load.broken:
        broken.append(f"{load.broken} answers broke: {dict(load.failures)}")
    open_hold_count, findings = wait_without_holds(pool)
    if open_hold_count:
        broken.append(f"{open_hold_count} holds are still open")
    figures = {"seconds": round(seconds, 1), "answers_complete": load.complete, "answers_broken": load.broken, "steps": len(steps)}
    return Show("all gateways are restarted", figures, (*broken, *findings, *load.silent_ends))


def _answers(pool: Pool) -> bool:
    """Whether the directory answers: to look at accounts takes it."""
    return pool.coordinator.get("/v1/models", pool.api_key + "x")[0] == 401


@contextmanager
def pool_of_gateways(folder: Path, node_count: int = 4) -> Iterator[Pool]:
    """A coordinator of two gateways, and nodes; of two hosts every second one is on the other."""
    catalogue = write_catalogue(folder / "models", SCRIPT)
    catalogue.write_text(catalogue.read_text().replace(f"slot_count = {SLOT_COUNT}", f"slot_count = {SLOTS_PER_NODE}"))
    flags = ["--catalogue", str(catalogue), "--gateways", str(GATEWAY_COUNT), "--host", CLUSTER.own_address]
    if CLUSTER.ray_address:
        flags += ["--ray-address", CLUSTER.ray_address]
    with ExitStack() as stack:
        coordinator = stack.enter_context(CoordinatorProcess(folder / "coordinator", *flags))
        coordinator.wait_ready()
        pool = Pool(folder, coordinator, [])
        for number in range(node_count):
            pool.nodes.append(stack.enter_context(NodeProcess(folder / f"node-{number}", new_invite(pool), wrap=CLUSTER.wrap(number % 2))))
        pool.wait_connected()
        yield pool


def shows(pool: Pool, kill_count: int, directory_kill_count: int) -> Iterator[Callable[[], Show]]:
    """All of them, in their order."""
    yield lambda: everyone_meets_everyone(pool)
    for number in range(kill_count):
        yield lambda number=number: lose_a_gateway(pool, number % GATEWAY_COUNT)
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
    if arguments.cluster:
        own_address, name, address, ray_address = arguments.cluster
        globals()["CLUSTER"] = Cluster(Host(name, address), own_address, ray_address)
    failed_count = 0
    with tempfile.TemporaryDirectory() as folder, pool_of_gateways(Path(folder), arguments.nodes) as pool:
        for play in shows(pool, arguments.kills, arguments.directory_kills):
            show = play()
            failed_count += bool(show.broken)
            print(json.dumps(asdict(show)), flush=True)
    print(f"{failed_count} shows with something broken", flush=True)
    return 1 if failed_count else 0


if __name__ == "__main__":
    sys.exit(main())
