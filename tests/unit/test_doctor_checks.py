"""The doctor's judgements, check by check, where a whole machine's dump would say too much or too little."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_node.domain import doctor_cards, doctor_host, doctor_links
from potluck_node.domain.doctor import diagnose
from potluck_node.domain.findings import GIB, Examination, Finding, Level, OwnerWord, exit_code
from potluck_node.domain.hardware import (
    Card,
    CardIdentity,
    CardPair,
    CardProcess,
    CardReading,
    Driver,
    DriverAbsence,
    Hardware,
    Host,
    Network,
    NvLink,
    PeerStatus,
    Reach,
    Slot,
    ThrottleReason,
    XidEvent,
)
from potluck_node.domain.xid import XID_MEANINGS

OK, WARN, FAIL = Level.OK, Level.WARN, Level.FAIL


def machine(*cards: Card, pairs=(), network=None, supply_watts=None, engine_kinds=(), xids=(), host=None, driver=None) -> Examination:
    hardware = Hardware(host or Host(), driver or Driver("595.71.05", "13.2"), cards, pairs, xids)
    return Examination(hardware, network, OwnerWord(supply_watts, frozenset(engine_kinds)))


def levels(findings: tuple[Finding, ...]) -> list[Level]:
    return [finding.level for finding in findings]


def limited(index: int, limit_watts: int, lowest_watts: int = 100) -> Card:
    identity = CardIdentity(power_limit_min_milliwatts=lowest_watts * 1000)
    return Card(index, identity, CardReading(power_limit_milliwatts=limit_watts * 1000))


def test_the_worst_finding_is_the_exit_code():
    assert exit_code(()) == 0
    assert exit_code((Finding(OK, "", ""),)) == 0
    assert exit_code((Finding(WARN, "", ""), Finding(OK, "", ""))) == 1
    assert exit_code((Finding(WARN, "", ""), Finding(FAIL, "", ""), Finding(OK, "", ""))) == 2


def test_a_machine_of_which_nothing_is_known_is_looked_at_without_a_failure_of_our_own():
    assert FAIL not in levels(diagnose(Examination(Hardware(), None)))
    assert FAIL not in levels(
        diagnose(Examination(Hardware(cards=(Card(0), Card(1)), pairs=(CardPair(0, 1),)), Network(reached(0.4).reaches)))
    )


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
    ("cuda_version", "engine_kinds", "level"),
    [("13.0", ("vllm",), OK), ("13.2", (), OK), ("12.9", ("vllm",), FAIL), ("12.9", ("llamacpp",), WARN), ("9.2", ("sglang",), FAIL)],
)
def test_a_driver_must_run_the_cuda_of_the_engines_that_are_here(cuda_version, engine_kinds, level):
    (finding,) = doctor_host.check_driver(machine(driver=Driver("550.1", cuda_version), engine_kinds=engine_kinds))
    assert finding.level is level
    assert ("580" in finding.fix) == (level is not OK)


def test_a_driver_that_shows_no_card_makes_a_cpu_node():
    assert levels(doctor_cards.check_presence(machine())) == [WARN]
    assert doctor_cards.check_presence(machine(driver=Driver(absence=DriverAbsence.OTHER))) == ()


@pytest.mark.parametrize(
    ("width", "card_width", "driver_width", "slot_width", "level", "fix"),
    [
        (16, 16, 16, 16, OK, ""),
        (8, 16, 16, 8, OK, ""),
        (4, 16, 4, 4, WARN, "move the card"),
        (4, 16, 16, 16, WARN, "reseat"),
        (4, None, 16, None, WARN, "reseat"),
        (1, 16, 16, 1, FAIL, "move the card"),
        (2, 16, 16, 16, FAIL, "reseat"),
        (4, 4, 4, 16, OK, ""),
        (None, 16, 16, 16, OK, ""),
    ],
)
def test_lanes_are_judged_by_what_the_card_has(width, card_width, driver_width, slot_width, level, fix):
    card = Card(0, CardIdentity(pcie_width_max=driver_width), CardReading(pcie_width=width), Slot(None, card_width, slot_width))
    (finding,) = doctor_links.check_pcie(machine(card))
    assert finding.level is level
    assert fix in finding.fix


@pytest.mark.parametrize(
    ("generation", "best", "load_percent", "level"),
    [
        (1, 4, 0, OK),
        (1, 4, None, OK),
        (1, 4, 97, WARN),
        (2, 4, 20, WARN),
        (3, 4, 97, OK),
        (4, 4, 97, OK),
        (None, 4, 97, OK),
        (1, 4, 19, OK),
    ],
)
def test_a_links_generation_is_judged_under_load_only(generation, best, load_percent, level):
    reading = CardReading(utilization_percent=load_percent, pcie_generation=generation, pcie_width=16)
    card = Card(0, CardIdentity(pcie_generation_max=best, pcie_width_max=16), reading)
    assert levels(doctor_links.check_pcie(machine(card))) == [level]


def test_a_bridge_that_nlink_grants_but_reading_does_not_is_not_in_use():
    cards = [Card(index, CardIdentity(bus_id=f"b{index}"), nvlinks=(NvLink(True, f"b{1 - index}"),) * 4) for index in range(2)]
    (finding,) = doctor_links.check_nvlink(machine(*cards, pairs=(CardPair(0, 1, PeerStatus.OK, PeerStatus.DISABLED),)))
    assert (finding.level, finding.subject) == (WARN, "cards 0-1")
    assert "answers disabled" in finding.what


def test_one_card_has_nothing_to_be_joined_with():
    assert doctor_links.check_nvlink(machine(Card(0), Card(1, lost=True))) == ()


def on_node(index: int, node: int | None) -> Card:
    return Card(index, slot=Slot(numa_node=node))


@pytest.mark.parametrize(
    ("nodes", "allowed", "joined", "said"),
    [
        ((0, 0, 1, 1), (0, 1), ((0, 1), (2, 3)), [OK]),
        ((0, 0), None, (), [OK]),
        ((None, None), (0,), (), []),
        ((0, 1), (0, 1), (), [WARN]),
        ((0, 0, 1), (0, 1), (), [WARN]),
        ((0, 0, 1, 1), (0, 1), ((1, 2),), [WARN]),
        ((1,), (0,), (), [WARN]),
    ],
)
def test_cards_belong_beside_their_partner_and_their_processors(nodes, allowed, joined, said):
    cards = [on_node(index, node) for index, node in enumerate(nodes)]
    pairs = tuple(CardPair(first, second, PeerStatus.OK, PeerStatus.OK) for first, second in joined)
    assert levels(doctor_links.check_numa(machine(*cards, pairs=pairs, host=Host(numa_nodes_allowed=allowed)))) == said


@pytest.mark.parametrize(
    ("celsius", "slowdown", "level"), [(58, 95, OK), (85, 95, OK), (86, 95, WARN), (94, 95, WARN), (95, 95, FAIL), (99, None, OK)]
)
def test_heat_is_judged_by_the_cards_own_threshold(celsius, slowdown, level):
    card = Card(0, CardIdentity(slowdown_celsius=slowdown), CardReading(temperature_celsius=celsius))
    assert levels(doctor_cards.check_heat(machine(card))) == [level]


@pytest.mark.parametrize(("limit_watts", "cap"), [(350, "-pl 280"), (280, "-pl 250"), (230, "-pl 220"), (220, "give it air")])
def test_a_hot_card_is_told_a_cap_below_the_one_it_has(limit_watts, cap):
    reading = CardReading(temperature_celsius=90, power_limit_milliwatts=limit_watts * 1000)
    (finding,) = doctor_cards.check_heat(machine(Card(0, CardIdentity(slowdown_celsius=95), reading)))
    assert finding.fix.endswith(cap)


@pytest.mark.parametrize(
    ("reasons", "level", "words"),
    [
        ((), OK, "no card is slowed down"),
        ((ThrottleReason.POWER_CAP,), OK, "at the power cap"),
        ((ThrottleReason.SYNC_BOOST,), OK, "no card is slowed down"),
        ((ThrottleReason.POWER_CAP, ThrottleReason.SOFTWARE_THERMAL), WARN, "by the driver, against heat"),
        ((ThrottleReason.HARDWARE_SLOWDOWN, ThrottleReason.HARDWARE_THERMAL), FAIL, "against heat"),
        ((ThrottleReason.HARDWARE_SLOWDOWN, ThrottleReason.POWER_BRAKE), FAIL, "power supply"),
        ((ThrottleReason.HARDWARE_SLOWDOWN,), FAIL, "by its own protection"),
        (None, OK, "does not tell"),
    ],
)
def test_a_power_cap_is_no_alarm_and_the_gravest_other_reason_is_told(reasons, level, words):
    (finding,) = doctor_cards.check_clocks(machine(Card(0, reading=CardReading(throttle_reasons=reasons))))
    assert finding.level is level
    assert words in finding.what


@pytest.mark.parametrize(
    ("limits_watts", "supply_watts", "level", "fix"),
    [
        ((350,), None, OK, "power_supply_watts"),
        ((350,), 600, OK, ""),
        ((350,), 599, WARN, "-pl 340"),
        ((350,), 450, WARN, "-pl 240"),
        ((350,), 449, FAIL, "-pl 240"),
        ((350, 350, 350, 350), 500, FAIL, "a power supply of 2100 W"),
        ((), 500, None, ""),
    ],
)
def test_a_power_supply_is_judged_by_the_limits_their_peaks_and_the_rest_of_the_machine(limits_watts, supply_watts, level, fix):
    cards = [limited(index, limit_watts) for index, limit_watts in enumerate(limits_watts)]
    findings = doctor_cards.check_power_supply(machine(*cards, supply_watts=supply_watts))
    assert levels(findings) == ([] if level is None else [level])
    assert all(fix in finding.fix and bool(fix) == bool(finding.fix) for finding in findings)


@given(st.lists(st.integers(100, 480), min_size=1, max_size=8), st.integers(100, 4000))
def test_the_cap_that_is_advised_holds(limits_watts, supply_watts):
    cards = [limited(index, limit_watts) for index, limit_watts in enumerate(limits_watts)]
    (finding,) = doctor_cards.check_power_supply(machine(*cards, supply_watts=supply_watts))
    if advised := re.search(r"-pl (\d+)", finding.fix):
        capped = [limited(index, int(advised[1])) for index in range(len(cards))]
        assert levels(doctor_cards.check_power_supply(machine(*capped, supply_watts=supply_watts))) == [OK]
        assert int(advised[1]) >= 100


def test_one_card_of_unknown_limit_leaves_the_sum_unknown():
    (finding,) = doctor_cards.check_power_supply(machine(limited(0, 350), Card(1), supply_watts=300))
    assert finding.level is OK
    assert "does not tell" in finding.what


@pytest.mark.parametrize(
    ("processes", "words"),
    [
        ((), "processes that are not shown here, as of other containers"),
        ((CardProcess(7, "graphics", GIB, own=False, name="blender"),), "blender (pid 7)"),
        ((CardProcess(7, "graphics", 1, own=False), CardProcess(8, "compute", 2, own=True)), ": pid 7"),
        (tuple(CardProcess(pid, "compute", pid, own=False) for pid in range(1, 6)), "pid 5, pid 4, pid 3 and 2 more"),
    ],
)
def test_who_holds_a_cards_memory_is_named(processes, words):
    card = Card(0, CardIdentity(memory_bytes=24 * GIB), CardReading(memory_used_bytes=2 * GIB), processes=processes)
    (finding,) = doctor_cards.check_foreign_memory(machine(card))
    assert finding.level is WARN
    assert finding.what.endswith(words)


def test_faults_are_counted_by_card_and_those_of_hardware_fail():
    cards = (Card(0, CardIdentity(bus_id="0000:01:00.0")),)
    xids = (XidEvent(31, "0000:01:00.0"), XidEvent(79, "0000:09:00.0"), XidEvent(31, "0000:01:00.0"), XidEvent(999, None))
    found = doctor_cards.check_faults(machine(*cards, xids=xids))
    assert [(finding.level, finding.subject) for finding in found] == [(WARN, "bus unknown"), (WARN, "card 0"), (FAIL, "bus 09:00.0")]
    assert "Xid 31, 2 times" in found[1].what
    assert "sudo dmesg" in doctor_cards.check_faults(machine(*cards, xids=None))[0].fix
    assert all(said.what and said.fix for said in XID_MEANINGS.values())


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


def reached(link: float | None, grpc: float | None = 1.0, http: float | None = 1.0) -> Network:
    trips = {"link": link, "grpc": grpc, "http": http}
    return Network(tuple(Reach(name, f"pool:{name}", trip, "" if trip else "Connection refused") for name, trip in trips.items()))


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
    assert levels(doctor_host.check_coordinator(machine(network=network))) == said


def test_a_way_that_is_open_tells_its_length_and_one_that_is_shut_its_reason():
    assert "0.4 ms away" in doctor_host.check_coordinator(machine(network=reached(0.4)))[0].what
    assert "pool:link is not reached: Connection refused" in doctor_host.check_coordinator(machine(network=reached(None)))[0].what


@pytest.mark.parametrize(
    ("listening", "group_allowed", "level"),
    [
        (None, False, OK),
        ((), True, OK),
        (("192.168.7.2:29600",), False, WARN),
        (("192.168.7.2:29600", "fd00::2:29600"), True, OK),
        (("192.168.7.2:29600", "0.0.0.0:40000"), True, WARN),
        ((":::40000",), True, WARN),
    ],
)
def test_a_port_that_the_agent_opens_is_told_and_right_only_for_a_group_on_its_own_network(listening, group_allowed, level):
    examination = machine(network=Network(listening=listening))
    examination = replace(examination, owner=OwnerWord(group_allowed=group_allowed))
    (finding,) = doctor_host.check_ports(examination)
    assert finding.level is level
    assert all(address in finding.what for address in listening or ())


@pytest.mark.parametrize(
    ("skew_seconds", "level", "words"),
    [
        (0.4, OK, "0 s ahead of"),
        (-29, OK, "29 s behind"),
        (30, WARN, "30 s ahead of"),
        (-300, FAIL, "300 s behind"),
        (None, OK, "not seen"),
    ],
)
def test_the_clock_may_differ_by_what_certificates_allow(skew_seconds, level, words):
    (finding,) = doctor_host.check_clock(machine(network=Network(clock_skew_seconds=skew_seconds)))
    assert finding.level is level
    assert words in finding.what
    assert doctor_host.check_clock(machine()) == ()
