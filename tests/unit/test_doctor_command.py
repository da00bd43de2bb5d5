"""`potluck node doctor` as it is typed: before and after joining, for eyes, for programs, and to paste in public."""

from __future__ import annotations

import getpass
import json
import logging
import os
import socket
from pathlib import Path

import psutil
import pytest
import structlog
from typer.testing import CliRunner

from potluck_node.command import app
from potluck_node.control import AgentStatus, write_status
from potluck_node.identity_store import NodeIdentity, StateFolder
from potluck_node.probe import inventory, kernel_log, network
from potluck_node.probe.nvml import NvmlLibrary
from potluck_protocol.connection import ConnectionDocument
from potluck_protocol.values import AccountId, NodeId
from tests.support.nvml_dump import DumpedDriver, load_dump

GIB = 2**30
NODE_ID = "abcdefghijk2lmnop3qrst4uvw"
CERTIFICATE = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
"""Nothing here looks into it."""
runner = CliRunner()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Puts a dump's cards into this machine; its settings, state and cache are empty folders."""
    for name in [name for name in os.environ if name.startswith("POTLUCK_NODE_")]:
        monkeypatch.delenv(name)
    for name in ("CONFIG", "STATE", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setattr(inventory, "LINK_PAUSE_SECONDS", 0)
    monkeypatch.setattr(kernel_log, "read_xids", tuple)

    def put(dump: str) -> DumpedDriver:
        driver = DumpedDriver(load_dump(dump))
        monkeypatch.setattr(inventory, "process_library", lambda: NvmlLibrary(lambda: driver))
        return driver

    handlers, level = logging.root.handlers[:], logging.root.level
    yield put
    # The command sets its process's logging up, and this process has other tests.
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def joined(tmp_path):
    """Makes the machine a node of a pool whose ports are the given ones."""

    def join(port: int, link_port: int) -> StateFolder:
        folder = StateFolder(tmp_path / "state/potluck/node")
        folder.create()
        connection = ConnectionDocument(1, "pool-of-ana", port, link_port, "localhost", CERTIFICATE)
        url = f"http://localhost:{port}#{'a' * 52}"
        folder.write_identity(NodeIdentity(NodeId(NODE_ID), AccountId("acct_ana"), "ana-den-box", url, connection))
        return folder

    return join


def doctor(*arguments: str):
    return runner.invoke(app, ["doctor", *arguments])


def test_a_machine_without_a_card_and_without_a_pool_is_a_healthy_cpu_node(machine):
    machine("driver_not_loaded").dump["system"]["nvmlInit"] = {"error": 12}
    result = doctor()
    lines = result.stdout.splitlines()
    assert "NVML Shared Library Not Found): this is a CPU node" in lines[0]
    assert any(line.startswith("OK    network       not joined to a pool yet") for line in lines)
    assert lines[-1].endswith("0 failures.")
    assert result.exit_code in {0, 1}


@pytest.mark.parametrize(
    ("dump", "exit_code", "words"),
    [("capped_card", 0, "at the power cap"), ("card_at_x4", 1, "PCIe x4"), ("hot_card", 2, "by its own protection against heat")],
)
def test_the_exit_code_is_that_of_the_worst_line(machine, monkeypatch, dump, exit_code, words):
    machine(dump)
    monkeypatch.setattr(inventory.disk, "disk_free_bytes", lambda _: 800 * GIB)
    result = doctor()
    assert words in result.stdout
    assert result.exit_code == exit_code
    assert doctor("--json").exit_code == exit_code
    assert doctor("--report").exit_code == exit_code


def test_programs_get_the_findings_and_every_fact(machine, monkeypatch):
    machine("few_facts")
    monkeypatch.setattr(inventory.disk, "disk_free_bytes", lambda _: 800 * GIB)
    monkeypatch.setenv("POTLUCK_NODE_POWER_SUPPLY_WATTS", "1000")
    document = json.loads(doctor("--json").stdout)
    (card,) = document["facts"]["hardware"]["cards"]
    assert (card["reading"]["memory_used_bytes"], card["reading"]["temperature_celsius"]) == (0, None)
    assert document["facts"]["owner"]["power_supply_watts"] == 1000
    assert {"level", "subject", "what", "fix"} == set(document["findings"][0])
    assert document["exit_code"] == 0


def test_a_joined_node_tries_the_ports_of_its_coordinator(machine, joined, monkeypatch):
    machine("driver_not_loaded")
    with socket.create_server(("localhost", 0)) as server, socket.socket() as closed:
        closed.bind(("localhost", 0))
        dead_port = closed.getsockname()[1]
        joined(server.getsockname()[1], dead_port)
        # It takes connections and answers nothing: its clock stays unknown.
        monkeypatch.setattr(network, "CONNECT_LIMIT_SECONDS", 0.2)
        result = doctor()
    assert result.exit_code == 2
    assert f"FAIL  network       the coordinator's link port localhost:{dead_port} is not reached: Connection refused" in result.stdout
    assert "the coordinator's clock was not seen" in result.stdout
    assert "not joined" not in result.stdout


def test_memory_of_the_running_agent_and_its_children_is_its_own(machine, joined):
    device = machine("memory_held_by_others").devices[0]
    device["nvmlDeviceGetComputeRunningProcesses_v3"] = [{"pid": os.getpid(), "usedGpuMemory": 20 * GIB}]
    device["nvmlDeviceGetGraphicsRunningProcesses_v3"] = []
    name = psutil.Process().name()
    folder = joined(1, 1)
    assert f"others hold 20.0 GiB of 24.0 GiB: {name} (pid {os.getpid()})" in doctor().stdout
    status = AgentStatus(os.getpid(), NODE_ID, "serving", "serving", 1, 1.0, 0, 0, 0, 0, "", ())
    with folder.lock():
        write_status(folder.path, status)
        assert "others hold 0.0 GiB" in doctor().stdout


def test_a_report_tells_nobody_who_or_where(machine, joined, monkeypatch, tmp_path):
    device = machine("memory_held_by_others").devices[0]
    device["nvmlDeviceGetComputeRunningProcesses_v3"] = [{"pid": os.getpid(), "usedGpuMemory": 20 * GIB}]
    monkeypatch.setattr(socket, "gethostname", lambda: "ana-den-box.lan")
    joined(1, 1)
    report = doctor("--report").stdout
    name = psutil.Process().name()
    secrets = {str(tmp_path), str(Path.home()), NODE_ID, "acct_ana", "pool-of-ana", "ana-den-box", device["nvmlDeviceGetUUID"], "localhost"}
    assert [secret for secret in secrets if secret in report] == []
    assert f"{name} (pid" not in report
    assert f'"name": "{name}"' not in report
    assert f"pid {os.getpid()}" in report
    assert report.startswith("### potluck node doctor")
    assert json.loads(report.split("```json")[1].split("```")[0])["hardware"]["cards"][0]["identity"]["uuid"] == "<uuid>"
    if len(getpass.getuser()) > 3:
        assert f" {getpass.getuser()} " not in report


def test_a_setting_that_is_wrong_is_told_and_not_diagnosed(machine, monkeypatch):
    machine("healthy_3090")
    monkeypatch.setenv("POTLUCK_NODE_POWER_SUPPLY_WATTS", "-5")
    result = doctor()
    assert result.exit_code != 0
    assert "power_supply_watts" in result.stderr
    assert result.stdout == ""


def test_one_form_at_a_time(machine):
    machine("healthy_3090")
    result = doctor("--json", "--report")
    assert (result.exit_code, result.stdout) == (2, "")


def test_the_command_is_told_of_in_the_help():
    assert "doctor" in runner.invoke(app, ["--help"]).stdout
    helped = runner.invoke(app, ["doctor", "--help"]).stdout
    assert all(option in helped for option in ("--json", "--report", "--state-dir"))
