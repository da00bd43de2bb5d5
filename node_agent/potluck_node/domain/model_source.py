"""Where a model file may come from, as read from the coordinator's words.

Decides which sources and file names this node will touch at all. The coordinator is not trusted with more: no URL, no option for a package
client and no ".." gets through. It may name any folder, but a file there is only taken by its pin.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from potluck_protocol.values import ModelFile

SUFFIXES_ALLOWED: Final = (".gguf", ".safetensors", ".json")
"""Formats that hold data and no code."""

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_NAME: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_HUB: Final = re.compile(rf"hf:(?P<repository>{_NAME}/{_NAME})@(?P<revision>[A-Za-z0-9][A-Za-z0-9._-]*)")
_WHEEL: Final = re.compile(rf"wheel:(?P<name>{_NAME})==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)")
_SEGMENT: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._+-]*")


@dataclass(frozen=True, slots=True)
class HubSource:
    """A file of a repository on the Hugging Face hub, or a mirror of it."""

    repository: str
    revision: str


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A file inside a wheel of the package index."""

    name: str
    version: str


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A file already on this machine; it stays where it is."""

    folder: str


ModelSource = HubSource | WheelSource | FolderSource


def parse_source(source: str) -> ModelSource:
    """The source that a catalogue's text names; raises ValueError with a one-line reason."""
    if match := _HUB.fullmatch(source):
        return HubSource(match["repository"], match["revision"])
    if match := _WHEEL.fullmatch(source):
        return WheelSource(match["name"], match["version"])
    if source.startswith("path:/") and ".." not in source.split("/"):
        return FolderSource(source.removeprefix("path:"))
    raise ValueError(f"the source {source!r} is none of hf:ORG/NAME@REVISION, wheel:NAME==VERSION, path:/FOLDER")


def check_model_file(file: ModelFile) -> None:
    """Raises ValueError with a one-line reason for a file this node would not touch."""
    parse_source(file.source)
    parts = PurePosixPath(file.file_name).parts
    if not parts or not all(_SEGMENT.fullmatch(part) for part in parts):
        raise ValueError(f"the file name {file.file_name!r} is not a plain relative path")
    if not file.file_name.endswith(SUFFIXES_ALLOWED):
        raise ValueError(f"the file {file.file_name!r} is none of {', '.join(SUFFIXES_ALLOWED)}, the formats that hold no code")
    if not _SHA256.fullmatch(file.sha256) or (file.source_sha256 and not _SHA256.fullmatch(file.source_sha256)):
        raise ValueError(f"the file {file.file_name!r} is not pinned by a sha256 of 64 hexadecimal digits")
    if file.size_bytes <= 0:
        raise ValueError(f"the file {file.file_name!r} has no size")
