"""The power caps of this machine's cards: what the owner had set, who may change it, and changing it.

Decides by which way a cap is set: by the agent itself where it may, else by the small program that its owner installed for that
(`power_cap_program`), and that whoever was refused is not asked again at once. What a card had before the agent changed anything is written
down first, so that an agent which was killed gives it back at its next start. Which cap is in force the driver is asked each time: no
reading of before our last change counts, nor what a call says of itself. It must not know why a card gets another cap: `heat` does.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import structlog
from pydantic import TypeAdapter

from potluck_node.domain.changed_cap import ChangedCap, is_ours, same, seen, with_try
from potluck_node.probe import card_table
from potluck_node.probe.nvidia import card_count, card_handle
from potluck_node.probe.nvml import CardLostError, DriverUnavailableError, NvmlLibrary, process_library
from potluck_node.root_programs import SAFE_PATH, UnendedError, run_as_root
from potluck_protocol.clock import Clock
from potluck_protocol.private_files import read_json, write_private

FILE_NAME: Final = "power_caps.json"
PROGRAM: Final = Path("/usr/local/sbin/potluck-power-cap")
"""Where the owner puts it: a folder that root alone writes."""
PROGRAM_SECONDS_MAX: Final = 10.0
"""How long one cap is waited for; and, at the agent's end, how long all of them together."""
REFUSED_SECONDS: Final = 300.0
"""How long after a refusal the next try is made: its owner may have given the right meanwhile."""

_log = structlog.get_logger()
_FORM: Final = TypeAdapter(dict[str, ChangedCap])


class CapRefusedError(Exception):
    """The cap was not set, as far as whoever was asked says; its text says why."""


