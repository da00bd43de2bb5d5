"""`potluck node doctor` on every dump: the real probes on a library that answers from it, and exactly these lines.

The lines that are expected lie in `tests/fixtures/doctor`, one file for each dump of `tests/fixtures/nvml`, and for each line to a
coordinator of JOINED.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from potluck_node.doctor_command import as_document, as_lines, summary
from potluck_node.domain.doctor import diagnose
from potluck_node.domain.findings import GIB, Examination, Level, OwnerWord, exit_code
from potluck_node.domain.hardware import Host, Network, Reach
from potluck_node.probe import inventory, kernel_log
from potluck_node.probe.nvml import NvmlLibrary
from tests.support.nvml_dump import DUMPS, FIXTURES, DumpedDriver, load_dump, write_sysfs

EXPECTED = FIXTURES.parent / "doctor"
OWN_PROCESS = 5000009
HOST = Host(
    operating_system="Linux 6.8 x86_64",
    cpu_name="AMD EPYC 7302 16-Core Processor",
    cpu_count=32,
    memory_bytes=128 * GIB,
    memory_installed_bytes=128 * GIB,
    memory_available_bytes=120 * GIB,
    disk_free_bytes=800 * GIB,
    shared_memory_bytes=64 * GIB,
    numa_nodes_allowed=(0, 1),
)
REACHES = tuple(Reach(service, f"pool.example:{port}", 21.4) for service, port in (("link", 7443), ("grpc", 7442), ("http", 7441)))
JOINED = {
    "joined_quick_line": Network(REACHES, 1.2, 5_000_000, 31_250_000, 0.4, "", ()),
    "joined_slow_line": Network(REACHES, -0.3, 62_000, 250_000, 7200, "Not measured now: other nodes are measuring their lines.", ()),
}
"""A healthy 3090 in a pool: at 40 and 250 Mbit/s, and at half of one up and two down, two hours ago."""


def examined(name: str, folder: Path) -> Examination:
    """What the probes find on the machine of a dump, before it has joined a pool."""
    dump = load_dump(name)
    hardware = inventory.examine(
        folder,
        own_process_ids={OWN_PROCESS},
        own_card_uuids=dump.get("cards_given", ()),
        library=NvmlLibrary(lambda: DumpedDriver(dump)),
        sysfs=write_sysfs(dump, folder / "sys"),
        pause=lambda _: None,
    )
    # The engines of these machines are ready.
    cards = tuple(replace(card, engine_serves=card.engine_here) for card in hardware.cards)
    xids = kernel_log.xid_events(dump.get("kernel_log", ()))
    built_for = dump.get("engine_cuda_versions", {"vllm": "13.0"})
    owner = OwnerWord(dump.get("power_supply_watts"), frozenset({"llamacpp", *built_for}), engine_cuda_versions=built_for)
    return Examination(type(hardware)(HOST, hardware.driver, cards, hardware.pairs, xids), None, owner)


@pytest.mark.parametrize("name", DUMPS)
def test_doctor_says_of_every_machine_exactly_what_is_wrong_with_it(name, tmp_path):
    findings = diagnose(examined(name, tmp_path))
    said = f"{as_lines(findings)}\n{summary(findings)}\nexit {exit_code(findings)}\n"
    assert said == (EXPECTED / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", JOINED)
def test_doctor_says_what_a_nodes_line_carries(name, tmp_path):
    findings = diagnose(replace(examined("healthy_3090", tmp_path), network=JOINED[name]))
    said = f"{as_lines(findings)}\n{summary(findings)}\nexit {exit_code(findings)}\n"
    assert said == (EXPECTED / f"{name}.txt").read_text()
    assert all(finding.fix or finding.level is Level.OK for finding in findings)


@pytest.mark.parametrize("name", DUMPS)
def test_every_finding_that_is_not_good_names_a_fix_in_one_line(name, tmp_path):
    for finding in diagnose(examined(name, tmp_path)):
        assert finding.fix or finding.level is Level.OK
        assert "\n" not in finding.what + finding.fix


@pytest.mark.parametrize("name", DUMPS)
def test_the_facts_of_every_machine_are_json_with_null_for_what_is_unknown(name, tmp_path):
    examination = examined(name, tmp_path)
    document = json.loads(as_document(examination, diagnose(examination)))
    assert len(document["facts"]["hardware"]["cards"]) == len(load_dump(name)["devices"])
    assert all("built_from" in load_dump(dump) for dump in DUMPS)


def test_no_dump_lacks_its_lines_and_no_lines_lack_their_dump():
    assert {path.stem for path in EXPECTED.iterdir()} == {*DUMPS, *JOINED}
