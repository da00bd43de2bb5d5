"""A driver's library that answers from a dump, in the place of `pynvml`.

A dump is a JSON file of `tests/fixtures/nvml`: what each function of the library returns, by the function's own name.

- `built_from` says where its figures come from, `based_on` names a dump whose cards and system it changes.
- `system` holds functions without a card; `card` is what all `devices` share, and each device says what is different about it.
- An answer is a value, or `{"error": N}` for nvmlReturn_t N. A function that is not named is "not supported".
- Functions that are asked for one of several things (`BY_ARGUMENT`) hold their answers by the number that is asked for.
- `lost` makes every call about a device fail as the driver does for a card that fell off the bus.
- `pairs` holds functions of two devices, `sysfs` what the kernel's files say of a bus id, `kernel_log` lines of the kernel's log.

The library's real signatures are held: a call that the real one would refuse is refused here.
"""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml

FIXTURES = Path(__file__).parents[1] / "fixtures/nvml"
BY_ARGUMENT = {
    "nvmlDeviceGetClockInfo",
    "nvmlDeviceGetMaxClockInfo",
    "nvmlDeviceGetNvLinkRemotePciInfo",
    "nvmlDeviceGetNvLinkState",
    "nvmlDeviceGetP2PStatus",
    "nvmlDeviceGetTemperatureThreshold",
}
INVALID_ARGUMENT, NOT_SUPPORTED, TIMEOUT, GPU_IS_LOST = 2, 3, 10, 15
DUMPS = tuple(sorted(path.stem for path in FIXTURES.glob("*.json")))


def load_dump(name: str) -> dict[str, Any]:
    """A dump with what it is based on filled in: `system` and `devices` are whole."""
    merged: dict[str, Any] = {}
    for dump in _lineage(name):
        for part in ("system", "card"):
            dump[part] = {**merged.get(part, {}), **dump.get(part, {})}
        merged |= dump
    merged["devices"] = [{**merged["card"], **device} for device in merged["devices"]]
    return merged


def _lineage(name: str) -> list[dict[str, Any]]:
    dump: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text())
    return [*(_lineage(dump["based_on"]) if "based_on" in dump else ()), dump]


def set_cap(device: dict[str, Any], milliwatts: int) -> None:
    """As the driver has it from then on, whoever set it."""
    device["nvmlDeviceGetPowerManagementLimit"] = device["nvmlDeviceGetEnforcedPowerLimit"] = milliwatts


