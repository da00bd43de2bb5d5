"""The doctor's judgements of what stands around the cards: driver, engines, disk, and the node as one of a pool's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_node.domain import doctor_host, doctor_pool
from potluck_node.domain.findings import GIB, AgentSeen, Finding, Level, OwnerWord
from potluck_node.domain.hardware import Card, Driver, DriverAbsence, Host, Network
from tests.support.doctor_machines import levels, machine, reached

OK, WARN, FAIL = Level.OK, Level.WARN, Level.FAIL


@pytest.mark.parametrize(
    ("absence", "bus_card_count", "level", "words"),
    [
        (DriverAbsence.LIBRARY_NOT_FOUND, 0, OK, "no NVIDIA card on the PCI bus"),
        (DriverAbsence.LIBRARY_NOT_FOUND, None, OK, "no NVIDIA driver"),
        (DriverAbsence.LIBRARY_NOT_FOUND, 2, WARN, "2 NVIDIA cards on the PCI bus, but no driver"),
        (DriverAbsence.NO_PERMISSION, 1, WARN, "1 NVIDIA card on the PCI bus, but no driver"),
        (DriverAbsence.DRIVER_NOT_LOADED, None, WARN, "no driver to use"),
        (DriverAbsence.OTHER, 0, WARN, "no driver to use"),
    ],
)
def test_a_machine_without_a_driver_is_a_cpu_node_and_says_why(absence, bus_card_count, level, words):
    driver = Driver(absence=absence, absence_text="as NVML says.", bus_card_count=bus_card_count)
    (finding,) = doctor_host.check_driver(machine(driver=driver))
    assert (finding.level, finding.subject) == (level, "driver")
    assert words in finding.what
    assert "(as NVML says): this is a CPU node" in finding.what
    assert bool(finding.fix) == (level is not OK)


@pytest.mark.parametrize(
    ("cuda_version", "built_for", "level", "words"),
    [
        ("13.0", {"vllm": "13.0"}, OK, "runs CUDA 13.0; needed: vllm 13.0"),
        ("13.0", {"vllm": "12.8"}, OK, "needed: vllm 12.8"),
        ("12.2", {"vllm": "12.8"}, OK, "needed: vllm 12.8 (any CUDA 12 runs it)"),
        ("12.9", {"vllm": "13.0"}, FAIL, "needed: vllm 13.0"),
        ("12.9", {"vllm": "12.8", "sglang": "13.0"}, FAIL, "needed: sglang 13.0 and vllm 12.8"),
        ("12.9", {"vllm": "12.8", "sglang": ""}, OK, "needed: vllm 12.8"),
        ("12.9", {"vllm": ""}, OK, "runs CUDA 12.9"),
        ("12.9", {"vllm": None}, WARN, "vllm 13.0 (its usual build; the one here does not tell)"),
        ("12.9", {"vllm": None, "sglang": "13.0"}, FAIL, "sglang 13.0 and vllm 13.0 (its usual build"),
        ("13.2", {}, OK, "usual builds need sglang 13.0 and vllm 13.0, and none is installed here"),
        ("12.9", {}, WARN, "and none is installed here"),
    ],
)
def test_a_driver_must_run_the_cuda_that_the_engines_here_were_built_for(cuda_version, built_for, level, words):
    (finding,) = doctor_host.check_driver(machine(driver=Driver("550.1", cuda_version), built_for=built_for))
    assert finding.level is level
    assert ("580" in finding.fix) == (level is not OK)
    assert finding.what.endswith(words) or (level is FAIL and words in finding.what)


def test_a_cuda_that_no_driver_is_known_for_is_asked_for_by_its_own_number():
    (finding,) = doctor_host.check_driver(machine(built_for={"vllm": "14.1"}))
    assert (finding.level, finding.fix) == (FAIL, "install a driver that runs CUDA 14, then restart the machine")


@pytest.mark.parametrize("built_for", [{"vllm": ""}, {"vllm": "", "sglang": ""}])
def test_an_engine_built_for_processors_computes_on_no_card(built_for):
    (finding,) = doctor_host.check_engines(machine(Card(0), built_for=built_for))
    assert (finding.level, "built for processors" in finding.what or "build for processors" in finding.what) == (WARN, True)
    assert doctor_host.check_engines(machine(Card(0), built_for={**built_for, "sglang": "13.0"})) == ()


@pytest.mark.parametrize(
    ("engine_kinds", "expected"),
    [((), [WARN]), (("llamacpp",), [WARN]), (("llamacpp", "vllm"), []), (("sglang",), []), (("attach",), [])],
)
def test_cards_want_an_engine_that_computes_on_them(engine_kinds, expected):
    assert levels(doctor_host.check_engines(machine(Card(0), engine_kinds=engine_kinds))) == expected
    assert levels(doctor_host.check_engines(machine(engine_kinds=engine_kinds))) == []
    assert levels(doctor_host.check_engines(machine(Card(0, lost=True), engine_kinds=engine_kinds))) == []


@pytest.mark.parametrize(("free_gib", "level"), [(800, OK), (50, OK), (49, WARN), (5, WARN), (4, FAIL), (None, WARN)])
def test_disk_is_judged_by_what_models_take(free_gib, level):
    host = Host(disk_free_bytes=None if free_gib is None else free_gib * GIB)
    assert levels(doctor_host.check_disk(machine(host=host))) == [level]


def test_shared_memory_matters_for_engines_on_several_cards_only():
    small = Host(shared_memory_bytes=64 * 2**20)
    (finding,) = doctor_host.check_shared_memory(machine(Card(0), Card(1), host=small))
    assert (finding.level, "64 MiB" in finding.what) == (WARN, True)
    assert doctor_host.check_shared_memory(machine(Card(0), host=small)) == ()
    assert doctor_host.check_shared_memory(machine(Card(0), Card(1), host=Host(shared_memory_bytes=GIB))) == ()


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (None, [OK]),
        (reached(0.4), [OK]),
        (reached(None), [FAIL]),
        (reached(0.4, grpc=None), [WARN]),
        (reached(None, None, None), [FAIL, WARN, WARN]),
    ],
)
def test_a_node_needs_the_link_and_misses_the_other_ports(network, said):
    assert levels(doctor_pool.check_coordinator(machine(network=network))) == said


def test_a_way_that_is_open_tells_its_length_and_one_that_is_shut_its_reason():
    assert "0.4 ms away" in doctor_pool.check_coordinator(machine(network=reached(0.4)))[0].what
    assert "pool:link is not reached: Connection refused" in doctor_pool.check_coordinator(machine(network=reached(None)))[0].what


GROUP = OwnerWord(group_allowed=True, group_address="192.168.7.2", group_ports=(29600, 29601))


@pytest.mark.parametrize(
    ("listening", "owner", "level"),
    [
        ((), OwnerWord(), OK),
        ((), GROUP, OK),
        (("192.168.7.2:29600",), OwnerWord(), WARN),
        (("192.168.7.2:29600", "[fd00::2]:29600"), GROUP, OK),
        (("192.168.7.2:29600", "0.0.0.0:40000"), GROUP, WARN),
        (("[::]:40000",), GROUP, WARN),
        (("203.0.113.5:29600",), GROUP, WARN),
        (("[2001:db8::1]:29600",), GROUP, WARN),
        (("[fe80::1%eth0]:29600",), GROUP, WARN),
    ],
)
def test_a_port_that_the_agent_opens_is_told_and_right_only_for_a_group_on_its_own_network(listening, owner, level):
    examination = replace(machine(network=Network(listening=listening)), owner=owner, agent=AgentSeen(running=True))
    (finding,) = doctor_pool.check_ports(examination)
    assert finding.level is level
    assert all(address in finding.what for address in listening)


@pytest.mark.parametrize("network", [None, Network()])
def test_ports_that_were_not_looked_at_are_said_to_be_so(network):
    (finding,) = doctor_pool.check_ports(machine(network=network))
    assert (finding.level, finding.what) == (OK, "not looked at: no agent runs here now; without group_site it opens none")
    (finding,) = doctor_pool.check_ports(replace(machine(network=network), owner=GROUP))
    assert finding.what.endswith("reach it at 192.168.7.2, ports 29600 and 29601 and those of a group's engine")
    (finding,) = doctor_pool.check_ports(replace(machine(network=network), agent=AgentSeen(running=True)))
    assert (finding.level, finding.fix) == (WARN, "sudo ss -tlnp")


def test_settings_that_no_agent_starts_with_are_a_failure():
    owner = OwnerWord(group_allowed=True, group_failure="group_address: 203.0.113.5 is public.")
    (finding,) = doctor_pool.check_ports(replace(machine(), owner=owner))
    assert (finding.level, finding.what) == (FAIL, "no agent starts with these settings: group_address: 203.0.113.5 is public")


def test_a_node_that_does_not_know_itself_is_one_failure_and_no_talk_of_joining():
    damaged = replace(machine(), agent=AgentSeen(damage="node.json is damaged", damage_fix="join again"))
    assert doctor_pool.check_node(damaged) == (Finding(FAIL, "node", "node.json is damaged", "join again"),)
    assert (doctor_pool.check_coordinator(damaged), doctor_pool.check_clock(damaged), doctor_pool.check_node(machine())) == ((), (), ())


@pytest.mark.parametrize(
    ("skew_seconds", "level", "words"),
    [
        (0.4, OK, "0 s ahead of"),
        (-29, OK, "29 s behind"),
        (30, WARN, "30 s ahead of"),
        (-300, FAIL, "300 s behind"),
        (None, WARN, "not seen"),
    ],
)
def test_the_clock_may_differ_by_what_certificates_allow(skew_seconds, level, words):
    (finding,) = doctor_pool.check_clock(machine(network=Network(clock_skew_seconds=skew_seconds)))
    assert finding.level is level
    assert words in finding.what
    (finding,) = doctor_pool.check_clock(machine())
    assert (finding.level, "not compared" in finding.what) == (OK, True)
