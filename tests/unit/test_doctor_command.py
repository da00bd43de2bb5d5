"""`potluck node doctor` as it is typed: before and after joining, for eyes, for programs, and to paste in public."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from potluck_node.command import app
from potluck_node.control import AgentStatus, write_status
from potluck_node.doctor_command import DOCUMENT_FORMAT, private_names
from potluck_node.domain.doctor import CHECKS
from potluck_node.domain.redaction import redacted
from potluck_node.identity_store import NodeIdentity, StateFolder
from potluck_node.probe import host, inventory, kernel_log, network
from potluck_node.probe.nvml import NvmlLibrary
from potluck_node.settings import Settings
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

    return put


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


@pytest.fixture
def with_an_engine(machine, monkeypatch):
    """A server of the owner's own is shared, which may compute on the cards."""
    monkeypatch.setenv("POTLUCK_NODE_ATTACH_URLS", "http://127.0.0.1:11434")


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


@pytest.mark.usefixtures("with_an_engine")
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


def test_cards_that_no_engine_computes_on_are_told_how_to_get_one(machine):
    machine("healthy_3090")
    result = doctor()
    assert "WARN  engine        no engine here computes on the cards  → potluck node engines install vllm" in result.stdout
    assert result.exit_code == 1


def test_an_engine_that_is_not_where_the_owner_says_is_one_line_of_many(machine, monkeypatch):
    machine("healthy_3090")
    monkeypatch.setenv("POTLUCK_NODE_VLLM_PYTHON", "/nonexistent/bin/python")
    result = doctor()
    assert "FAIL  engine        There is no vLLM in the environment of /nonexistent/bin/python" in result.stdout
    assert "OK    card 0" in result.stdout
    assert result.exit_code == 2
    assert json.loads(doctor("--json").stdout)["exit_code"] == 2


@pytest.mark.usefixtures("with_an_engine")
def test_programs_get_the_findings_and_every_fact(machine, monkeypatch):
    machine("few_facts")
    monkeypatch.setattr(inventory.disk, "disk_free_bytes", lambda _: 800 * GIB)
    monkeypatch.setenv("POTLUCK_NODE_POWER_SUPPLY_WATTS", "1000")
    document = json.loads(doctor("--json").stdout)
    (card,) = document["facts"]["hardware"]["cards"]
    assert (card["reading"]["memory_used_bytes"], card["reading"]["temperature_celsius"]) == (0, None)
    assert document["facts"]["owner"]["power_supply_watts"] == 1000
    assert document["exit_code"] == 1


def test_the_document_has_the_keys_that_it_is_documented_with(machine, joined):
    for device in machine("four_3090s_nvlink_pairs").devices:
        device["nvmlDeviceGetComputeRunningProcesses_v3"] = [{"pid": 1, "usedGpuMemory": 5}]
    joined(1, 1)
    document = json.loads(doctor("--json").stdout)
    document["facts"]["hardware"]["xids"] = [{"xid": 79, "bus_id": "0000:01:00.0"}]
    written = (Path(__file__).parents[2] / "docs/node-doctor.md").read_text()
    checks, objects = written.split("## `--json`")
    rows = re.findall(r"^\| (?:`([a-z0-9_.\[\]]+)`|the document) \| (`.+?`) \|", objects, re.MULTILINE)
    assert keys_of(document) == {f"{place}.{key}".strip(".") for place, keys in rows for key in re.findall(r"`(\w+)`", keys)}
    assert document["format"] == DOCUMENT_FORMAT
    assert re.findall(r"^\| `(\w+)` \|", checks, re.MULTILINE) == list(CHECKS)


def keys_of(value: Any, path: str = "") -> set[str]:
    """Where texts, numbers and nulls stand: "findings[].level"."""
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        return set().union(*(keys_of(entry, f"{path}[]") for entry in value))
    if isinstance(value, dict) and not path.endswith("engine_cuda_versions"):
        return set().union(*(keys_of(entry, f"{path}.{key}".strip(".")) for key, entry in value.items()))
    return {path}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"node_id": 7}', "\udcff", "[" * 100_000])
