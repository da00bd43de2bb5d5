"""An operator's Ray cluster of two hosts: each host gets its gateways.

Needs root and network namespaces; run it alone with `pytest -m namespaces`.
"""

from __future__ import annotations

import json

import pytest

from tests.support import namespaces
from tests.support.coordinator_process import CoordinatorProcess
from tests.support.ray_hosts import ray_on_two_hosts

pytestmark = [
    pytest.mark.namespaces,
    pytest.mark.skipif(not namespaces.available(), reason="needs root and `ip netns` (Debian's iproute2)"),
    pytest.mark.timeout(180),
]


def test_gateways_go_to_the_hosts_in_turn(tmp_path, monkeypatch):
    with ray_on_two_hosts() as (own, other, ray_address, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        flags = ("--host", own.address, "--gateways", "4", "--ray-address", ray_address)
        with CoordinatorProcess(tmp_path / "coordinator", *flags, wrap=own.wrap) as coordinator:
            http_port = coordinator.wait_ready()["http"]
            events = [json.loads(line) for line in coordinator.log().splitlines() if line.startswith("{")]
            # Only the own host's gateways write to the coordinator's log.
            assert sorted(event["number"] for event in events if event["event"] == "gateway_serving") == [0, 2]
            for host in (own, other):
                assert host.listeners().count((host.address, http_port)) == 2
