"""Every fact about a card that is read from the driver, in one table: how it is called, and how its answer is read.

Decides which calls give which fact, and what stands in for a call that an older driver lacks. Units are NVML's own: milliwatts,
millijoules, MHz, °C, bytes. The memory's temperature is not here: on a 3090 the driver does not give it.

Numbers are NVML's, as in nvml.h: the binding's own names load only with the binding, and one of them is wrong in it
(NVML_P2P_CAPS_INDEX_READ is a tuple).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from potluck_node.domain.hardware import CardProcess, PeerStatus, ThrottleReason
from potluck_node.probe.nvml import Call, Probe

NVLINK_PORTS_MAX: Final = 18
"""Of one card, of any kind; a 3090 has four."""
_MEMORY_INFO_V2: Final = 0x02000028
"""nvmlMemory_v2: "used" without what the driver keeps for itself."""
_CLOCK_SM: Final = 1
_CLOCK_MEMORY: Final = 2
_PEER_READ: Final = 0
_PEER_NVLINK: Final = 2

_THROTTLE_BITS: Final = {
    0x04: ThrottleReason.POWER_CAP,
    0x08: ThrottleReason.HARDWARE_SLOWDOWN,
    0x10: ThrottleReason.SYNC_BOOST,
    0x20: ThrottleReason.SOFTWARE_THERMAL,
    0x40: ThrottleReason.HARDWARE_THERMAL,
    0x80: ThrottleReason.POWER_BRAKE,
}
"""The bits of nvmlClocksEventReasons that slow a card down; idle, and clocks that its owner or a display set, do not count."""
_PEER_STATUSES: Final = {
    0: PeerStatus.OK,
    1: PeerStatus.CHIPSET_NOT_SUPPORTED,
    2: PeerStatus.CARD_NOT_SUPPORTED,
    3: PeerStatus.TOPOLOGY_NOT_SUPPORTED,
    4: PeerStatus.DISABLED,
    5: PeerStatus.NOT_SUPPORTED,
}


def kernel_bus_id(bus_id: str) -> str:
    """Of "00000000:01:00.0" it is "0000:01:00.0": the driver writes eight digits of the domain, the kernel four."""
    return bus_id.lower()[-12:]


def cuda_version_text(version: int) -> str:
    """Of 13020 it is "13.2"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def throttle_reasons(bits: int) -> tuple[ThrottleReason, ...]:
    """The reasons in a bit set, in the order of their bits."""
    return tuple(reason for bit, reason in _THROTTLE_BITS.items() if bits & bit)


def _of(function: str, *arguments: int, value: Callable[[Any], Any] = int) -> Probe:
    return Probe((Call(function, arguments),), value)


def _field(name: str) -> Callable[[Any], int]:
    return lambda answer: int(getattr(answer, name))


def _first_of(value: Callable[[Any], Any], *calls: Call) -> Probe:
    return Probe(calls, value)


_MEMORY_CALLS: Final = (Call("nvmlDeviceGetMemoryInfo", (_MEMORY_INFO_V2,)), Call("nvmlDeviceGetMemoryInfo"))

IDENTITY: Final[Mapping[str, Probe]] = {
    "name": _of("nvmlDeviceGetName", value=str),
    "uuid": _of("nvmlDeviceGetUUID", value=str),
    "bus_id": _of("nvmlDeviceGetPciInfo", value=lambda info: kernel_bus_id(info.busId)),
    "compute_capability": _of("nvmlDeviceGetCudaComputeCapability", value=lambda pair: f"{pair[0]}.{pair[1]}"),
    "memory_bytes": _first_of(_field("total"), *_MEMORY_CALLS),
    "bar1_bytes": _of("nvmlDeviceGetBAR1MemoryInfo", value=_field("bar1Total")),
    "shutdown_celsius": _of("nvmlDeviceGetTemperatureThreshold", 0),
    "slowdown_celsius": _of("nvmlDeviceGetTemperatureThreshold", 1),
    "operating_max_celsius": _of("nvmlDeviceGetTemperatureThreshold", 3),
    "target_celsius": _of("nvmlDeviceGetTemperatureThreshold", 5),
    "power_limit_default_milliwatts": _of("nvmlDeviceGetPowerManagementDefaultLimit"),
    "power_limit_min_milliwatts": _of("nvmlDeviceGetPowerManagementLimitConstraints", value=lambda pair: int(pair[0])),
    "power_limit_max_milliwatts": _of("nvmlDeviceGetPowerManagementLimitConstraints", value=lambda pair: int(pair[1])),
    "clock_sm_max_mhz": _of("nvmlDeviceGetMaxClockInfo", _CLOCK_SM),
    "clock_memory_max_mhz": _of("nvmlDeviceGetMaxClockInfo", _CLOCK_MEMORY),
    "pcie_generation_max": _of("nvmlDeviceGetMaxPcieLinkGeneration"),
    "pcie_width_max": _of("nvmlDeviceGetMaxPcieLinkWidth"),
}
"""By field of `CardIdentity`."""

