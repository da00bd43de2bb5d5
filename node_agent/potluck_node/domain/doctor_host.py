"""Checks of the machine and of its way to the pool: driver, disk, shared memory, ports, clock.

Decides what an engine and an agent need around the cards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from potluck_node.domain.findings import GIB, Examination, Finding, Level, gib, listed
from potluck_node.domain.hardware import Driver, DriverAbsence, Reach

ENGINE_CUDA_MINIMUM: Final[Mapping[str, tuple[int, int]]] = {"sglang": (13, 0), "vllm": (13, 0)}
"""The CUDA that an engine's wheels are built for, by its kind; a driver must run that major version. vLLM builds its default wheels for
CUDA 13 since 0.20 (github.com/vllm-project/router/pull/154), SGLang since 0.5.11 (github.com/gpustack/gpustack/issues/5285). llama.cpp is
not here: the wheel that a node installs computes without CUDA."""
DRIVER_OF_CUDA: Final[Mapping[int, str]] = {12: "525", 13: "580"}
"""The first driver for a CUDA major version: docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html."""
DISK_FAIL_BYTES: Final = 5 * GIB
"""An 8B model at four bits."""
DISK_WARN_BYTES: Final = 50 * GIB
"""A 70B model at four bits takes about 40 GiB."""
SHARED_MEMORY_BYTES: Final = GIB
"""What NVIDIA's own containers ask for engines on several cards (`--shm-size=1g`)."""
CLOCK_WARN_SECONDS: Final = 30
CLOCK_FAIL_SECONDS: Final = 300
"""A node's certificate is valid from five minutes before it was made: a clock further behind refuses it."""

_ANYWHERE: Final = ("0.0.0.0:", ":::")
"""How an address begins that stands for every interface, public ones too."""
_ABSENCE_FIXES: Final = {
    DriverAbsence.LIBRARY_NOT_FOUND: "install the NVIDIA driver, 580 or newer; in a container, start it with --gpus all",
    DriverAbsence.DRIVER_NOT_LOADED: "sudo modprobe nvidia; if that fails, install the driver for your kernel again and restart",
    DriverAbsence.NO_PERMISSION: "sudo usermod -aG video,render $USER, then log in again",
    DriverAbsence.VERSION_MISMATCH: "the driver was updated beneath its library: restart the machine",
    DriverAbsence.OTHER: "run nvidia-smi and follow what it says",
}


def check_driver(examination: Examination) -> tuple[Finding, ...]:
    """Whether there is a driver, and whether it is new enough for the engines."""
    driver = examination.hardware.driver
    if driver.absence is not None:
        return (_absence(driver, driver.absence),)
    if driver.cuda_version is None:
        return (Finding(Level.WARN, "driver", f"{driver.version or 'it'} does not tell which CUDA it runs", "nvidia-smi"),)
    needs = listed(f"{kind} {major}.{minor}" for kind, (major, minor) in sorted(ENGINE_CUDA_MINIMUM.items()))
    short = {kind: need for kind, need in ENGINE_CUDA_MINIMUM.items() if _version(driver.cuda_version) < need}
    what = f"{driver.version or 'of unknown version'} runs CUDA {driver.cuda_version}; needed: {needs}"
    if not short:
        return (Finding(Level.OK, "driver", what),)
    level = Level.FAIL if short.keys() & examination.owner.engine_kinds else Level.WARN
    major = max(need for need in short.values())[0]
    return (Finding(level, "driver", what, f"install driver {DRIVER_OF_CUDA[major]} or newer, then restart the machine"),)


def check_shared_memory(examination: Examination) -> tuple[Finding, ...]:
    """Room for the processes of an engine on several cards to talk; said only where it is short."""
    size_bytes = examination.hardware.host.shared_memory_bytes
    if len(examination.live_cards) < 2 or size_bytes is None or size_bytes >= SHARED_MEMORY_BYTES:
        return ()
    what = f"/dev/shm has {size_bytes // 2**20} MiB: engines on several cards will not start"  # noqa: S108 - a name in a sentence
    return (Finding(Level.WARN, "shared memory", what, "start the container with --ipc=host or --shm-size=8g"),)


