"""The power caps of this machine's cards: what the owner had set, who may change it, and changing it.

Decides by which way a cap is set: by the agent itself where it may, else by the small program that its owner installed for that
(`power_cap_program`), and that whoever was refused is not asked again at once. What a card had before the agent changed anything is written
down first, so that an agent which was killed gives it back at its next start. It must not know why a card gets another cap: `heat` does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import structlog
from pydantic import TypeAdapter

from potluck_node.probe import card_table
from potluck_node.probe.nvidia import card_count, card_handle
from potluck_node.probe.nvml import CardLostError, DriverUnavailableError, NvmlLibrary, process_library
from potluck_protocol.clock import Clock
from potluck_protocol.private_files import read_json, write_private

FILE_NAME: Final = "power_caps.json"
PROGRAM: Final = Path("/usr/local/sbin/potluck-power-cap")
"""Where the owner puts it: a folder that root alone writes."""
PROGRAM_SECONDS_MAX: Final = 10.0
REFUSED_SECONDS: Final = 300.0
"""How long after a refusal the next try is made: its owner may have given the right meanwhile."""
SAME_MILLIWATTS: Final = 1_000
"""Drivers round."""
SETTLED_SECONDS: Final = 30.0
"""After a change, what is read of a card may still be of before it, and is not taken for its owner's wish."""
SAFE_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"

_log = structlog.get_logger()


class CapRefusedError(Exception):
    """The cap was not set; its text says why."""


@dataclass(frozen=True, slots=True)
class ChangedCap:
    """Of a card that has another cap than its owner gave it."""

    found_milliwatts: int
    """Before."""
    set_milliwatts: int
    """By this agent, or the one before it."""


_FORM: Final = TypeAdapter(dict[str, ChangedCap])


