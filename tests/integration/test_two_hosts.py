"""Coordinator and volunteer on two hosts: it works, and nothing listens that should not.

Needs root and network namespaces; run it alone with `pytest -m namespaces`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support import namespaces
from tests.support.coordinator_process import CoordinatorProcess, wait_until
from tests.support.pool_processes import MODEL, NodeProcess, write_catalogue

pytestmark = [
    pytest.mark.namespaces,
    pytest.mark.skipif(not namespaces.available(), reason="needs root and `ip netns` (Debian's iproute2)"),
    pytest.mark.timeout(180),
]

TRY_PORTS = """
import json, socket, sys
host, ports = sys.argv[1], json.loads(sys.argv[2])
def opens(port):
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((host, port)) == 0
print(json.dumps([port for port in ports if opens(port)]))
"""


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in {"::1", "::ffff:127.0.0.1"}


def potluck(host, environment, *arguments, check=True):
    """`potluck …` on one of the hosts."""
    return subprocess.run(
        [*host.wrap, sys.executable, "-m", "potluck", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=check,
    ).stdout


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """The hosts, the running coordinator, the running node, and the environment that makes a shell the operator's."""
    folder = tmp_path_factory.mktemp("two-hosts")
    catalogue = write_catalogue(folder / "models")
    with namespaces.two_hosts() as (operator, volunteer):
        flags = ("--host", operator.address, "--catalogue", str(catalogue))
        with CoordinatorProcess(folder / "coordinator", *flags, wrap=operator.wrap) as coordinator:
            coordinator.wait_ready()
            environment = {"POTLUCK_COORDINATOR_DATA_DIR": str(coordinator.data_dir)}
            invite = next(word for word in potluck(operator, environment, "tokens", "create").split() if word.startswith("potluck1."))
            with NodeProcess(folder / "node", invite, wrap=volunteer.wrap) as node:

                def serves() -> bool:
                    (model,) = (row for row in json.loads(potluck(operator, environment, "models", "--json")) if row["model_id"] == MODEL)
                    return model["ready_replica_count"] == 1

                wait_until(serves, 60, f"the node serves\n{node.log()}\n{coordinator.log()}")
                yield operator, volunteer, coordinator, environment


def test_a_chat_travels_between_the_hosts(pool):
    operator, _, _, environment = pool
    assert " 1 2 3 4" in potluck(operator, environment, "chat", "count", "--model", MODEL, "--max-tokens", "12")


def test_the_volunteer_listens_on_loopback_only(pool):
    _, volunteer, _, _ = pool
    listeners = volunteer.listeners()
    assert listeners, "the engine listens somewhere"
    assert [listener for listener in listeners if not is_loopback(listener[0])] == []


def test_the_coordinator_has_three_ports_and_ray_none(pool):
    operator, volunteer, coordinator, _ = pool
    endpoints = json.loads(coordinator.endpoints_file.read_text())
    documented = sorted(endpoints[name] for name in ("http", "grpc", "link"))
    listeners = operator.listeners()
    assert sorted(port for address, port in listeners if not is_loopback(address)) == documented
    assert len(listeners) > len(documented), "Ray listens, on loopback"
    every_port = sorted({port for _, port in listeners})
    reachable = volunteer.run(sys.executable, "-c", TRY_PORTS, operator.address, json.dumps(every_port))
    assert json.loads(reachable) == documented
