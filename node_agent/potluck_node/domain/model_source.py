"""Where a model's files may come from and how they may be called, as read from the coordinator's words.

Decides which sources and file names this node will touch at all. The coordinator is not trusted with more: no URL, no option for a package
client and no ".." gets through. It may name any folder, but a file there is only taken by its pin. What is in a file is for `model_folder`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from potluck_protocol.values import ModelFile, PinnedFile

SUFFIXES_ALLOWED: Final = (".gguf", ".safetensors", ".json")
"""Formats that hold data and no code."""
NAMES_ALLOWED: Final = ("tokenizer.model", "merges.txt", "vocab.txt", "chat_template.jinja")
"""Files of a tokenizer. A chat template is data too: engines render it in a sandbox, as they do the one inside a GGUF or a JSON file."""
ATTACHED_KIND: Final = "attach"
"""The kind of engine for models without files; no other kind has such."""
ATTACH_PREFIX: Final = "attach:"
FILES_MAX: Final = 1000
NAME_CHARACTERS_MAX: Final = 200

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_NAME: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_HUB: Final = re.compile(rf"hf:(?P<repository>{_NAME}/{_NAME})@(?P<revision>[A-Za-z0-9][A-Za-z0-9._-]*)")
_WHEEL: Final = re.compile(rf"wheel:(?P<name>{_NAME})==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)")
_SEGMENT: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._+-]*")


@dataclass(frozen=True, slots=True)
class HubSource:
    """Files of a repository on the Hugging Face hub, or a mirror of it."""

    repository: str
    revision: str


@dataclass(frozen=True, slots=True)
class WheelSource:
    """Files inside a wheel of the package index."""

    name: str
    version: str


@dataclass(frozen=True, slots=True)
class FolderSource:
    """Files already on this machine; they stay where they are."""

    folder: str


@dataclass(frozen=True, slots=True)
class AttachedSource:
    """No files: the model of an engine that the owner runs already."""

    name: str
    """What that engine calls the model."""


ModelSource = HubSource | WheelSource | FolderSource | AttachedSource


def parse_source(source: str) -> ModelSource:
    """The source that a catalogue's text names; raises ValueError with a one-line reason."""
    if match := _HUB.fullmatch(source):
        return HubSource(match["repository"], match["revision"])
    if match := _WHEEL.fullmatch(source):
        return WheelSource(match["name"], match["version"])
    if source.startswith("path:/") and ".." not in source.split("/") and source.isprintable():
        return FolderSource(source.removeprefix("path:"))
    if is_attachable(name := attached_name(source)):
        return AttachedSource(name)
    raise ValueError(f"the source {source!r} is none of hf:ORG/NAME@REVISION, wheel:NAME==VERSION, path:/FOLDER, attach:NAME")


def is_attachable(name: str) -> bool:
    """Whether a catalogue can name this model of an attached engine: any printable name. It is compared and sent, never opened."""
    return 0 < len(name) <= NAME_CHARACTERS_MAX and name.isprintable()


def attached_name(source: str) -> str:
    """What the attached engine calls the model; empty for any other source."""
    return source.removeprefix(ATTACH_PREFIX) if source.startswith(ATTACH_PREFIX) else ""


def check_model_file(file: ModelFile) -> None:
    """Raises ValueError with a one-line reason for a model this node would not touch."""
    if isinstance(parse_source(file.source), AttachedSource):
        if (file.file_name, file.sha256, file.size_bytes, file.source_sha256, file.further_files) != ("", "", 0, "", ()):
            raise ValueError(f"the source {file.source!r} has no files, and the catalogue names some")
        return
    if len(file.files) > FILES_MAX:
        raise ValueError(f"the model has {len(file.files)} files, and {FILES_MAX} are the most")
    for pinned in file.files:
        _check_pinned(pinned)
    _check_distinct(file.files)
    if file.source_sha256 and not _SHA256.fullmatch(file.source_sha256):
        raise ValueError(f"the source {file.source!r} is not pinned by a sha256 of 64 hexadecimal digits")


def _check_pinned(pinned: PinnedFile) -> None:
    name = pinned.file_name
    if len(name) > NAME_CHARACTERS_MAX:
        raise ValueError(f"a file name of {len(name)} characters is longer than {NAME_CHARACTERS_MAX}")
    parts = PurePosixPath(name).parts
    if not parts or str(PurePosixPath(*parts)) != name or not all(_SEGMENT.fullmatch(part) for part in parts):
        raise ValueError(f"the file name {name!r} is not a plain relative path")
    if not name.endswith(SUFFIXES_ALLOWED) and parts[-1] not in NAMES_ALLOWED:
        allowed = ", ".join((*SUFFIXES_ALLOWED, *NAMES_ALLOWED))
        raise ValueError(f"the file {name!r} is none of {allowed}, the formats that hold no code")
    if not _SHA256.fullmatch(pinned.sha256):
        raise ValueError(f"the file {name!r} is not pinned by a sha256 of 64 hexadecimal digits")
    if pinned.size_bytes <= 0:
        raise ValueError(f"the file {name!r} has no size")


def _check_distinct(files: tuple[PinnedFile, ...]) -> None:
    """Two names that differ in case alone are one file on some disks."""
    seen: dict[str, str] = {}
    for pinned in files:
        folded = pinned.file_name.lower()
        if folded in seen:
            raise ValueError(f"the file names {seen[folded]!r} and {pinned.file_name!r} are one file on some disks")
        seen[folded] = pinned.file_name
    for folded, name in seen.items():
        for parent in PurePosixPath(folded).parents:
            if str(parent) in seen:
                raise ValueError(f"the file {name!r} lies in {seen[str(parent)]!r}, which is a file itself")