class PowerCaps:
    """The caps of one node. Its methods may be called from any thread; `set` and `restore` block for as long as PROGRAM_SECONDS_MAX.

    Args:
        path: what is kept; its folder exists.
        clock: time.
        library: the driver's library; the process's own if not given.
        program: the owner's, if it is there.
    """

    def __init__(self, path: Path, clock: Clock, library: NvmlLibrary | None = None, program: Path = PROGRAM) -> None:
        self._path = path
        self._clock = clock
        self._library = library or process_library()
        self._program = program
        self._lock = threading.Lock()
        self._found: dict[str, int] = {}
        self._changed = _read(path)
        self._inherited = set(self._changed)
        """Changed by an agent before this one, as far as is known."""
        self._set_at_seconds: dict[str, float] = {}
        self._refused_at_seconds: dict[str, float] = {}
        self.refusal = ""
        """Why the last cap was not set; empty where it was."""

    @property
    def changed(self) -> frozenset[str]:
        """The cards that have another cap than they had."""
        return frozenset(self._changed)

    def found_milliwatts(self, uuid: str, now_milliwatts: int | None) -> int | None:
        """What its owner set, or left; asked at every look.

        Args:
            uuid: the card.
            now_milliwatts: the cap that is in force.
        """
        with self._lock:
            changed = self._changed.get(uuid)
            if changed is not None and uuid in self._inherited and now_milliwatts is not None:
                self._inherited.discard(uuid)
                if not _same(now_milliwatts, changed.set_milliwatts):
                    # The machine was started anew, or its owner was here.
                    changed = None
                    self._keep({card: kept for card, kept in self._changed.items() if card != uuid})
            if changed is not None:
                return changed.found_milliwatts
            settled = self._clock.monotonic_seconds() - self._set_at_seconds.get(uuid, -SETTLED_SECONDS) >= SETTLED_SECONDS
            if now_milliwatts is not None and settled:
                self._found[uuid] = now_milliwatts
            return self._found.get(uuid)

    def may_set(self, uuid: str) -> bool:
        """Whether a try is worth it: some way is there, and it was not refused lately."""
        refused_at_seconds = self._refused_at_seconds.get(uuid)
        if refused_at_seconds is not None and self._clock.monotonic_seconds() - refused_at_seconds < REFUSED_SECONDS:
            return False
        return self.has_way

    @property
    def has_way(self) -> bool:
        """Whether there is any to try: being root, or the owner's program."""
        return os.geteuid() == 0 or program_is_usable(self._program)

    def is_due(self, uuid: str, milliwatts: int, now_milliwatts: int) -> bool:
        """Whether a cap is to be set. What somebody else lowered is not raised."""
        if _same(milliwatts, now_milliwatts):
            return False
        return milliwatts < now_milliwatts or self._is_ours(uuid, now_milliwatts)

    def set(self, uuid: str, milliwatts: int) -> bool:
        """Sets a cap, of a card whose `found_milliwatts` was asked for before; whether it stands."""
        with self._lock:
            changed = self._changed.get(uuid)
            found_milliwatts = changed.found_milliwatts if changed is not None else self._found.get(uuid)
            if found_milliwatts is None:
                return False
            # Before the card is changed, so that the successor of an agent which is killed now knows.
            self._keep({**self._changed, uuid: ChangedCap(found_milliwatts, milliwatts)})
            done = self._try(uuid, milliwatts)
            if not done:
                self._keep({**self._changed, uuid: changed} if changed is not None else self._without(uuid))
            elif _same(milliwatts, found_milliwatts):
                self._keep(self._without(uuid))
            return done

    def restore(self, uuid: str, now_milliwatts: int | None) -> None:
        """Gives a card the cap that it had, unless somebody else has changed it meanwhile."""
        changed = self._changed.get(uuid)
        if changed is None:
            return
        if now_milliwatts is not None and not self._is_ours(uuid, now_milliwatts):
            with self._lock:
                self._keep(self._without(uuid))
            return
        self.set(uuid, changed.found_milliwatts)

    def _is_ours(self, uuid: str, now_milliwatts: int) -> bool:
        changed = self._changed.get(uuid)
        return changed is not None and _same(now_milliwatts, changed.set_milliwatts)

    def _without(self, uuid: str) -> dict[str, ChangedCap]:
        return {card: changed for card, changed in self._changed.items() if card != uuid}

    def _try(self, uuid: str, milliwatts: int) -> bool:
        self._set_at_seconds[uuid] = self._clock.monotonic_seconds()
        try:
            way = self._set_by_some_way(uuid, milliwatts)
        except CapRefusedError as refusal:
            self._refused_at_seconds[uuid] = self._clock.monotonic_seconds()
            if self.refusal != str(refusal):
                _log.warning("power_cap_refused", card=uuid, milliwatts=milliwatts, reason=str(refusal))
            self.refusal = str(refusal)
            return False
        self._refused_at_seconds.pop(uuid, None)
        self.refusal = ""
        _log.info("power_cap_set", card=uuid, milliwatts=milliwatts, by=way)
        return True

    def _set_by_some_way(self, uuid: str, milliwatts: int) -> str:
        try:
            self._set_directly(uuid, milliwatts)
        except CapRefusedError:
            if not program_is_usable(self._program):
                raise
            run_program(self._program, uuid, milliwatts)
            return "program"
        return "agent"

    def _set_directly(self, uuid: str, milliwatts: int) -> None:
        try:
            binding = self._library.binding()
            for index in range(card_count(self._library)):
                handle = card_handle(self._library, index)
                if handle is not None and self._library.read(card_table.IDENTITY["uuid"], handle) == uuid:
                    binding.nvmlDeviceSetPowerManagementLimit(handle, milliwatts)
                    return
        except CardLostError:
            raise CapRefusedError("the driver no longer reaches the card") from None
        except DriverUnavailableError as failure:
            raise CapRefusedError(failure.text) from None
        except Exception as error:  # noqa: BLE001 - an old binding, a new driver: whatever goes wrong, the cap is not set
            raise CapRefusedError(f"the driver says: {error}") from None
        raise CapRefusedError("the driver shows no such card")

    def _keep(self, changed: Mapping[str, ChangedCap]) -> None:
        """On a full disk it holds for this run of the agent only."""
        if changed == self._changed:
            return
        self._changed = dict(changed)
        try:
            write_private(self._path, json.dumps({uuid: asdict(kept) for uuid, kept in changed.items()}, indent=1).encode())
        except OSError as error:
            _log.warning("power_caps_not_written", reason=error.strerror or type(error).__name__)


def _same(one_milliwatts: int, other_milliwatts: int) -> bool:
    return abs(one_milliwatts - other_milliwatts) < SAME_MILLIWATTS


def program_is_usable(program: Path = PROGRAM) -> bool:
    """Whether the owner's program is there, and a way to start it as root."""
    return program.is_file() and shutil.which("sudo", path=os.environ.get("PATH", SAFE_PATH)) is not None


def run_program(program: Path, uuid: str, milliwatts: int) -> None:
    """Starts it by `sudo -n`, which asks nobody anything; raises CapRefusedError."""
    command = ("sudo", "-n", "--", str(program), uuid, str(milliwatts))
    environment = {"PATH": os.environ.get("PATH", SAFE_PATH), "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROGRAM_SECONDS_MAX,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CapRefusedError(f"{program.name} could not be run: {type(error).__name__}") from None
    if done.returncode != 0:
        raise CapRefusedError(f"{program.name} was refused: {' '.join(done.stderr.split())[:200] or f'exit code {done.returncode}'}")


def _read(path: Path) -> dict[str, ChangedCap]:
    """A file that is not ours, or damaged, counts as none."""
    try:
        return _FORM.validate_python(read_json(path))
    except (OSError, ValueError):
        return {}