def check_disk(examination: Examination) -> tuple[Finding, ...]:
    """Room for model files."""
    free_bytes = examination.hardware.host.disk_free_bytes
    if free_bytes is None:
        return (Finding(Level.WARN, "disk", "free space cannot be read where models are kept", "look at cache_dir in node.toml"),)
    what = f"{gib(free_bytes)} free where models are kept"
    if free_bytes >= DISK_WARN_BYTES:
        return (Finding(Level.OK, "disk", what),)
    level = Level.FAIL if free_bytes < DISK_FAIL_BYTES else Level.WARN
    return (Finding(level, "disk", what, "free some, or set cache_dir in node.toml to a larger disk"),)


def check_coordinator(examination: Examination) -> tuple[Finding, ...]:
    """Whether the coordinator's three ports are reached."""
    network = examination.network
    if network is None:
        return (Finding(Level.OK, "network", "not joined to a pool yet, so there is no coordinator to reach", "potluck node join"),)
    bad = tuple(_unreached(reach) for reach in network.reaches if reach.round_trip_ms is None)
    if bad:
        return bad
    trips = [reach.round_trip_ms for reach in network.reaches if reach.service == "link" and reach.round_trip_ms is not None]
    distance = f", {trips[0]:.1f} ms away" if trips else ""
    return (Finding(Level.OK, "network", f"the coordinator's {listed(r.service for r in network.reaches)} ports are reached{distance}"),)


def check_ports(examination: Examination) -> tuple[Finding, ...]:
    """That nothing of the agent can be reached from outside."""
    network = examination.network
    listening = None if network is None else network.listening
    if listening:
        what = f"the agent's processes listen beyond this machine, on {listed(listening)}"
        if not examination.owner.group_allowed:
            return (Finding(Level.WARN, "ports", what, "potluck node leave, and report it: without group_site a node opens no port"),)
        if any(address.startswith(_ANYWHERE) for address in listening):
            return (Finding(Level.WARN, "ports", what, "let your firewall keep all but your group's network away from these ports"),)
        return (Finding(Level.OK, "ports", f"{what}, for the group that group_site allows"),)
    what = "a node opens none" if listening is None else "none of the agent's processes listens beyond this machine"
    return (Finding(Level.OK, "ports", what),)


def check_clock(examination: Examination) -> tuple[Finding, ...]:
    """Whether this machine and the coordinator agree about the time."""
    network = examination.network
    if network is None:
        return ()
    skew_seconds = network.clock_skew_seconds
    if skew_seconds is None:
        return (Finding(Level.OK, "clock", "the coordinator's clock was not seen"),)
    what = f"{abs(skew_seconds):.0f} s {'behind' if skew_seconds < 0 else 'ahead of'} the coordinator's"
    if abs(skew_seconds) < CLOCK_WARN_SECONDS:
        return (Finding(Level.OK, "clock", what),)
    level = Level.FAIL if abs(skew_seconds) >= CLOCK_FAIL_SECONDS else Level.WARN
    return (Finding(level, "clock", what, "sudo timedatectl set-ntp true"),)


def _absence(driver: Driver, absence: DriverAbsence) -> Finding:
    count = driver.bus_card_count
    said = driver.absence_text.rstrip(".")
    if not count and absence is DriverAbsence.LIBRARY_NOT_FOUND:
        seen = "no NVIDIA card on the PCI bus" if count == 0 else "no NVIDIA driver"
        return Finding(Level.OK, "driver", f"{seen} ({said}): this is a CPU node")
    cards = "" if count is None else f"{count} NVIDIA {'card' if count == 1 else 'cards'} on the PCI bus, but "
    return Finding(Level.WARN, "driver", f"{cards}no driver to use ({said}): this is a CPU node", _ABSENCE_FIXES[absence])


def _unreached(reach: Reach) -> Finding:
    level = Level.FAIL if reach.service == "link" else Level.WARN
    what = f"the coordinator's {reach.service} port {reach.target} is not reached: {reach.failure}"
    return Finding(level, "network", what, "ask the operator whether it runs; your firewall must let TCP out to that port")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())