HEAT: Final[Mapping[str, Probe]] = {
    name: IDENTITY[name]
    for name in (
        "slowdown_celsius",
        "operating_max_celsius",
        "target_celsius",
        "power_limit_default_milliwatts",
        "power_limit_min_milliwatts",
        "power_limit_max_milliwatts",
    )
}
"""What a card's heat is judged by, beside its `READING`."""

READING: Final[Mapping[str, Probe]] = {
    "temperature_celsius": _first_of(int, Call("nvmlDeviceGetTemperatureV", (0,)), Call("nvmlDeviceGetTemperature", (0,))),
    "thermal_margin_celsius": _of("nvmlDeviceGetMarginTemperature"),
    "power_milliwatts": _of("nvmlDeviceGetPowerUsage"),
    "power_limit_milliwatts": _of("nvmlDeviceGetEnforcedPowerLimit"),
    "energy_millijoules": _of("nvmlDeviceGetTotalEnergyConsumption"),
    "clock_sm_mhz": _of("nvmlDeviceGetClockInfo", _CLOCK_SM),
    "clock_memory_mhz": _of("nvmlDeviceGetClockInfo", _CLOCK_MEMORY),
    "throttle_reasons": _first_of(
        throttle_reasons, Call("nvmlDeviceGetCurrentClocksEventReasons"), Call("nvmlDeviceGetCurrentClocksThrottleReasons")
    ),
    "utilization_percent": _of("nvmlDeviceGetUtilizationRates", value=_field("gpu")),
    "memory_used_bytes": _first_of(_field("used"), *_MEMORY_CALLS),
    "memory_free_bytes": _first_of(_field("free"), *_MEMORY_CALLS),
    "pcie_generation": _of("nvmlDeviceGetCurrPcieLinkGeneration"),
    "pcie_width": _of("nvmlDeviceGetCurrPcieLinkWidth"),
    "pcie_replay_count": _of("nvmlDeviceGetPcieReplayCounter"),
}
"""By field of `CardReading`."""

POWER_CAP: Final = _of("nvmlDeviceGetPowerManagementLimit")
"""What was last set, also where something else, as a laptop's charger, enforces less: that is what is given back."""

LINK: Final[Mapping[str, Probe]] = {
    "pcie_generation": READING["pcie_generation"],
    "pcie_width": READING["pcie_width"],
    "utilization_percent": READING["utilization_percent"],
}
"""What has to be looked at more than once, because it follows the load."""

PAIR: Final[Mapping[str, Probe]] = {
    "nvlink": _of("nvmlDeviceGetP2PStatus", _PEER_NVLINK, value=lambda status: _PEER_STATUSES.get(status, PeerStatus.UNKNOWN)),
    "read": _of("nvmlDeviceGetP2PStatus", _PEER_READ, value=lambda status: _PEER_STATUSES.get(status, PeerStatus.UNKNOWN)),
}
"""By field of `CardPair`; its subjects are two cards."""

DRIVER: Final[Mapping[str, Probe]] = {
    "version": _of("nvmlSystemGetDriverVersion", value=str),
    "cuda_version": _first_of(cuda_version_text, Call("nvmlSystemGetCudaDriverVersion_v2"), Call("nvmlSystemGetCudaDriverVersion")),
}
"""By field of `Driver`."""

CARD_COUNT: Final = _of("nvmlDeviceGetCount")


def nvlink_active(port: int) -> Probe:
    """Whether one NVLink port is up."""
    return _of("nvmlDeviceGetNvLinkState", port, value=bool)


def nvlink_remote(port: int) -> Probe:
    """The bus id of the card at the other end of a port."""
    return _of("nvmlDeviceGetNvLinkRemotePciInfo", port, value=lambda info: kernel_bus_id(info.busId))


PROCESSES: Final[Mapping[str, Probe]] = {
    "compute": _first_of(list, Call("nvmlDeviceGetComputeRunningProcesses_v3"), Call("nvmlDeviceGetComputeRunningProcesses")),
    "graphics": _first_of(list, Call("nvmlDeviceGetGraphicsRunningProcesses_v3"), Call("nvmlDeviceGetGraphicsRunningProcesses")),
}
"""By kind of process; a process may be in both lists."""


def card_process(entry: Any, kind: str, *, own: bool) -> CardProcess:
    """One entry of such a list."""
    memory_bytes = None if entry.usedGpuMemory is None else int(entry.usedGpuMemory)
    return CardProcess(int(entry.pid), kind, memory_bytes, own)
