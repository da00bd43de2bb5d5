"""Which catalogue entries can be kept, told to everybody and served: the bounds of their words, files and sources.

Decides what is refused before it is stored, wherever it comes from: a text, a repository of the hub. What a node would not touch is refused
here already, where somebody is there to mend it; the node checks again, for it does not trust the coordinator. It must not know how
entries are written down.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from potluck_coordinator.domain.catalogue import ATTACH_PREFIX, engine_refusal
from potluck_coordinator.domain.repository import FILE_NAME_PATTERN, holds_no_code

if TYPE_CHECKING:
    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_protocol.values import ModelFile

MODELS_MAX: Final = 1_000
"""Of a catalogue: all of them are told in one message, and read from the books at once."""
WORD_CHARACTERS_MAX: Final = 1_000
"""Of every word of an entry: a licence's name, a source, what is unchecked."""
FILES_MAX: Final = 1_000
FILE_NAME_CHARACTERS_MAX: Final = 200
FILE_BYTES_MAX: Final = 1 << 50
"""So that a message can tell the size of every file, and of all of them together."""
ENGINE_KINDS_MAX: Final = 8
ENGINE_KIND: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_NAME: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_HUB: Final = re.compile(rf"hf:{_NAME}/{_NAME}@[0-9a-f]{{40}}")
_WHEEL: Final = re.compile(rf"wheel:{_NAME}==[A-Za-z0-9][A-Za-z0-9.!+_-]*")
ATTACHED_NAME_CHARACTERS_MAX: Final = 200
"""As in the node's `model_source`."""
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


def entry_refusal(entry: CatalogueEntry) -> str:
    """Why the entry is not kept, in words that go on from its name; empty where nothing is wrong."""
    for name, word in _words(asdict(entry)):
        if not _is_text(word):
            return f"{name} holds control characters, invisible ones or what is no text"
        if len(word) > WORD_CHARACTERS_MAX:
            return f"{name} has {len(word)} characters, and {WORD_CHARACTERS_MAX} are the most"
    kinds = entry.engine_kinds
    if len(kinds) > ENGINE_KINDS_MAX or len(set(kinds)) != len(kinds) or not all(ENGINE_KIND.fullmatch(kind) for kind in kinds):
        return f"its engine kinds must be up to {ENGINE_KINDS_MAX} different words such as vllm, sglang or llamacpp"
    if len(set(entry.endpoints)) != len(entry.endpoints):
        return "it names an endpoint twice"
    return "" if entry.file is None else _file_refusal(entry.file) or engine_refusal(entry)


def source_refusal(source: str) -> str:
    """Why no node would take files from there; empty where nothing is wrong."""
    if source.startswith(ATTACH_PREFIX):
        return _attached_refusal(source.removeprefix(ATTACH_PREFIX))
    folder = source.startswith("path:/") and len(source) > len("path:/") and ".." not in source.split("/") and source.isprintable()
    good = folder or _HUB.fullmatch(source) is not None or _WHEEL.fullmatch(source) is not None
    return "" if good else f"its source must be hf:ORG/NAME@COMMIT, wheel:NAME==VERSION, path:/FOLDER or {ATTACH_PREFIX}NAME"


def _attached_refusal(name: str) -> str:
    """Any name that a server may list: a path, a tag, words. It is compared and sent as it is, never opened."""
    if 0 < len(name) <= ATTACHED_NAME_CHARACTERS_MAX and name.isprintable():
        return ""
    return (
        f"its source must be {ATTACH_PREFIX}NAME, with the name that the server lists, of 1 to {ATTACHED_NAME_CHARACTERS_MAX} characters "
        "that can be printed"
    )


def _file_refusal(file: ModelFile) -> str:
    if refusal := source_refusal(file.source):
        return refusal
    if file.source.startswith(ATTACH_PREFIX):
        named = (file.file_name, file.sha256, file.size_bytes, file.source_sha256, file.further_files) != ("", "", 0, "", ())
        return f"a source {ATTACH_PREFIX}NAME has no files, for its owner's engine has them" if named else ""
    if file.source_sha256 and not _SHA256.fullmatch(file.source_sha256):
        return "its source_sha256 is not 64 hexadecimal digits"
    names = [pinned.file_name for pinned in file.files]
    if len(names) > FILES_MAX:
        return f"it has {len(names)} files, and {FILES_MAX} are the most"
    if unfit := next((name for name in names if not re.match(FILE_NAME_PATTERN, name) or not holds_no_code(name)), None):
        return f"no node takes a file of the name {unfit!r}"
    if longest := next((name for name in names if len(name) > FILE_NAME_CHARACTERS_MAX), ""):
        return f"a file name has {len(longest)} characters, and {FILE_NAME_CHARACTERS_MAX} are the most"
    if empty := next((pinned for pinned in file.files if pinned.size_bytes <= 0), None):
        return f"{empty.file_name} has {empty.size_bytes} bytes, and a file that a node fetches has one at least"
    if largest := next((pinned for pinned in file.files if pinned.size_bytes > FILE_BYTES_MAX), None):
        return f"{largest.file_name} has {largest.size_bytes} bytes, and {FILE_BYTES_MAX} are the most"
    return _twin_refusal(names)


def _twin_refusal(names: list[str]) -> str:
    """Two names that differ in case alone are one file on some disks, and a file is no folder of another."""
    seen: dict[str, str] = {}
    for name in names:
        folded = name.lower()
        if folded in seen:
            return f"{seen[folded]} and {name} are one file on some disks"
        seen[folded] = name
    for folded, name in seen.items():
        for parent in PurePosixPath(folded).parents:
            if str(parent) in seen:
                return f"{name} lies in {seen[str(parent)]}, which is a file itself"
    return ""


def _is_text(word: str) -> bool:
    """Whether it can be shown anywhere: letters of any language, and blanks of any width, such as one that does not break."""
    return all(letter.isprintable() or unicodedata.category(letter) == "Zs" for letter in word)


def _words(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every text within an entry's fields, with the name of the field it stands in."""
    for name, value in fields.items():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, str):
                yield f"its {name}", item
            elif isinstance(item, dict):
                yield from _words(item)
