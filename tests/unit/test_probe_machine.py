"""What is read of the machine around the cards: the bus, the kernel's log, processors, the way to the coordinator, the inventory."""

from __future__ import annotations

import asyncio
import email.utils
import os
import socket
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import structlog.testing

from potluck_node.domain.hardware import CardPair, DriverAbsence, PeerStatus, Reach, Slot, XidEvent
from potluck_node.probe import host, inventory, kernel_log, network, nvidia, pci
from potluck_node.probe.engine_cuda import cuda_of
from potluck_node.probe.nvml import NvmlLibrary
from potluck_protocol.values import Accelerator, Inventory
from tests.support.nvml_dump import DumpedDriver, load_dump, write_sysfs

MIB = 2**20


def library_of(name: str) -> NvmlLibrary:
    driver = DumpedDriver(load_dump(name))
    return NvmlLibrary(lambda: driver)


def test_a_slot_is_read_as_the_kernel_wires_it(tmp_path):
    root = write_sysfs(load_dump("card_at_x4"), tmp_path)
    assert pci.read_slot("0000:01:00.0", root) == Slot(numa_node=None, card_width_max=16, slot_width_max=4)
    assert pci.read_slot("0000:99:00.0", root) == Slot()
    assert pci.read_slot(None, root) == Slot()


def test_numbers_that_the_kernel_writes_for_nothing_are_no_facts(tmp_path):
    root = write_sysfs(load_dump("two_memory_nodes"), tmp_path)
    card = root / "bus/pci/devices/0000:09:00.0"
    assert pci.read_slot("0000:09:00.0", root).numa_node == 0
    (card / "max_link_width").write_text("255\n")
    (card / "numa_node").write_text("none\n")
    assert pci.read_slot("0000:09:00.0", root) == Slot(slot_width_max=16)


def test_cards_on_the_bus_are_counted_with_a_driver_or_without(tmp_path):
    root = write_sysfs(load_dump("two_memory_nodes"), tmp_path)
    assert pci.nvidia_card_count(root) == 2
    (root / "bus/pci/devices/0000:09:00.0/class").write_text("0x040300\n")
    assert pci.nvidia_card_count(root) == 1
    assert pci.nvidia_card_count(tmp_path / "nothing") is None


def test_faults_are_found_in_the_kernels_log_in_either_form():
    lines = (
        "3,813,90211,-;NVRM: Xid (PCI:0000:2B:00): 79, pid=6755, name=python3, GPU has fallen off the bus.",
        "NVRM: Xid (0000:01:00): 32, Channel ID 00000005",
        "NVRM: GPU at PCI:0000:01:00: GPU-10000000-0000-4000-8000-000000000001",
        "usb 1-2: Xid is no fault here",
    )
    assert kernel_log.xid_events(lines) == (XidEvent(79, "0000:2b:00.0"), XidEvent(32, "0000:01:00.0"))


def test_the_log_is_read_to_its_end_and_does_not_wait_for_more(tmp_path):
    pipe = tmp_path / "kmsg"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)
    try:
        os.write(writer, b"NVRM: Xid (PCI:0000:01:00): 13, pid=1\n")
        assert kernel_log.read_xids(pipe) == (XidEvent(13, "0000:01:00.0"),)
    finally:
        os.close(writer)


def test_a_log_that_may_not_be_read_is_a_missing_fact_and_not_an_empty_one(monkeypatch, tmp_path):
    def refused() -> tuple[XidEvent, ...]:
        raise PermissionError

    monkeypatch.setattr(kernel_log, "read_xids", refused)
    assert inventory.examine(tmp_path, library=library_of("driver_not_loaded"), sysfs=tmp_path).xids is None


def test_processors_are_named_and_belong_to_memory_nodes(tmp_path):
    information = tmp_path / "cpuinfo"
    information.write_text("processor\t: 0\nmodel name\t: AMD EPYC 7302 16-Core Processor\n\nprocessor\t: 1\nmodel name\t: other\n")
    assert host.cpu_name(information) == "AMD EPYC 7302 16-Core Processor"
    allowed = sorted(os.sched_getaffinity(0))
    for node, cpus in (("node0", f"{allowed[0]},900-903"), ("node1", "904-999"), ("node2", ""), ("possible", "0")):
        (tmp_path / "nodes" / node).mkdir(parents=True)
        (tmp_path / "nodes" / node / "cpulist").write_text(cpus + "\n")
    assert host.numa_nodes_allowed(tmp_path / "nodes") == (0,)


