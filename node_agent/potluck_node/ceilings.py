"""How far engines were stepped down for want of memory, kept in the node's state folder.

Decides which ceiling belongs to which wish: the one reached with the same model files, the same version of the same engine, and the same
cards; for an engine that takes what it finds, on the same machine. `domain.step_down` says what a ceiling is and when it sinks. It must not
know processes. Whoever wants to try anew removes the file while the agent is stopped.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import structlog

from potluck_node.domain.step_down import Ceiling
from potluck_protocol.private_files import read_json, write_private
from potluck_protocol.values import DesiredEngine, Inventory

ENTRIES_MAX: Final = 256
"""The oldest go first."""
FILE_NAME: Final = "ceilings.json"
_GIB: Final = 1 << 30

_log = structlog.get_logger()


def machine_words(inventory: Inventory) -> str:
    """What makes a machine another one for an engine that takes what it finds."""
    cards = [f"{card.uuid}={card.memory_bytes}" for card in inventory.accelerators]
    # Of the memory only whole GiB: another kernel keeps a few MiB more to itself.
    return " ".join([f"{inventory.memory_bytes // _GIB}GiB", *cards])


class Ceilings:
    """The ceilings of one node.

    Args:
        path: the file; its folder exists once something is to be written.
        machine: see `machine_words`.
    """

    def __init__(self, path: Path, machine: str) -> None:
        self._path = path
        self._machine = machine
        self._entries = _read(path)

    def of(self, wish: DesiredEngine, engine_version: str) -> Ceiling:
        """What was reached for such a wish; the highest where it never ran out of memory."""
        subject = self._subject(wish, engine_version)
        for entry in self._entries:
            if entry["subject"] == subject:
                return Ceiling(**entry["ceiling"])
        return Ceiling()

    def lower(self, wish: DesiredEngine, engine_version: str, ceiling: Ceiling) -> None:
        """Takes the ceiling that was reached. On a full disk it holds for this run of the agent only."""
        subject = self._subject(wish, engine_version)
        others = [entry for entry in self._entries if not _same_place(entry["subject"], subject)]
        self._entries = [*others, {"subject": subject, "ceiling": asdict(ceiling)}][-ENTRIES_MAX:]
        try:
            write_private(self._path, json.dumps(self._entries, indent=1).encode())
        except OSError as error:
            _log.warning("ceilings_not_written", reason=error.strerror or type(error).__name__)

    def _subject(self, wish: DesiredEngine, engine_version: str) -> dict[str, Any]:
        return {
            "model_id": wish.model.model_id,
            "cards": sorted(wish.shape.card_uuids),
            "machine": "" if wish.shape.card_uuids else self._machine,
            "files": [file.sha256 for file in wish.model.files],
            "engine": f"{wish.engine_kind} {engine_version}",
        }


def _same_place(subject: dict[str, Any], other: dict[str, Any]) -> bool:
    """The same model at the same place: what was reached there before something changed is forgotten."""
    return (subject["model_id"], subject["cards"]) == (other["model_id"], other["cards"])


def _read(path: Path) -> list[dict[str, Any]]:
    """A file that is not ours, or damaged, counts as none."""
    try:
        entries = read_json(path)
        for entry in entries:
            Ceiling(**entry["ceiling"])
            _same_place(entry["subject"], entry["subject"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return entries if isinstance(entries, list) else []
