"""What is read of cards: through the table, from a library that answers from dumps with the real one's signatures."""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_node.domain.hardware import (
    CardIdentity,
    CardPair,
    CardProcess,
    CardReading,
    Driver,
    DriverAbsence,
    PeerStatus,
    ThrottleReason,
    XidEvent,
    foreign_bytes,
    joined_pairs,
)
from potluck_node.probe import card_table, nvidia
from potluck_node.probe.nvml import RETRY_SECONDS, DriverUnavailableError, NvmlLibrary
from potluck_node.probe.telemetry import card_bytes_held, card_telemetry
from potluck_node.probe.xid import EVENTS_MAX, XidCount, XidWatcher
from potluck_protocol.cards import CardTelemetry
from tests.support.nvml_dump import DumpedDriver, load_dump

MIB = 2**20
TABLES = (card_table.IDENTITY, card_table.READING, card_table.PAIR, card_table.DRIVER, card_table.PROCESSES)
PROBES = [probe for table in TABLES for probe in table.values()] + [card_table.nvlink_active(0), card_table.nvlink_remote(0)]
XID_CRITICAL = 8


def driver_of(name: str) -> tuple[DumpedDriver, NvmlLibrary]:
    driver = DumpedDriver(load_dump(name))
    return driver, NvmlLibrary(lambda: driver)


def test_every_fact_of_a_card_has_its_row_and_no_row_lacks_its_fact():
    assert set(card_table.IDENTITY) == {field.name for field in dataclasses.fields(CardIdentity)}
    assert set(card_table.READING) == {field.name for field in dataclasses.fields(CardReading)}
    assert set(card_table.PAIR) | {"first", "second"} == {field.name for field in dataclasses.fields(CardPair)}
    assert set(card_table.DRIVER) | {"absence", "absence_text", "bus_card_count"} == {field.name for field in dataclasses.fields(Driver)}


@pytest.mark.parametrize("call", [call for probe in PROBES for call in probe.calls], ids=lambda call: call.function)
def test_every_call_of_the_table_is_one_that_the_real_library_takes(call):
    function = getattr(pynvml, call.function)
    subjects = 0 if call.function.startswith("nvmlSystem") else 2 if call.function == "nvmlDeviceGetP2PStatus" else 1
    inspect.signature(function).bind(*([None] * subjects), *call.arguments)
    assert all(type(argument) is int for argument in call.arguments)


def test_numbers_of_the_table_are_the_librarys_own():
    assert card_table.READING["memory_used_bytes"].calls[0].arguments == (pynvml.nvmlMemory_v2,)
    assert card_table.PAIR["nvlink"].calls[0].arguments == (pynvml.NVML_P2P_CAPS_INDEX_NVLINK,)
    assert card_table.IDENTITY["target_celsius"].calls[0].arguments == (pynvml.NVML_TEMPERATURE_THRESHOLD_ACOUSTIC_CURR,)
    assert card_table.IDENTITY["operating_max_celsius"].calls[0].arguments == (pynvml.NVML_TEMPERATURE_THRESHOLD_GPU_MAX,)
    assert card_table.READING["clock_memory_mhz"].calls[0].arguments == (pynvml.NVML_CLOCK_MEM,)
    bits = {
        ThrottleReason.POWER_CAP: pynvml.nvmlClocksEventReasonSwPowerCap,
        ThrottleReason.HARDWARE_SLOWDOWN: pynvml.nvmlClocksEventReasonHwSlowdown,
        ThrottleReason.SYNC_BOOST: pynvml.nvmlClocksEventReasonSyncBoost,
        ThrottleReason.SOFTWARE_THERMAL: pynvml.nvmlClocksEventReasonSwThermalSlowdown,
        ThrottleReason.HARDWARE_THERMAL: pynvml.nvmlClocksEventReasonHwThermalSlowdown,
        ThrottleReason.POWER_BRAKE: pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
    }
    assert {reason: card_table.throttle_reasons(bit) for reason, bit in bits.items()} == {reason: (reason,) for reason in bits}