@contextmanager
def coordinator_whose_clock_is(ahead_seconds: float, status: int = 200):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(status)
            if ahead_seconds is not None:
                self.send_header("Date", email.utils.formatdate(time.time() + ahead_seconds, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("status", [200, 503])
@pytest.mark.parametrize("ahead_seconds", [0, 400, -90])
def test_the_clock_is_compared_with_the_coordinators(monkeypatch, ahead_seconds, status):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with coordinator_whose_clock_is(ahead_seconds, status) as port:
        skew_seconds = network.read_clock_skew(f"http://127.0.0.1:{port}#pin")
    assert skew_seconds == pytest.approx(-ahead_seconds, abs=1.5)


def test_a_coordinator_that_tells_no_time_leaves_the_clock_unknown():
    with coordinator_whose_clock_is(None) as port:
        assert network.read_clock_skew(f"http://127.0.0.1:{port}") is None
    assert network.read_clock_skew(f"http://127.0.0.1:{port}") is None


async def test_ports_that_answer_have_a_round_trip_and_others_a_reason():
    with coordinator_whose_clock_is(0) as port, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        target, dead = f"127.0.0.1:{port}", f"127.0.0.1:{closed.getsockname()[1]}"
        seen = await network.read_network(link_target=target, grpc_target=dead, url=f"http://{target}#pin", listening=())
    link, grpc, http = seen.reaches
    assert 0 < link.round_trip_ms < 1000
    assert (http.service, http.target, http.failure) == ("http", target, "")
    assert grpc == Reach("grpc", dead, failure="Connection refused")
    assert abs(seen.clock_skew_seconds) < 1.5


async def test_a_coordinator_whose_name_is_unknown_is_told_so_without_waiting():
    seen = await network.read_network(link_target="nowhere.invalid:1", grpc_target="[::1]:1", url="https://nowhere.invalid", listening=None)
    assert all(reach.failure and reach.round_trip_ms is None for reach in seen.reaches)
    assert seen.reaches[2].target == "nowhere.invalid:443"
    assert seen.clock_skew_seconds is None


async def test_only_what_listens_beyond_loopback_is_told():
    script = (
        "import socket, sys\n"
        "inner, outer = socket.create_server(('127.0.0.1', 0)), socket.create_server(('0.0.0.0', 0))\n"
        "print(outer.getsockname()[1], flush=True)\n"
        "sys.stdin.read()\n"
    )
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        port = int(await child.stdout.readline())
        tree = host.process_tree(os.getpid())
        assert child.pid in tree
        assert network.listening_beyond_loopback(frozenset({child.pid})) == (f"0.0.0.0:{port}",)
    finally:
        child.stdin.close()
        await child.wait()
    assert network.listening_beyond_loopback(frozenset({child.pid})) == ()
    assert host.process_tree(child.pid) == frozenset({child.pid})


def test_sockets_that_are_hidden_are_unknown_and_not_absent(monkeypatch):
    def hidden(*_: object, **__: object) -> None:
        raise psutil.AccessDenied(1)

    monkeypatch.setattr(network.psutil, "Process", lambda _: SimpleNamespace(net_connections=hidden))
    assert network.listening_beyond_loopback(frozenset({1})) is None


def test_a_port_is_told_from_an_address_of_either_kind(monkeypatch):
    addresses = (("10.0.0.5", 29600), ("fd00::5", 29600), ("::", 7), ("::1", 8), ("127.0.0.1", 9))
    sockets = [SimpleNamespace(laddr=SimpleNamespace(ip=ip, port=port), status=psutil.CONN_LISTEN) for ip, port in addresses]
    monkeypatch.setattr(network.psutil, "Process", lambda _: SimpleNamespace(net_connections=lambda **_: sockets))
    assert network.listening_beyond_loopback(frozenset({1})) == ("10.0.0.5:29600", "[::]:7", "[fd00::5]:29600")


@pytest.mark.parametrize("url", ["http://[::1", "http://pool.example:99999", "http://pool.example:x"])
async def test_what_is_no_url_costs_its_own_fact(url):
    seen = await network.read_network(link_target="127.0.0.1:1", grpc_target="127.0.0.1:1", url=url, listening=())
    assert [(reach.service, reach.round_trip_ms) for reach in seen.reaches] == [("link", None), ("grpc", None), ("http", None)]
    assert "no URL" in seen.reaches[2].failure
    assert seen.clock_skew_seconds is None


@pytest.mark.parametrize(
    ("line", "cuda"),
    [
        ("cuda: Optional[str] = '13.0'", "13.0"),
        ('cuda = "12.8"', "12.8"),
        ("cuda: Optional[str] = None", ""),
        ("debug = False", None),
        ("cuda: Optional[str] = build()", None),
    ],
)
def test_the_cuda_of_an_environment_is_what_its_torch_was_built_for(tmp_path, line, cuda):
    told = tmp_path / "lib/python3.11/site-packages/torch/version.py"
    assert cuda_of(tmp_path / "bin/python") is None
    told.parent.mkdir(parents=True)
    told.write_text(
        f"from typing import Optional\n__all__ = ['__version__', 'cuda']\n__version__ = '2.13.0'\n{line}\nhip: Optional[str] = None\n"
    )
    assert cuda_of(tmp_path / "bin/python") == cuda


def test_failing_probe_costs_its_own_fact_and_is_logged_once(monkeypatch, tmp_path):
    def broken() -> int:
        raise OSError("no such thing")

    monkeypatch.setattr(host, "memory_bytes", broken)
    monkeypatch.setattr(inventory, "_failed", set())
    library = library_of("driver_not_loaded")
    with structlog.testing.capture_logs() as logs:
        first = inventory.take_inventory(tmp_path / "not" / "yet", library)
        inventory.take_inventory(tmp_path, library)
    assert (first.memory_bytes, first.accelerators, first.driver_version) == (0, (), "")
    assert first.cpu_count > 0
    assert first.disk_free_bytes > 0
    assert first.operating_system != Inventory().operating_system
    assert sorted(log["fact"] for log in logs) == ["accelerators", "memory_bytes"]


def test_the_inventory_has_what_a_planner_needs_of_four_cards(monkeypatch, tmp_path):
    found = inventory.take_inventory(tmp_path, library_of("four_3090s_nvlink_pairs"))
    assert (found.driver_version, found.cuda_version) == ("595.71.05", "13.2")
    uuids = [card.uuid for card in found.accelerators]
    assert [card.nvlink_peer_uuids for card in found.accelerators] == [(uuids[1],), (uuids[0],), (uuids[3],), (uuids[2],)]
    assert found.accelerators[0] == Accelerator(
        name="NVIDIA GeForce RTX 3090",
        uuid=uuids[0],
        memory_bytes=24576 * MIB,
        compute_capability="8.6",
        pcie_width=16,
        pcie_width_max=16,
        pcie_generation_max=4,
        power_limit_milliwatts=350_000,
        nvlink_peer_uuids=(uuids[1],),
    )
    # Without a bridge its stock driver grants nothing between them.
    assert [card.pcie_peer_uuids for card in found.accelerators] == [()] * 4


def test_cards_that_a_driver_lets_reach_each_other_over_pcie_name_each_other():
    cards = nvidia.read_cards(library_of("four_3090s_nvlink_pairs"))
    pairs = (
        CardPair(0, 1, PeerStatus.OK, PeerStatus.OK),
        CardPair(0, 2, PeerStatus.NOT_SUPPORTED, PeerStatus.OK),
        CardPair(1, 2, PeerStatus.NOT_SUPPORTED, PeerStatus.CHIPSET_NOT_SUPPORTED),
        CardPair(2, 3, None, None),
    )
    found = inventory.accelerators(cards, pairs)
    uuids = [card.uuid for card in found]
    assert [card.nvlink_peer_uuids for card in found] == [(uuids[1],), (uuids[0],), (), ()]
    assert [card.pcie_peer_uuids for card in found] == [(uuids[2],), (), (uuids[0],), ()]


def test_a_lost_card_is_no_part_of_the_inventory():
    (card,) = inventory.read_accelerators(library_of("lost_card"))
    assert card.uuid.endswith("0")
    dump = load_dump("two_memory_nodes")
    dump["devices"][0]["nvmlDeviceGetPowerUsage"] = {"error": 15}
    (card,) = inventory.read_accelerators(NvmlLibrary(lambda: DumpedDriver(dump)))
    assert card.uuid.endswith("1")


def test_a_fact_is_a_line_and_not_a_book(monkeypatch, tmp_path):
    dump = load_dump("healthy_3090")
    dump["devices"][0] |= {"nvmlDeviceGetName": "N" * 10_000, "nvmlDeviceGetUUID": "G" * 10_000}
    monkeypatch.setattr(host, "operating_system", lambda: "L" * 10_000)
    found = inventory.take_inventory(tmp_path, NvmlLibrary(lambda: DumpedDriver(dump)))
    (card,) = found.accelerators
    assert {len(found.operating_system), len(card.name), len(card.uuid)} == {inventory.TEXT_CHARACTERS_MAX}


def test_a_look_at_cards_takes_several_looks_at_their_links(tmp_path):
    pauses: list[float] = []
    inventory.examine(tmp_path, library=library_of("healthy_3090"), sysfs=tmp_path, pause=pauses.append)
    assert pauses == [inventory.LINK_PAUSE_SECONDS] * (inventory.LINK_LOOKS - 1)
    found = inventory.examine(tmp_path, library=library_of("driver_not_loaded"), sysfs=tmp_path, pause=pauses.append)
    assert len(pauses) == inventory.LINK_LOOKS - 1
    assert (found.driver.absence, found.driver.absence_text) == (DriverAbsence.DRIVER_NOT_LOADED, "Driver Not Loaded")


def test_a_probe_of_this_machine_finds_its_memory_and_disk():
    found = inventory.read_host(Path("/"))
    assert found.memory_bytes >= found.memory_available_bytes > 0
    assert found.disk_free_bytes is not None
