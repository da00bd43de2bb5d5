#!/usr/bin/python3 -I
"""Sets the power cap of one NVIDIA card, as root, for an agent that is not root.

Decides nothing: it takes a card and a number, refuses what the card's own driver says is out of its range, and sets it. It is one file of
the standard library alone, so that its owner can copy it to where nobody but root writes, read it in two minutes, and let the agent's user
start that copy and nothing else. It must not import anything of potluck's: that lies in a folder which the agent's user may write.

    potluck-power-cap GPU-8f1c4f5e-0000-4000-8000-0123456789ab 280000
"""

import ctypes
import re
import sys
from collections.abc import Callable
from typing import Any

USAGE = """usage: potluck-power-cap CARD_UUID MILLIWATTS

Sets how much power one NVIDIA card may take, as root. A line of sudoers that lets USER do this and nothing else:
USER ALL=(root) NOPASSWD: /usr/local/sbin/potluck-power-cap GPU-* [0-9]*"""
UUID = re.compile(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
MILLIWATTS = re.compile(r"[1-9][0-9]{3,6}", re.ASCII)
LIBRARY = "libnvidia-ml.so.1"
NO_PERMISSION = 4
EXIT_USAGE, EXIT_NO_DRIVER, EXIT_OUT_OF_RANGE, EXIT_NO_PERMISSION, EXIT_FAILED = 2, 3, 4, 5, 6


class CapError(Exception):
    """Why nothing was set, and the exit code for it."""

    def __init__(self, exit_code: int, words: str) -> None:
        super().__init__(words)
        self.exit_code = exit_code


def set_cap(library: Any, uuid: str, milliwatts: int) -> None:
    """Sets the cap within the card's own range; raises CapError."""
    check(library.nvmlInit_v2(), "the driver cannot be used", EXIT_NO_DRIVER)
    try:
        card = ctypes.c_void_p()
        check(library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(card)), f"there is no card {uuid}", EXIT_NO_DRIVER)
        lowest, highest = ctypes.c_uint(), ctypes.c_uint()
        told = library.nvmlDeviceGetPowerManagementLimitConstraints(card, ctypes.byref(lowest), ctypes.byref(highest))
        check(told, "the driver does not say which caps the card takes", EXIT_FAILED)
        if not lowest.value <= milliwatts <= highest.value:
            raise CapError(EXIT_OUT_OF_RANGE, f"the card takes {lowest.value} to {highest.value} mW, not {milliwatts}")
        check(library.nvmlDeviceSetPowerManagementLimit(card, ctypes.c_uint(milliwatts)), "the cap was not set", EXIT_FAILED)
    finally:
        library.nvmlShutdown()


def check(code: int, words: str, exit_code: int) -> None:
    """Raises CapError for a code of the driver's that is not its success."""
    if code == NO_PERMISSION:
        raise CapError(EXIT_NO_PERMISSION, "only root may set a cap")
    if code != 0:
        raise CapError(exit_code, f"{words} (NVML error {code})")


def main(arguments: list[str], load: Callable[[str], Any] = ctypes.CDLL) -> int:
    """The exit code."""
    if len(arguments) != 2 or not UUID.fullmatch(arguments[0]) or not MILLIWATTS.fullmatch(arguments[1]):
        sys.stderr.write(f"{USAGE}\n")
        return EXIT_USAGE
    try:
        library = load(LIBRARY)
    except OSError as error:
        sys.stderr.write(f"error: no NVIDIA driver here: {error}\n")
        return EXIT_NO_DRIVER
    try:
        set_cap(library, arguments[0], int(arguments[1]))
    except CapError as failure:
        sys.stderr.write(f"error: {failure}\n")
        return failure.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
