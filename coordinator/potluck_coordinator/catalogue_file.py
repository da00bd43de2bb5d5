"""Reads catalogue files: the built-in one, and the operator's beside it.

Decides what a well-formed entry is, and says where one is not. It must not know who serves the models.
"""

from __future__ import annotations

import re
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Final

import msgspec

from potluck_coordinator.domain.catalogue import CatalogueEntry
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import Endpoint, ModelFile, ModelId

_Price = Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)]
_Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
_SOURCE: Final = re.compile(r"hf:[^@]+@[0-9a-f]{40}\Z|wheel:[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+\Z|path:/.+\Z", re.DOTALL)


class _Model(msgspec.Struct, forbid_unknown_fields=True):
    model_id: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,95}\Z")]
    source: str
    file_name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
    sha256: _Sha256
    size_bytes: Annotated[int, msgspec.Meta(gt=0)]
    engine_kind: str
    context_length_tokens: Annotated[int, msgspec.Meta(gt=0)]
    slot_count: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    prompt_price_micro_credits: _Price
    completion_price_micro_credits: _Price
    licence: str
    endpoints: Annotated[list[Endpoint], msgspec.Meta(min_length=1)]
    created_at_unix_seconds: int
    source_sha256: str = ""

    def entry(self) -> CatalogueEntry:
        """The value behind the file's words."""
        model_id = ModelId(self.model_id)
        return CatalogueEntry(
            model_id=model_id,
            file=ModelFile(model_id, self.source, self.file_name, self.sha256, self.size_bytes, self.source_sha256),
            engine_kind=self.engine_kind,
            context_length_tokens=self.context_length_tokens,
            slot_count=self.slot_count,
            prompt_price_micro_credits=self.prompt_price_micro_credits,
            completion_price_micro_credits=self.completion_price_micro_credits,
            licence=self.licence,
            endpoints=tuple(self.endpoints),
            created_at_unix_seconds=self.created_at_unix_seconds,
        )


class _File(msgspec.Struct, forbid_unknown_fields=True):
    model: list[_Model]


def built_in_catalogue() -> tuple[CatalogueEntry, ...]:
    """The models that ship with Potluck."""
    return parse_catalogue(files("potluck_coordinator").joinpath("catalogue.toml").read_text(), "the built-in catalogue")


def read_catalogue(path: Path) -> tuple[CatalogueEntry, ...]:
    """An operator's catalogue file; raises PotluckError(INVALID_REQUEST) naming the file and what is wrong with it."""
    try:
        text = path.read_text()
    except OSError as error:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"Cannot read the catalogue {path}: {error.strerror}.") from error
    return parse_catalogue(text, str(path))


def parse_catalogue(text: str, name: str) -> tuple[CatalogueEntry, ...]:
    """The entries of a TOML text with `[[model]]` tables; raises PotluckError(INVALID_REQUEST)."""
    try:
        entries = tuple(model.entry() for model in msgspec.convert(tomllib.loads(text), _File).model)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"{name} is not a good catalogue: {error}.") from error
    for entry in entries:
        if not _SOURCE.match(entry.file.source):
            message = f"{name}: the source of {entry.model_id} must be hf:ORG/NAME@COMMIT, wheel:NAME==VERSION or path:/FOLDER."
            raise PotluckError(ErrorCode.INVALID_REQUEST, message)
    if len({entry.model_id for entry in entries}) != len(entries):
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"{name} names a model twice.")
    return entries