def test_a_damaged_identity_is_one_failure_among_the_lines(machine, joined, monkeypatch, content):
    machine("healthy_3090")
    folder = joined(1, 1)
    (folder.path / "node.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    result = doctor()
    assert result.exit_code == 2
    assert f"FAIL  node          {folder.path}/node.json is damaged  → end the agent if it runs" in result.stdout
    assert f"rm -r {folder.path}; potluck node join" in result.stdout
    assert "OK    card 0" in result.stdout
    assert "not joined" not in result.stdout
    assert json.loads(doctor("--json").stdout)["exit_code"] == 2
    assert str(folder.path) not in doctor("--report").stdout


def test_a_state_folder_of_another_user_is_one_failure_among_the_lines(machine, joined, monkeypatch):
    machine("healthy_3090")
    joined(1, 1)

    def refused(_: StateFolder) -> NodeIdentity:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(StateFolder, "identity", refused)
    result = doctor()
    assert "cannot be read (Permission denied)  → run this as the user that runs the agent" in result.stdout
    assert result.exit_code == 2


def test_a_node_without_its_key_is_told_so(machine, joined):
    machine("healthy_3090")
    folder = joined(1, 1)
    assert f"FAIL  node          {folder.path} holds no node.key" in doctor().stdout


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("203.0.113.5", "203.0.113.5 is public"),
        ("2001:4860::8", "2001:4860::8 is public"),
        ("wg-of-ana", "wg-of-ana is neither an IP address nor one of the interfaces"),
        ("", "set group_address, too"),
    ],
)
def test_a_group_address_that_no_agent_starts_with_is_a_failure(machine, monkeypatch, address, words):
    machine("healthy_3090")
    monkeypatch.setenv("POTLUCK_NODE_GROUP_SITE", "den-of-ana")
    monkeypatch.setenv("POTLUCK_NODE_GROUP_ADDRESS", address)
    result = doctor()
    line = next(line for line in result.stdout.splitlines() if line.startswith("FAIL  ports"))
    assert "no agent starts with these settings: " in line
    assert words in line
    assert result.exit_code == 2
    assert [word for word in ("203.0.113.5", "2001:4860", "wg-of-ana", "den-of-ana") if word in doctor("--report").stdout] == []


def test_the_cuda_of_the_environment_that_is_here_is_asked_of_the_driver(machine, monkeypatch, tmp_path):
    machine("old_driver")
    packages = tmp_path / "own/lib/python3.11/site-packages"
    (packages / "torch").mkdir(parents=True)
    (packages / "vllm-0.32.0.dist-info").mkdir()
    (packages / "torch/version.py").write_text("cuda: Optional[str] = '12.8'\n")
    monkeypatch.setenv("POTLUCK_NODE_VLLM_PYTHON", str(tmp_path / "own/bin/python"))
    assert "OK    driver        525.125.06 runs CUDA 12.0; needed: vllm 12.8 (any CUDA 12 runs it)" in doctor().stdout
    (packages / "torch/version.py").write_text("cuda: Optional[str] = '13.0'\n")
    assert "FAIL  driver        525.125.06 runs CUDA 12.0; needed: vllm 13.0" in doctor().stdout


def test_an_engine_that_the_settings_name_is_told_before_one_is_installed_in_vain(machine, monkeypatch, tmp_path):
    machine("healthy_3090")
    packages = tmp_path / "own/lib/python3.11/site-packages"
    (packages / "torch").mkdir(parents=True)
    (packages / "vllm-0.32.0.dist-info").mkdir()
    (packages / "torch/version.py").write_text("cuda: Optional[str] = None\n")
    monkeypatch.setenv("POTLUCK_NODE_VLLM_PYTHON", str(tmp_path / "own/bin/python"))
    told = "vllm is a build for processors  → take vllm_python out of your settings, then: potluck node engines install vllm"
    assert told in doctor().stdout
    assert json.loads(doctor("--json").stdout)["facts"]["owner"]["engine_kinds_named"] == ["vllm"]