class DumpedDriver(ModuleType):
    """The library. Its `devices` may be changed while it is in use, as cards change."""

    def __init__(self, dump: dict[str, Any]) -> None:
        super().__init__("pynvml")
        self.dump = copy.deepcopy(dump)
        self.devices: list[dict[str, Any]] = self.dump["devices"]
        self.NVMLError = pynvml.NVMLError
        self.init_count = 0
        self.calls: list[str] = []
        self.caps_set: list[int] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)
        real = getattr(pynvml, name)

        def answer(*arguments: Any) -> Any:
            inspect.signature(real).bind(*arguments)
            self.calls.append(name)
            return self._answer(name, arguments)

        return answer

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> Any:
        special = getattr(self, f"_{name}", None)
        if special is not None:
            return special(*arguments)
        handles = [argument for argument in arguments if isinstance(argument, SimpleNamespace)]
        numbers = arguments[len(handles) :]
        if not all(isinstance(number, int) for number in numbers):
            raise TypeError(f"{name} takes numbers, not {numbers}")
        if any(self.devices[handle.index].get("lost") for handle in handles):
            raise pynvml.NVMLError(GPU_IS_LOST)
        answers = self._answers_of([handle.index for handle in handles])
        found = answers.get(name, {"error": NOT_SUPPORTED})
        if name in BY_ARGUMENT and "error" not in found:
            found = found.get(str(numbers[0]), {"error": NOT_SUPPORTED})
        return _value(found)

    def _answers_of(self, indexes: list[int]) -> dict[str, Any]:
        if not indexes:
            return self.dump["system"]
        if len(indexes) == 1:
            return self.devices[indexes[0]]
        return next((pair for pair in self.dump.get("pairs", ()) if pair["between"] == indexes), {})

    def _nvmlInit(self) -> None:  # noqa: N802 - the library's own name
        self.init_count += 1
        _value(self.dump["system"].get("nvmlInit"))

    def _nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.devices)

    def _nvmlDeviceGetHandleByIndex(self, index: int) -> SimpleNamespace:  # noqa: N802
        if self.devices[index].get("lost"):
            raise pynvml.NVMLError(GPU_IS_LOST)
        return SimpleNamespace(index=index)

    def _nvmlDeviceGetMemoryInfo(self, handle: SimpleNamespace, version: int | None = None) -> Any:  # noqa: N802
        device = self.devices[handle.index]
        if device.get("lost"):
            raise pynvml.NVMLError(GPU_IS_LOST)
        if "nvmlDeviceGetMemoryInfo" not in device or (version is not None and device.get("memory_info_v2") is False):
            raise pynvml.NVMLError(NOT_SUPPORTED)
        info = _value(device["nvmlDeviceGetMemoryInfo"])
        if version is None:
            # The older form counts what the driver keeps for itself as used.
            return SimpleNamespace(total=info.total, free=info.free, used=info.used + info.reserved)
        return info

    def _nvmlDeviceSetPowerManagementLimit(self, handle: SimpleNamespace, limit: int) -> None:  # noqa: N802
        device = self.devices[handle.index]
        if device.get("lost"):
            raise pynvml.NVMLError(GPU_IS_LOST)
        _value(device.get("nvmlDeviceSetPowerManagementLimit"))
        lowest, highest = device["nvmlDeviceGetPowerManagementLimitConstraints"]
        if not lowest <= limit <= highest:
            raise pynvml.NVMLError(INVALID_ARGUMENT)
        set_cap(device, limit)
        self.caps_set.append(limit)

    def _nvmlEventSetCreate(self) -> list[dict[str, Any]]:  # noqa: N802
        return []

    def _nvmlDeviceRegisterEvents(self, handle: SimpleNamespace, types: int, event_set: list[dict[str, Any]]) -> None:  # noqa: N802
        assert types == pynvml.nvmlEventTypeXidCriticalError
        event_set.append(self.devices[handle.index])

    def _nvmlEventSetWait_v2(self, event_set: list[dict[str, Any]], timeout_ms: int) -> Any:  # noqa: N802
        assert timeout_ms == 0, "telemetry waits for nothing"
        for device in event_set:
            if device.get("events"):
                return SimpleNamespace(**device["events"].pop(0))
        raise pynvml.NVMLError(TIMEOUT)


def write_sysfs(dump: dict[str, Any], root: Path) -> Path:
    """The kernel's files of a dump's cards: each lies under its port, and is linked to from the bus."""
    devices = root / "bus/pci/devices"
    devices.mkdir(parents=True)
    for number, (bus_id, files) in enumerate(dump["sysfs"].items()):
        port = root / f"devices/pci0000:00/0000:00:{number + 1:02}.0"
        card = port / bus_id
        card.mkdir(parents=True)
        (port / "max_link_width").write_text(f"{files['port_max_link_width']}\n")
        (card / "max_link_width").write_text(f"{files['max_link_width']}\n")
        (card / "numa_node").write_text(f"{files['numa_node']}\n")
        (card / "vendor").write_text("0x10de\n")
        (card / "class").write_text("0x030000\n")
        (devices / bus_id).symlink_to(card)
    return root


def _value(found: Any) -> Any:
    if isinstance(found, dict):
        if "error" in found:
            raise pynvml.NVMLError(found["error"])
        return SimpleNamespace(**found)
    if isinstance(found, list):
        return [_value(entry) for entry in found]
    return found
