"""The NVIDIA driver's library: opened once for a process, and read fact by fact.

Decides when the library is opened, when it is tried again, and that a call which fails costs its own fact only: the driver answers "not
supported" for much, and differently on every card. It must not know which facts there are: `card_table` has them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NoReturn

from potluck_node.domain.hardware import DriverAbsence

RETRY_SECONDS: Final = 30.0
"""How long after a failure the library is tried again: a driver may be loaded later, and asking costs a search of the disk."""
ABSENCES: Final = {
    4: DriverAbsence.NO_PERMISSION,
    9: DriverAbsence.DRIVER_NOT_LOADED,
    12: DriverAbsence.LIBRARY_NOT_FOUND,
    18: DriverAbsence.VERSION_MISMATCH,
}
"""By NVML's error number (nvmlReturn_t)."""
LOST: Final = frozenset({15, 16})
"""GPU_IS_LOST and RESET_REQUIRED: the card is gone until the machine is restarted."""
RELOADED: Final = frozenset({1, 9, 18})
"""UNINITIALIZED, DRIVER_NOT_LOADED, LIB_RM_VERSION_MISMATCH, of a library that was open: the driver was taken away beneath us."""


@dataclass(frozen=True, slots=True)
class Call:
    """A function of the library, and what it is given after its subject."""

    function: str
    arguments: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Probe:
    """How one fact is got: by the first of these calls that answers."""

    calls: tuple[Call, ...]
    value: Callable[[Any], Any]
    """The fact in an answer; None where the answer says that there is none."""


class DriverUnavailableError(Exception):
    """There is no driver to ask."""

    def __init__(self, absence: DriverAbsence, text: str) -> None:
        super().__init__(text)
        self.absence = absence
        self.text = text


class CardLostError(Exception):
    """The driver no longer reaches the card."""


def _imported() -> Any:
    import pynvml  # noqa: PLC0415 - machines without a card never need it

    return pynvml


class NvmlLibrary:
    """The library of one process, for any of its threads. It is never closed: other parts of the process may be reading.

    Args:
        load: gives the binding.
        monotonic_seconds: time for the pause between tries.
    """

    def __init__(self, load: Callable[[], Any] = _imported, monotonic_seconds: Callable[[], float] = time.monotonic) -> None:
        self._load = load
        self._monotonic_seconds = monotonic_seconds
        self._lock = threading.Lock()
        self._binding: Any = None
        self._failure: DriverUnavailableError | None = None
        self._tried_at_seconds = 0.0
        self.uuids: dict[int, str] = {}
        """Cards that answered since the library was opened, by index: one that is lost no longer says who it is."""

    def binding(self) -> Any:
        """The binding, opened; raises DriverUnavailableError."""
        with self._lock:
            if self._binding is not None:
                return self._binding
            now_seconds = self._monotonic_seconds()
            if self._failure is not None and now_seconds - self._tried_at_seconds < RETRY_SECONDS:
                raise DriverUnavailableError(self._failure.absence, self._failure.text)
            self._tried_at_seconds = now_seconds
            try:
                self._binding = self._opened()
            except DriverUnavailableError as failure:
                self._failure = failure
                raise
            self._failure = None
            return self._binding

    def read(self, probe: Probe, *subjects: Any) -> Any:
        """The fact, or None where the driver does not give it.

        Args:
            probe: the calls that may give it.
            subjects: what it is a fact of: nothing, a card's handle, or two.

        Raises:
            CardLostError: the card is gone.
            DriverUnavailableError: there is no driver.
        """
        binding = self.binding()
        for call in probe.calls:
            try:
                return probe.value(getattr(binding, call.function)(*subjects, *call.arguments))
            except Exception as error:  # noqa: BLE001 - an old binding, a new driver: whatever goes wrong costs this fact only
                number = getattr(error, "value", None)
                if number in LOST:
                    raise CardLostError(str(error)) from None
                if number in RELOADED:
                    self._forget(number, str(error))
        return None

    def _opened(self) -> Any:
        try:
            binding = self._load()
            binding.nvmlInit()
        except ImportError as error:
            raise DriverUnavailableError(DriverAbsence.LIBRARY_NOT_FOUND, f"the Python package nvidia-ml-py is missing ({error})") from None
        except Exception as error:  # noqa: BLE001 - as in `read`
            absence = ABSENCES.get(getattr(error, "value", 0), DriverAbsence.OTHER)
            raise DriverUnavailableError(absence, str(error) or type(error).__name__) from None
        return binding

    def _forget(self, number: int, text: str) -> NoReturn:
        """What was opened no longer works; it is opened anew after the pause."""
        failure = DriverUnavailableError(ABSENCES.get(number, DriverAbsence.OTHER), text)
        with self._lock:
            self._binding = None
            self.uuids = {}
            self._failure = failure
            self._tried_at_seconds = self._monotonic_seconds()
        raise failure from None


@cache
def process_library() -> NvmlLibrary:
    """The one of this process."""
    return NvmlLibrary()
