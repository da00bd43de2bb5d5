"""Checks of the machine around the cards: driver, engines, shared memory, disk.

Decides what an engine needs there, and what is told of a machine that is not all this node's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from potluck_node.domain.findings import GIB, Examination, Finding, Level, gib, listed
from potluck_node.domain.hardware import Driver, DriverAbsence

USUAL_CUDA: Final[Mapping[str, str]] = {"sglang": "13.0", "vllm": "13.0"}
"""What an engine's usual wheels are built for, by its kind, where no environment tells. vLLM builds them for CUDA 13 since 0.20
(github.com/vllm-project/router/pull/154), SGLang since 0.5.11 (github.com/gpustack/gpustack/issues/5285). llama.cpp is not here: the wheel
that a node installs computes without CUDA."""
DRIVER_OF_CUDA: Final[Mapping[int, str]] = {12: "525", 13: "580"}
"""The first driver for a CUDA major version: docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html."""
CARD_ENGINE_KINDS: Final = frozenset({"attach", "sglang", "vllm"})
"""Those that compute on cards; of an attached server only its owner knows, who has cared for it."""
DISK_FAIL_BYTES: Final = 5 * GIB
"""An 8B model at four bits."""
DISK_WARN_BYTES: Final = 50 * GIB
"""A 70B model at four bits takes about 40 GiB."""
SHARED_MEMORY_BYTES: Final = GIB
"""What NVIDIA's own containers ask for engines on several cards (`--shm-size=1g`)."""

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
    built_for = examination.owner.engine_cuda_versions
    needs = _needed_cuda(built_for)
    what = f"{driver.version or 'of unknown version'} runs CUDA {driver.cuda_version}{_needed_words(built_for, needs)}"
    # A driver runs what was built for any minor version of its CUDA.
    short = {kind: _version(need)[0] for kind, need in needs.items() if _version(need)[0] > _version(driver.cuda_version)[0]}
    if not short:
        later = any(_version(need) > _version(driver.cuda_version) for need in needs.values())
        return (Finding(Level.OK, "driver", what + (f" (any CUDA {_version(driver.cuda_version)[0]} runs it)" if later else "")),)
    # What no environment told is a guess.
    level = Level.FAIL if any(built_for.get(kind) for kind in short) else Level.WARN
    major = max(short.values())
    wanted = f"driver {DRIVER_OF_CUDA[major]} or newer" if major in DRIVER_OF_CUDA else f"a driver that runs CUDA {major}"
    return (Finding(level, "driver", what, f"install {wanted}, then restart the machine"),)


def check_engines(examination: Examination) -> tuple[Finding, ...]:
    """Whether any engine here computes on the cards; said only where none does, or what the owner names is none."""
    if failure := examination.owner.engine_failure:
        return (Finding(Level.FAIL, "engine", failure.rstrip("."), "correct node.toml; potluck node engines list shows what there is"),)
    kinds, built_for = examination.owner.engine_kinds, examination.owner.engine_cuda_versions
    if not examination.live_cards or any(built_for.get(kind) != "" for kind in kinds & CARD_ENGINE_KINDS):
        return ()
    without = listed(sorted(kind for kind in kinds if built_for.get(kind) == "")) if "" in built_for.values() else ""
    what = f"no engine here computes on the cards{f': {without} is a build for processors' if without else ''}"
    # What is installed is not used as long as the owner names another.
    first = "take vllm_python out of your settings, then: " if "vllm" in examination.owner.engine_kinds_named else ""
    return (Finding(Level.WARN, "engine", what, f"{first}potluck node engines install vllm"),)


def check_memory(examination: Examination) -> tuple[Finding, ...]:
    """What of the machine's memory is this node's; said only where that is not all of it."""
    host = examination.hardware.host
    if host.memory_bytes is None or host.memory_installed_bytes is None or host.memory_bytes >= host.memory_installed_bytes:
        return ()
    what = f"{gib(host.memory_bytes)} of the machine's {gib(host.memory_installed_bytes)}, by its control group"
    return (Finding(Level.OK, "memory", what),)


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


def _absence(driver: Driver, absence: DriverAbsence) -> Finding:
    count = driver.bus_card_count
    said = driver.absence_text.rstrip(".")
    if not count and absence is DriverAbsence.LIBRARY_NOT_FOUND:
        seen = "no NVIDIA card on the PCI bus" if count == 0 else "no NVIDIA driver"
        return Finding(Level.OK, "driver", f"{seen} ({said}): this is a CPU node")
    cards = "" if count is None else f"{count} NVIDIA {'card' if count == 1 else 'cards'} on the PCI bus, but "
    return Finding(Level.WARN, "driver", f"{cards}no driver to use ({said}): this is a CPU node", _ABSENCE_FIXES[absence])


def _needed_cuda(built_for: Mapping[str, str | None]) -> dict[str, str]:
    """The version by kind of engine: of those that are here, but for builds for processors; else of usual ones."""
    if not built_for:
        return dict(USUAL_CUDA)
    return {kind: USUAL_CUDA.get(kind, "") if version is None else version for kind, version in built_for.items() if version != ""}


def _needed_words(built_for: Mapping[str, str | None], needs: Mapping[str, str]) -> str:
    """What follows the driver's own version."""
    if not built_for:
        return f"; usual builds need {listed(f'{kind} {need}' for kind, need in sorted(needs.items()))}, and none is installed here"
    guessed = {kind: " (its usual build; the one here does not tell)" if built_for[kind] is None else "" for kind in needs}
    return f"; needed: {listed(f'{kind} {need}{guessed[kind]}' for kind, need in sorted(needs.items()))}" if needs else ""


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit()) or (0,)