class PowerCaps:
    """The caps of one node. Its methods may be called from any thread; those that reach the driver block.

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
        self._unended: dict[str, subprocess.Popen[str]] = {}
        """Programs that took too long, by card: one at most for each, which may yet set what it was told."""
        self._refused_at_seconds: dict[str, float] = {}
        self.refusal = ""
        """Why the last cap was not set; empty where it was."""

    @property
    def changed(self) -> frozenset[str]:
        """The cards that have another cap than they had, or may have."""
        return frozenset(self._changed)

    def look(self, uuids: Collection[str]) -> dict[str, int]:
        """The caps in force, of cards whose driver says so. What somebody else has set since the last look is now the owner's. Blocks."""
        with self._lock:
            in_force: dict[str, int] = {}
            for uuid in uuids:
                now_milliwatts = self._in_force(uuid)
                if now_milliwatts is None:
                    continue
                in_force[uuid] = now_milliwatts
                self._settle(uuid, now_milliwatts)
                if uuid not in self._changed:
                    self._found[uuid] = now_milliwatts
            return in_force

    def found_milliwatts(self, uuid: str) -> int | None:
        """What its owner set, or left, by the looks so far."""
        changed = self._changed.get(uuid)
        return self._found.get(uuid) if changed is None else changed.found_milliwatts

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
        if same(milliwatts, now_milliwatts):
            return False
        return milliwatts < now_milliwatts or is_ours(self._changed.get(uuid), now_milliwatts)

    def may_stand(self, uuid: str, now_milliwatts: int | None) -> bool:
        """Whether a cap of ours may be in force; None where the driver does not say which is."""
        return uuid in self._changed if now_milliwatts is None else is_ours(self._changed.get(uuid), now_milliwatts)

    def set(self, uuid: str, milliwatts: int) -> None:
        """Sets the cap of a card that was looked at before. Blocks for PROGRAM_SECONDS_MAX at most."""
        with self._lock:
            self._set(uuid, milliwatts, PROGRAM_SECONDS_MAX)

    def restore(self, uuid: str) -> None:
        """Gives a card the cap that it had, unless somebody else has changed it meanwhile. Blocks for PROGRAM_SECONDS_MAX at most.

        Of a card whose driver does not say what is in force nothing is set and nothing forgotten.
        """
        with self._lock:
            self._restore(uuid, PROGRAM_SECONDS_MAX)

    def give_back(self) -> None:
        """At the agent's end: restores every card, also one that was refused lately. Blocks for PROGRAM_SECONDS_MAX at most.

        What is still changed then is in the file, for the next agent.
        """
        with self._lock:
            deadline_seconds = self._clock.monotonic_seconds() + PROGRAM_SECONDS_MAX
            for uuid in tuple(self._changed):
                self._wait_for_unended(uuid, deadline_seconds - self._clock.monotonic_seconds())
                self._restore(uuid, deadline_seconds - self._clock.monotonic_seconds())
            for uuid, changed in self._changed.items():
                _log.warning("power_cap_not_given_back", card=uuid, found_milliwatts=changed.found_milliwatts, kept_in=str(self._path))

    # With the lock held.

    def _restore(self, uuid: str, seconds_max: float) -> None:
        now_milliwatts = self._in_force(uuid)
        self._settle(uuid, now_milliwatts)
        changed = self._changed.get(uuid)
        if changed is not None and now_milliwatts is not None:
            self._set(uuid, changed.found_milliwatts, seconds_max)

    def _set(self, uuid: str, milliwatts: int, seconds_max: float) -> None:
        found_milliwatts = self.found_milliwatts(uuid)
        if found_milliwatts is None:
            return
        # Before the card is changed, so that the successor of an agent which is killed now knows.
        self._remember(uuid, with_try(self._changed.get(uuid), found_milliwatts, milliwatts))
        way, refusal = self._tried(uuid, milliwatts, seconds_max)
        now_milliwatts = self._in_force(uuid)
        stands = now_milliwatts is not None and same(now_milliwatts, milliwatts)
        self._note_outcome(uuid, milliwatts, way, "" if stands else refusal)
        if stands or refusal:
            self._settle(uuid, now_milliwatts)
        elif now_milliwatts is not None and not same(now_milliwatts, found_milliwatts):
            # Done, the driver says, and gives another number for it: that one is of our making, too.
            self._remember(uuid, with_try(self._changed.get(uuid), found_milliwatts, now_milliwatts))

    def _tried(self, uuid: str, milliwatts: int, seconds_max: float) -> tuple[str, str]:
        """By whom, and why not."""
        try:
            self._set_directly(uuid, milliwatts)
        except CapRefusedError as refusal:
            if not program_is_usable(self._program):
                return "agent", str(refusal)
        else:
            return "agent", ""
        if self._is_unended(uuid):
            return "program", f"{self._program.name} is still at work since the last time"
        try:
            run_program(self._program, uuid, milliwatts, seconds_max)
        except UnendedError as unended:
            self._unended[uuid] = unended.process
            return "program", f"{self._program.name} has not ended within {seconds_max:.0f} s"
        except CapRefusedError as refusal:
            return "program", str(refusal)
        return "program", ""

    def _note_outcome(self, uuid: str, milliwatts: int, way: str, refusal: str) -> None:
        if refusal:
            self._refused_at_seconds[uuid] = self._clock.monotonic_seconds()
            if self.refusal != refusal:
                _log.warning("power_cap_refused", card=uuid, milliwatts=milliwatts, reason=refusal)
        else:
            self._refused_at_seconds.pop(uuid, None)
            _log.info("power_cap_set", card=uuid, milliwatts=milliwatts, by=way)
        self.refusal = refusal

    def _is_unended(self, uuid: str) -> bool:
        process = self._unended.get(uuid)
        if process is not None and process.poll() is not None:
            del self._unended[uuid]
        return uuid in self._unended

    def _wait_for_unended(self, uuid: str, seconds_max: float) -> None:
        if self._is_unended(uuid):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._unended[uuid].wait(max(0.0, seconds_max))

    def _settle(self, uuid: str, now_milliwatts: int | None) -> None:
        self._remember(uuid, seen(self._changed.get(uuid), now_milliwatts, unended=self._is_unended(uuid)))

    def _remember(self, uuid: str, changed: ChangedCap | None) -> None:
        others = {card: kept for card, kept in self._changed.items() if card != uuid}
        self._keep(others if changed is None else {**others, uuid: changed})

    def _in_force(self, uuid: str) -> int | None:
        """What the driver says now."""
        try:
            handle = self._handle(uuid)
            in_force: int | None = None if handle is None else self._library.read(card_table.POWER_CAP, handle)
        except (CardLostError, DriverUnavailableError):
            return None
        return in_force

    def _handle(self, uuid: str) -> Any:
        """What the driver calls the card, or None; raises CardLostError, DriverUnavailableError."""
        for index in range(card_count(self._library)):
            handle = card_handle(self._library, index)
            if handle is not None and self._library.read(card_table.IDENTITY["uuid"], handle) == uuid:
                return handle
        return None

    def _set_directly(self, uuid: str, milliwatts: int) -> None:
        try:
            handle = self._handle(uuid)
            if handle is not None:
                self._library.binding().nvmlDeviceSetPowerManagementLimit(handle, milliwatts)
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


def program_is_usable(program: Path = PROGRAM) -> bool:
    """Whether the owner's program is there, and a way to start it as root."""
    return program.is_file() and shutil.which("sudo", path=os.environ.get("PATH", SAFE_PATH)) is not None


def run_program(program: Path, uuid: str, milliwatts: int, seconds_max: float = PROGRAM_SECONDS_MAX) -> None:
    """Has the owner's program set a cap; raises CapRefusedError, and UnendedError where nobody knows yet."""
    try:
        exit_code, words = run_as_root(("--", str(program), uuid, str(milliwatts)), max(0.0, seconds_max))
    except OSError as error:
        raise CapRefusedError(f"{program.name} could not be run: {type(error).__name__}") from None
    if exit_code != 0:
        raise CapRefusedError(f"{program.name} was refused: {' '.join(words.split())[:200] or f'exit code {exit_code}'}")


def _read(path: Path) -> dict[str, ChangedCap]:
    """A file that is not ours, or damaged, counts as none."""
    try:
        return _FORM.validate_python(read_json(path))
    except (OSError, ValueError):
        return {}
