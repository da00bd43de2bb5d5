"""The doctor's judgements, check by check, where a whole machine's dump would say too much or too little."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_node.domain import doctor_cards, doctor_links, doctor_power
from potluck_node.domain.doctor import CHECKS, diagnose
from potluck_node.domain.findings import GIB, Examination, Finding, Level, exit_code
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
    Slot,
    ThrottleReason,
    XidEvent,
)
from potluck_node.domain.xid import XID_MEANINGS
from tests.support.doctor_machines import levels, limited, machine, reached

OK, WARN, FAIL = Level.OK, Level.WARN, Level.FAIL


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
        (None, 16, 16, 16, WARN, "lspci"),
        (4, None, None, 16, WARN, "lspci"),
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
        (None, 4, 97, WARN),
        (4, None, 97, WARN),
        (None, None, 0, OK),
        (1, 4, 19, OK),
    ],
)
def test_a_links_generation_is_judged_under_load_only(generation, best, load_percent, level):
    reading = CardReading(utilization_percent=load_percent, pcie_generation=generation, pcie_width=16)
    card = Card(0, CardIdentity(pcie_generation_max=best, pcie_width_max=16), reading)
    (finding,) = doctor_links.check_pcie(machine(card))
    assert finding.level is level
    assert ("holds under load" in finding.what) == (level is OK and (load_percent or 0) >= 20)


def test_a_link_of_which_nothing_is_told_is_named_beside_those_that_are_well():
    known = Card(0, CardIdentity(pcie_width_max=16), CardReading(pcie_width=16))
    (finding,) = doctor_links.check_pcie(machine(known, Card(1)))
    assert (finding.level, "(card 1)" in finding.what) == (WARN, True)


def test_a_bridge_that_nlink_grants_but_reading_does_not_is_not_in_use():
    cards = [Card(index, CardIdentity(bus_id=f"b{index}"), nvlinks=(NvLink(True, f"b{1 - index}"),) * 4) for index in range(2)]
    (finding,) = doctor_links.check_nvlink(machine(*cards, pairs=(CardPair(0, 1, PeerStatus.OK, PeerStatus.DISABLED),)))
    assert (finding.level, finding.subject) == (WARN, "cards 0-1")
    assert "answers disabled" in finding.what


@pytest.mark.parametrize(
    ("pairs", "said"),
    [((), [WARN, WARN]), ((CardPair(0, 1, PeerStatus.DISABLED),), [WARN, WARN]), ((CardPair(0, 1, PeerStatus.OK, PeerStatus.OK),), [OK])],
)
def test_ports_that_are_up_and_lead_nowhere_are_no_bridge_in_use(pairs, said):
    cards = [Card(index, nvlinks=(NvLink(True, None),) * 4) for index in range(2)]
    assert levels(doctor_links.check_nvlink(machine(*cards, pairs=pairs))) == said


def test_no_word_of_a_bridge_is_not_the_word_that_there_is_none():
    (unknown,) = doctor_links.check_nvlink(machine(Card(0), Card(1), pairs=(CardPair(0, 1),)))
    (none,) = doctor_links.check_nvlink(machine(Card(0), Card(1), pairs=(CardPair(0, 1, PeerStatus.NOT_SUPPORTED),)))
    assert ("tells nothing" in unknown.what, "no bridge seen" in none.what) == (True, True)


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
    ("celsius", "slowdown", "level"),
    [(58, 95, OK), (85, 95, OK), (86, 95, WARN), (94, 95, WARN), (95, 95, FAIL), (99, None, WARN), (None, 95, WARN)],
)
def test_heat_is_judged_by_the_cards_own_threshold(celsius, slowdown, level):
    card = Card(0, CardIdentity(slowdown_celsius=slowdown), CardReading(temperature_celsius=celsius))
    assert levels(doctor_cards.check_heat(machine(card))) == [level]


@pytest.mark.parametrize(("margin", "level"), [(30, OK), (10, OK), (9, WARN), (1, WARN), (0, FAIL), (-3, FAIL)])
def test_a_card_that_tells_its_margin_and_no_threshold_is_judged_by_that(margin, level):
    (finding,) = doctor_cards.check_heat(machine(Card(0, reading=CardReading(temperature_celsius=80, thermal_margin_celsius=margin))))
    assert (finding.level, f"80 °C, {margin} °C below" in finding.what) == (level, True)


def test_a_card_whose_heat_cannot_be_judged_is_named_beside_those_that_are_well():
    cool = Card(0, CardIdentity(slowdown_celsius=95), CardReading(temperature_celsius=50))
    (finding,) = doctor_cards.check_heat(machine(cool, Card(1, reading=CardReading(temperature_celsius=91))))
    assert (finding.level, "91 °C, but not where it slows down (card 1)" in finding.what) == (WARN, True)


@pytest.mark.parametrize(("limit_watts", "cap"), [(350, "-pl 280"), (280, "-pl 230"), (230, "-pl 190"), (190, "give it air")])
def test_a_hot_card_is_told_a_cap_below_the_one_it_has(limit_watts, cap):
    reading = CardReading(temperature_celsius=90, power_limit_milliwatts=limit_watts * 1000)
    (finding,) = doctor_cards.check_heat(machine(Card(0, CardIdentity(slowdown_celsius=95), reading)))
    assert finding.fix.endswith(cap)


@pytest.mark.parametrize(
    ("made_for_watts", "lowest_watts", "fix"),
    [(575, 400, "-pl 460"), (575, 500, "give it air"), (450, 150, "-pl 360"), (350, 100, "-pl 280")],
)
def test_a_cap_that_is_advised_is_one_that_the_card_takes(made_for_watts, lowest_watts, fix):
    identity = CardIdentity(
        slowdown_celsius=95, power_limit_default_milliwatts=made_for_watts * 1000, power_limit_min_milliwatts=lowest_watts * 1000
    )
    (finding,) = doctor_cards.check_heat(machine(Card(0, identity, CardReading(temperature_celsius=90))))
    assert finding.fix.endswith(fix)


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
        (None, WARN, "does not tell"),
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
    findings = doctor_power.check_power_supply(machine(*cards, supply_watts=supply_watts))
    assert levels(findings) == ([] if level is None else [level])
    assert all(fix in finding.fix and bool(fix) == bool(finding.fix) for finding in findings)


@given(st.lists(st.integers(100, 480), min_size=1, max_size=8), st.integers(100, 4000))
def test_the_cap_that_is_advised_holds(limits_watts, supply_watts):
    cards = [limited(index, limit_watts) for index, limit_watts in enumerate(limits_watts)]
    (finding,) = doctor_power.check_power_supply(machine(*cards, supply_watts=supply_watts))
    if advised := re.search(r"-pl (\d+)", finding.fix):
        capped = [limited(index, int(advised[1])) for index in range(len(cards))]
        assert levels(doctor_power.check_power_supply(machine(*capped, supply_watts=supply_watts))) == [OK]
        assert int(advised[1]) >= 100


@pytest.mark.parametrize(("supply_watts", "level"), [(None, OK), (600, WARN), (599, WARN), (449, FAIL)])
def test_one_card_of_unknown_limit_leaves_the_sum_unknown_but_not_below_what_is_known(supply_watts, level):
    (finding,) = doctor_power.check_power_supply(machine(limited(0, 350), Card(1), supply_watts=supply_watts))
    assert finding.level is level
    assert "without card 1, of which the driver tells no limit" in finding.what
    (finding,) = doctor_power.check_power_supply(machine(Card(0), supply_watts=supply_watts))
    assert (finding.level, finding.what.startswith("not judged")) == (OK if supply_watts is None else WARN, True)


def test_only_cards_above_the_cap_are_told_it():
    (finding,) = doctor_power.check_power_supply(machine(limited(0, 350), limited(1, 170), limited(2, 350), supply_watts=1000))
    assert "sudo nvidia-smi -i 0,2 -pl 210;" in finding.fix


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


def test_memory_that_nobody_can_tell_apart_is_not_said_to_be_anybodys():
    identity, reading = CardIdentity(memory_bytes=24 * GIB), CardReading(memory_used_bytes=20 * GIB)
    alone = Card(0, identity, CardReading(memory_used_bytes=0), processes=())
    for processes in ((), None, (CardProcess(7, "compute", 20 * GIB, own=False),)):
        hidden = Card(1, identity, reading, processes=processes, engine_here=True, engine_serves=True)
        (finding,) = doctor_cards.check_foreign_memory(machine(alone, hidden))
        assert (finding.level, finding.subject, "--pid=host" in finding.fix, "(card 1)" in finding.what) == (WARN, "vram", True, True)
    seen = Card(1, identity, reading, processes=(CardProcess(7, "compute", 20 * GIB, own=True),), engine_here=True)
    assert levels(doctor_cards.check_foreign_memory(machine(alone, seen))) == [OK]
    starting = Card(1, identity, reading, processes=(), engine_here=True)
    (finding,) = doctor_cards.check_foreign_memory(machine(alone, starting))
    assert (finding.level, "not known yet" in finding.what, finding.fix) == (OK, True, "look again when it is ready")
    silent = Card(1, identity, reading, processes=(CardProcess(7, "compute", None, own=True),), engine_here=True)
    assert levels(doctor_cards.check_foreign_memory(machine(alone, silent))) == [WARN]
    untold = Card(1, identity, CardReading())
    assert "how much is in use (card 1)" in doctor_cards.check_foreign_memory(machine(alone, untold))[0].what


@pytest.mark.parametrize(
    ("network", "engine_kinds", "fix"),
    [
        (None, (), "close them"),
        (Network(), (), "close them, or run `potluck node pause` while you use the card"),
        (None, ("attach",), "leave the server that you share, and close them"),
    ],
)
def test_what_others_hold_is_closed_or_the_node_is_paused_where_there_is_one(network, engine_kinds, fix):
    card = Card(0, CardIdentity(), CardReading(memory_used_bytes=2 * GIB), processes=())
    (finding,) = doctor_cards.check_foreign_memory(machine(card, network=network, engine_kinds=engine_kinds))
    assert finding.fix == fix


def test_faults_are_counted_by_card_and_those_of_hardware_fail():
    cards = (Card(0, CardIdentity(bus_id="0000:01:00.0")),)
    xids = (XidEvent(31, "0000:01:00.0"), XidEvent(79, "0000:09:00.0"), XidEvent(31, "0000:01:00.0"), XidEvent(999, None))
    found = doctor_cards.check_faults(machine(*cards, xids=xids))
    assert [(finding.level, finding.subject) for finding in found] == [(WARN, "bus unknown"), (WARN, "card 0"), (FAIL, "bus 09:00.0")]
    assert "Xid 31, 2 times" in found[1].what
    assert "sudo dmesg" in doctor_cards.check_faults(machine(*cards, xids=None))[0].fix
    assert all(said.what and said.fix for said in XID_MEANINGS.values())


def test_every_finding_names_its_check_by_a_name_that_programs_may_rely_on():
    cards_and_what_they_share = "driver engines cards pcie nvlink numa heat clocks power caps vram faults"
    assert list(CHECKS) == f"{cards_and_what_they_share} memory shared_memory disk node network line ports clock".split()
    cards = (limited(0, 350), Card(1, lost=True))
    assert {finding.check for finding in diagnose(machine(*cards, network=reached(0.4)))} == set(CHECKS) - {
        *("nvlink", "numa", "caps", "memory", "shared_memory", "node")
    }