def test_a_container_is_told_what_it_has_of_the_machines_memory(machine, monkeypatch):
    machine("healthy_3090")
    monkeypatch.setattr(host, "memory_installed_bytes", lambda: 64 * GIB)
    monkeypatch.setattr(host, "memory_bytes", lambda: 8 * GIB)
    assert "OK    memory        8.0 GiB of the machine's 64.0 GiB, by its control group\n" in doctor().stdout
    monkeypatch.setattr(host, "memory_bytes", lambda: 64 * GIB)
    assert " memory  " not in doctor().stdout


@pytest.mark.parametrize("place", ["Jane Doe box/a b c", "../Jane Doe box/a b c", "./Jane's box/it"])
def test_a_folder_that_is_named_from_where_one_stands_is_told_whole_and_pasted_not_at_all(machine, monkeypatch, tmp_path, place):
    machine("healthy_3090")
    (tmp_path / "annex").mkdir()
    monkeypatch.chdir(tmp_path / "annex")
    Path(place).mkdir(parents=True)
    (Path(place) / "node.json").write_text("{")
    options = ("--state-dir", place)
    assert f"{tmp_path}/annex/{place.removeprefix('./')}/node.json is damaged" in doctor(*options).stdout
    report = doctor("--report", *options).stdout
    assert "FAIL  node          <state>/node.json is damaged" in report
    assert "rm -r <state>; potluck node join" in report
    assert [word for word in ("Jane", "Doe", "box", "a b", "b c", "annex") if word in report] == []


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
    assert "not compared: the coordinator's was not seen" in result.stdout
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
        # As in a container: the driver does not know the engine by the number that it has here.
        device["nvmlDeviceGetComputeRunningProcesses_v3"] = []
        uuids = (device["nvmlDeviceGetUUID"],)
        write_status(folder.path, replace(status, card_uuids=uuids))
        assert "OK    vram          what others hold is not known yet" in doctor().stdout
        write_status(folder.path, replace(status, card_uuids=uuids, serving_card_uuids=uuids))
        assert "WARN  vram          what others hold is not known: " in doctor().stdout


def test_a_report_tells_nobody_who_or_where(machine, joined, monkeypatch, tmp_path):
    device = machine("memory_held_by_others").devices[0]
    device["nvmlDeviceGetComputeRunningProcesses_v3"] = [{"pid": os.getpid(), "usedGpuMemory": 20 * GIB}]
    monkeypatch.setattr(socket, "gethostname", lambda: "ana-den-box.lan")
    monkeypatch.setenv("POTLUCK_NODE_URL", "http://moved-pool:8600#pin")
    joined(1, 1)
    assert "moved-pool:8600" in doctor().stdout
    report = doctor("--report").stdout
    name = psutil.Process().name()
    secrets = {str(tmp_path), str(Path.home()), NODE_ID, "acct_ana", "pool-of-ana", "ana-den-box", device["nvmlDeviceGetUUID"], "localhost"}
    assert [secret for secret in {*secrets, "moved-pool"} if secret in report] == []
    assert f"{name} (pid" not in report
    assert f'"name": "{name}"' not in report
    assert f"pid {os.getpid()}" in report
    assert report.startswith("### potluck node doctor")
    assert json.loads(report.split("```json")[1].split("```")[0])["hardware"]["cards"][0]["identity"]["uuid"] == "<uuid>"
    if len(getpass.getuser()) > 3:
        assert f" {getpass.getuser()} " not in report


@pytest.mark.usefixtures("machine")
def test_what_the_settings_name_is_private_wherever_it_stands():
    settings = Settings(
        url="http://moved-pool:8600", group_site="den-of-ana", group_address="wg-of-ana", vllm_python=Path("/srv/of ana/bin/python")
    )
    text = "moved-pool and den-of-ana and wg-of-ana and /srv/of ana/bin/python"
    assert redacted(text, private_names(settings, None)) == "<coordinator> and <site> and <address> and <path>"
    assert private_names(Settings(url="http://[::1"), None)["http://[::1"] == "<coordinator>"


def test_a_setting_that_is_wrong_is_told_and_not_diagnosed(machine, monkeypatch):
    machine("healthy_3090")
    monkeypatch.setenv("POTLUCK_NODE_POWER_SUPPLY_WATTS", "-5")
    result = doctor()
    assert result.exit_code == 2
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
