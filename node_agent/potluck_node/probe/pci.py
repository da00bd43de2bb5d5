"""The PCI bus by the kernel's own files: where a card sits, and whether a card is there at all.

Decides which files say so. It must not know the driver, which sees less: a card without a driver, and a slot with fewer lanes than its
card, show only here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from potluck_node.domain.hardware import Slot

SYSFS: Final = Path("/sys")
WIDTHS: Final = frozenset({1, 2, 4, 8, 12, 16, 32})
"""Lanes that a PCIe link may have."""
_NVIDIA: Final = "0x10de"
_DISPLAY_CLASS: Final = "0x03"


def read_slot(bus_id: str | None, root: Path = SYSFS) -> Slot:
    """The slot of the card with this bus id."""
    if bus_id is None:
        return Slot()
    device = root / "bus/pci/devices" / bus_id
    numa_node = _number(device / "numa_node")
    return Slot(
        # The kernel writes -1 where the machine does not say.
        numa_node=numa_node if numa_node is not None and numa_node >= 0 else None,
        card_width_max=_width(device),
        # The devices lie within each other as they are wired; what the link resolves to stands under its port.
        slot_width_max=_width(device.resolve().parent),
    )


def nvidia_card_count(root: Path = SYSFS) -> int | None:
    """NVIDIA display devices on the bus, with a driver or without; None where there is no such bus to look at."""
    devices = root / "bus/pci/devices"
    if not devices.is_dir():
        return None
    return sum(
        _text(device / "vendor") == _NVIDIA and (_text(device / "class") or "").startswith(_DISPLAY_CLASS) for device in devices.iterdir()
    )


def _width(device: Path) -> int | None:
    width = _number(device / "max_link_width")
    # Where there is no link the kernel writes 0 or 255.
    return width if width in WIDTHS else None


def _number(path: Path) -> int | None:
    text = _text(path)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