@given(st.integers(min_value=0, max_value=2**64 - 1))
def test_whatever_bits_a_driver_sets_each_known_reason_is_told_once(bits):
    reasons = card_table.throttle_reasons(bits)
    assert len(reasons) == len(set(reasons))
    assert (ThrottleReason.POWER_CAP in reasons) == bool(bits & pynvml.nvmlClocksEventReasonSwPowerCap)


def test_a_healthy_card_is_read_whole():
    _, library = driver_of("healthy_3090")
    assert nvidia.read_driver(library) == Driver("595.71.05", "13.2")
    (card,) = nvidia.read_cards(library)
    assert card.identity == CardIdentity(
        name="NVIDIA GeForce RTX 3090",
        uuid="GPU-00000000-0000-4000-8000-000000000000",
        bus_id="0000:01:00.0",
        compute_capability="8.6",
        memory_bytes=24576 * MIB,
        bar1_bytes=256 * MIB,
        shutdown_celsius=98,
        slowdown_celsius=95,
        operating_max_celsius=93,
        target_celsius=83,
        power_limit_default_milliwatts=350_000,
        power_limit_min_milliwatts=100_000,
        power_limit_max_milliwatts=385_000,
        clock_sm_max_mhz=2115,
        clock_memory_max_mhz=9751,
        pcie_generation_max=4,
        pcie_width_max=16,
    )
    assert card.reading == CardReading(
        temperature_celsius=58,
        power_milliwatts=83_480,
        power_limit_milliwatts=350_000,
        energy_millijoules=1_234_567_890,
        clock_sm_mhz=810,
        clock_memory_mhz=5001,
        throttle_reasons=(),
        utilization_percent=0,
        memory_used_bytes=640 * MIB,
        memory_free_bytes=23620 * MIB,
        pcie_generation=1,
        pcie_width=16,
        pcie_replay_count=0,
    )
    assert card.processes == (CardProcess(5_000_001, "graphics", 630 * MIB, own=False),)
    assert [link.active for link in card.nvlinks] == [False] * 4


@pytest.mark.parametrize("error", [2, 3, 4, 6, 13, 999])
@pytest.mark.parametrize("field", sorted(card_table.READING))
def test_a_failing_probe_costs_its_own_fact_and_none_is_not_0(field, error):
    driver, library = driver_of("capped_card")
    whole = nvidia.read_cards(library)[0].reading
    calls = card_table.READING[field].calls
    for call in calls:
        driver.devices[0][call.function] = {"error": error}
    reading = nvidia.read_cards(library)[0].reading
    sharing = {name for name, probe in card_table.READING.items() if probe.calls[0].function == calls[0].function}
    lost_with_it = sharing if calls[0].function != "nvmlDeviceGetClockInfo" else {"clock_sm_mhz", "clock_memory_mhz"}
    for name in card_table.READING:
        assert getattr(reading, name) == (None if name in lost_with_it else getattr(whole, name)), name


def test_an_older_driver_is_asked_in_its_own_words():
    driver, library = driver_of("capped_card")
    device = driver.devices[0]
    device["nvmlDeviceGetTemperature"] = device.pop("nvmlDeviceGetTemperatureV")
    device["nvmlDeviceGetCurrentClocksThrottleReasons"] = device.pop("nvmlDeviceGetCurrentClocksEventReasons")
    device["memory_info_v2"] = False
    reading = nvidia.read_cards(library)[0].reading
    assert (reading.temperature_celsius, reading.throttle_reasons) == (66, (ThrottleReason.POWER_CAP,))
    assert reading.memory_used_bytes == (640 + 316) * MIB


def test_only_the_peer_status_proves_that_cards_are_joined():
    _, library = driver_of("four_3090s_nvlink_pairs")
    assert joined_pairs(nvidia.read_pairs(library)) == ((0, 1), (2, 3))
    assert [link.remote_bus_id for link in nvidia.read_cards(library)[2].nvlinks] == ["0000:61:00.0"] * 4
    _, library = driver_of("bridge_not_granted")
    assert all(link.active for card in nvidia.read_cards(library) for link in card.nvlinks)
    pairs = nvidia.read_pairs(library)
    assert pairs == (CardPair(0, 1, PeerStatus.NOT_SUPPORTED, PeerStatus.TOPOLOGY_NOT_SUPPORTED),)
    assert joined_pairs(pairs) == ()
    assert joined_pairs((CardPair(0, 1, PeerStatus.OK, PeerStatus.DISABLED), CardPair(1, 2, None, PeerStatus.OK))) == ()


def test_a_card_that_is_lost_while_the_agent_runs_is_told_as_lost_and_the_other_goes_on():
    driver, library = driver_of("two_memory_nodes")
    before = card_telemetry((), library)
    driver.devices[1]["lost"] = True
    after = card_telemetry((), library)
    assert after == (before[0], CardTelemetry(before[1].uuid, lost=True))
    first, second = nvidia.read_cards(library)
    assert (first.lost, second.lost, second.identity.uuid) == (False, True, before[1].uuid)
    assert nvidia.read_pairs(library) == ()


@pytest.mark.parametrize("call", ["nvmlDeviceGetUUID", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetComputeRunningProcesses_v3"])
def test_a_card_may_get_lost_at_any_call(call):
    driver, library = driver_of("two_memory_nodes")
    before = card_telemetry((), library)
    driver.devices[0][call] = {"error": 15}
    assert card_telemetry((), library) == (CardTelemetry(before[0].uuid, lost=True), before[1])
    assert [card.lost for card in nvidia.read_cards(library)] == [True, False]


def test_telemetry_has_the_facts_of_a_card_under_load():
    _, library = driver_of("capped_card")
    assert card_telemetry((), library) == (
        CardTelemetry(
            uuid="GPU-00000000-0000-4000-8000-000000000000",
            temperature_celsius=66,
            power_milliwatts=279_300,
            power_limit_milliwatts=280_000,
            memory_used_bytes=640 * MIB,
            memory_foreign_bytes=640 * MIB,
            utilization_percent=97,
            throttle_reasons=("power_cap",),
            throttle_point_celsius=83,
            power_limit_min_milliwatts=100_000,
            power_limit_default_milliwatts=350_000,
            power_limit_max_milliwatts=365_000,
        ),
    )


def test_telemetry_of_a_card_that_tells_little_has_none_where_nothing_is_told():
    _, library = driver_of("few_facts")
    (card,) = card_telemetry((), library)
    assert (card.temperature_celsius, card.power_milliwatts) == (None, None)
    assert (card.memory_used_bytes, card.memory_foreign_bytes) == (0, 0)
    (card,) = card_telemetry((), library, own_card_uuids={card.uuid})
    assert card.memory_foreign_bytes is None


def test_a_machine_without_a_driver_has_no_telemetry():
    _, library = driver_of("driver_not_loaded")
    assert card_telemetry((), library) == ()


def test_memory_of_our_own_engines_is_not_foreign_and_a_process_in_two_lists_counts_once():
    _, library = driver_of("memory_held_by_others")
    (card,) = card_telemetry({5_000_009}, library)
    assert card.memory_foreign_bytes == (20480 - 12288) * MIB
    processes = nvidia.read_cards(library, {5_000_009})[0].processes
    assert [(process.pid, process.own) for process in processes] == [(5_000_002, False), (5_000_003, False), (5_000_009, True)]


@given(st.integers(0, 2**40), st.lists(st.tuples(st.integers(0, 2**40), st.booleans())))
def test_foreign_memory_is_never_below_zero_nor_above_what_is_used(used_bytes, held):
    processes = tuple(CardProcess(pid, "compute", size, own) for pid, (size, own) in enumerate(held))
    assert 0 <= foreign_bytes(used_bytes, processes, engine_here=False) <= used_bytes
    listed = foreign_bytes(used_bytes, processes, engine_here=True)
    assert (listed is None) == (not any(own for _, own in held))
    assert listed is None or 0 <= listed <= used_bytes


OURS, OTHERS = CardProcess(1, "compute", 3, own=True), CardProcess(2, "compute", 5, own=False)


@pytest.mark.parametrize(
    ("used_bytes", "processes", "engine_here", "foreign"),
    [
        (None, (), False, None),
        (7, None, False, 7),  # no engine of ours is there: whoever holds it is another
        (7, None, True, None),
        (7, (), True, None),
        (7, (OTHERS,), True, None),
        (7, (OTHERS,), False, 7),
        (8, (OURS, OTHERS), True, 5),
        (8, (OURS, OTHERS), False, 5),  # one that is just being stopped
        (8, (CardProcess(1, "compute", None, own=True),), True, None),
        (8, (CardProcess(2, "compute", None, own=False),), False, 8),
    ],
)
def test_foreign_memory_is_unknown_where_ours_is_not_told_from_it(used_bytes, processes, engine_here, foreign):
    assert foreign_bytes(used_bytes, processes, engine_here=engine_here) == foreign


@pytest.mark.parametrize("lists", [[], {"error": 3}, [{"pid": 31337, "usedGpuMemory": 20 * 2**30}]])
def test_an_engine_in_a_container_makes_no_foreign_memory_of_its_own(lists):
    driver, library = driver_of("processes_hidden")
    device = driver.devices[0]
    device["nvmlDeviceGetComputeRunningProcesses_v3"] = device["nvmlDeviceGetGraphicsRunningProcesses_v3"] = lists
    uuid = device["nvmlDeviceGetUUID"]
    (card,) = card_telemetry({7}, library, own_card_uuids={uuid})
    assert (card.memory_used_bytes, card.memory_foreign_bytes) == (20 * 2**30, None)
    (card,) = card_telemetry({7}, library, own_card_uuids={"GPU-another"})
    assert card.memory_foreign_bytes == 20 * 2**30
    assert [card.engine_here for card in nvidia.read_cards(library, own_card_uuids={uuid})] == [True]


def test_the_library_is_opened_once_for_all_that_is_read():
    driver, library = driver_of("four_3090s_nvlink_pairs")
    for _ in range(3):
        nvidia.read_cards(library)
        card_telemetry((), library)
    assert driver.init_count == 1


@pytest.mark.parametrize(
    ("error", "absence"),
    [
        (4, DriverAbsence.NO_PERMISSION),
        (9, DriverAbsence.DRIVER_NOT_LOADED),
        (12, DriverAbsence.LIBRARY_NOT_FOUND),
        (18, DriverAbsence.VERSION_MISMATCH),
        (999, DriverAbsence.OTHER),
    ],
)
def test_why_there_is_no_driver_is_kept_and_it_is_tried_again_after_a_pause(error, absence):
    driver = DumpedDriver(load_dump("healthy_3090") | {"system": {"nvmlInit": {"error": error}}})
    now = SimpleNamespace(seconds=0.0)
    library = NvmlLibrary(lambda: driver, lambda: now.seconds)
    assert nvidia.read_driver(library).absence is absence
    assert nvidia.read_driver(library).absence is absence
    assert driver.init_count == 1
    driver.dump["system"] = {"nvmlSystemGetDriverVersion": "595.71.05"}
    now.seconds = RETRY_SECONDS
    assert nvidia.read_driver(library) == Driver("595.71.05")


def test_a_missing_binding_is_a_missing_library():
    def missing() -> None:
        raise ImportError("No module named 'pynvml'")

    found = nvidia.read_driver(NvmlLibrary(missing))
    assert (found.absence, "nvidia-ml-py" in found.absence_text) == (DriverAbsence.LIBRARY_NOT_FOUND, True)


@pytest.mark.parametrize("error", [1, 9, 18])
def test_a_driver_taken_away_beneath_us_is_opened_anew_after_the_pause(error):
    driver = DumpedDriver(load_dump("healthy_3090"))
    now = SimpleNamespace(seconds=0.0)
    library = NvmlLibrary(lambda: driver, lambda: now.seconds)
    assert len(card_telemetry((), library)) == 1
    working = driver.devices[0]["nvmlDeviceGetPowerUsage"]
    driver.devices[0]["nvmlDeviceGetPowerUsage"] = {"error": error}
    assert card_telemetry((), library) == ()
    driver.devices[0]["nvmlDeviceGetPowerUsage"] = working
    with pytest.raises(DriverUnavailableError):
        nvidia.read_cards(library)
    now.seconds = RETRY_SECONDS
    assert len(card_telemetry((), library)) == 1
    assert driver.init_count == 2


def test_faults_are_heard_from_the_first_poll_on_with_the_card_they_belong_to():
    driver, library = driver_of("two_memory_nodes")
    watcher = XidWatcher(library)
    assert watcher.poll() == ()
    driver.devices[1]["events"] = [{"eventType": XID_CRITICAL, "eventData": 79}, {"eventType": XID_CRITICAL, "eventData": 45}]
    driver.devices[1]["lost"] = True
    assert watcher.poll() == (XidEvent(79, "0000:41:00.0"), XidEvent(45, "0000:41:00.0"))
    assert watcher.poll() == ()
    assert watcher.counts == {load_dump("two_memory_nodes")["devices"][1]["nvmlDeviceGetUUID"]: XidCount(newest_xid=45, count=2)}


def test_a_card_in_a_loop_of_faults_does_not_hold_telemetry_up():
    driver, library = driver_of("healthy_3090")
    watcher = XidWatcher(library)
    watcher.poll()
    driver.devices[0]["events"] = [{"eventType": XID_CRITICAL, "eventData": 31}] * (EVENTS_MAX + 5)
    assert (len(watcher.poll()), len(watcher.poll())) == (EVENTS_MAX, 5)


def test_what_was_heard_of_a_card_stands_beside_how_it_is():
    driver, library = driver_of("two_memory_nodes")
    watcher = XidWatcher(library)
    watcher.poll()
    for _ in range(2):
        driver.devices[0]["events"] = [{"eventType": XID_CRITICAL, "eventData": 31}]
        watcher.poll()
    first, second = card_telemetry((), library, watcher.counts)
    assert (first.newest_xid, first.xid_count, second.newest_xid, second.xid_count) == (31, 2, None, 0)


def test_a_driver_that_goes_while_its_cards_are_listed_fails_no_poll():
    driver, library = driver_of("healthy_3090")
    driver.devices[0]["nvmlDeviceGetName"] = {"error": 9}
    assert XidWatcher(library).poll() == ()


def test_what_processes_hold_of_cards_is_known_where_the_driver_says_so_of_each():
    driver, library = driver_of("two_memory_nodes")
    uuids = tuple(device["nvmlDeviceGetUUID"] for device in driver.devices)
    for device, held in zip(driver.devices, ({7: 100, 8: 20}, {8: 3, 9: 5}), strict=True):
        device["nvmlDeviceGetComputeRunningProcesses_v3"] = [
            {"pid": pid, "usedGpuMemory": size_bytes, "gpuInstanceId": None, "computeInstanceId": None} for pid, size_bytes in held.items()
        ]
    assert card_bytes_held(uuids, {8}, library) == 23
    assert card_bytes_held(uuids[:1], {7, 8}, library) == 120
    assert card_bytes_held(uuids, {7}, library) is None, "of the second card nothing is known"
    assert card_bytes_held(uuids, {1}, library) is None, "as in a container, whose numbers the driver does not use"
    assert card_bytes_held((*uuids, "GPU-gone"), {8}, library) is None
    driver.devices[0]["nvmlDeviceGetComputeRunningProcesses_v3"][1]["usedGpuMemory"] = None
    assert card_bytes_held(uuids, {8}, library) is None
    driver.devices[1]["lost"] = True
    assert card_bytes_held(uuids[1:], {8}, library) is None
    _, without = driver_of("driver_not_loaded")
    assert card_bytes_held(uuids, {8}, without) is None


def test_without_a_driver_no_fault_is_heard():
    _, library = driver_of("driver_not_loaded")
    assert XidWatcher(library).poll() == ()


def test_a_link_is_judged_by_its_fastest_moment_and_the_load_of_that_moment():
    driver, library = driver_of("healthy_3090")
    (card,) = nvidia.read_cards(library)
    driver.devices[0] |= {"nvmlDeviceGetUtilizationRates": {"gpu": 80, "memory": 1}, "nvmlDeviceGetCurrPcieLinkGeneration": 3}
    busy = nvidia.highest_link(library, card)
    driver.devices[0] |= {"nvmlDeviceGetUtilizationRates": {"gpu": 2, "memory": 0}, "nvmlDeviceGetCurrPcieLinkGeneration": 1}
    assert nvidia.highest_link(library, busy) == busy
    assert (busy.reading.utilization_percent, busy.reading.pcie_generation) == (80, 3)
