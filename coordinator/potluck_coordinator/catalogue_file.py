"""Reads catalogue files: the built-in one, and the operator's.

Decides what a well-formed entry is, and says where one is not. An entry has its files pinned, names an engine that owners run themselves,
or is an offer that `potluck models add` has yet to pin: then it says so, and what nobody has checked. It must not know who serves the
models.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from potluck_coordinator.architectures import known_architecture
from potluck_coordinator.domain.catalogue import ATTACH_KIND, ATTACH_PREFIX, CatalogueEntry
from potluck_coordinator.domain.entry_rules import FILE_BYTES_MAX, entry_refusal, source_refusal
from potluck_coordinator.domain.fit.architecture import ModelArchitecture, Quantization
from potluck_coordinator.domain.repository import FILE_NAME_PATTERN, SHA256_PATTERN, holds_no_code
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import Endpoint, ModelFile, ModelId, PinnedFile

MODEL_ID_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,95}\Z"
PRICE_MICRO_CREDITS_MAX: Final = 1_000_000_000
"""A token: a thousand credits."""
SLOTS_MAX: Final = 1024
CONTEXT_TOKENS_MAX: Final = 16 * 1024 * 1024
UNIX_SECONDS_MAX: Final = 253_402_300_799
"""The end of the year 9999, beyond which no calendar that shows it goes."""
_Price = Annotated[int, msgspec.Meta(ge=0, le=PRICE_MICRO_CREDITS_MAX)]
_Sha256 = Annotated[str, msgspec.Meta(pattern=SHA256_PATTERN)]
_FileName = Annotated[str, msgspec.Meta(pattern=FILE_NAME_PATTERN)]
_Size = Annotated[int, msgspec.Meta(gt=0, le=FILE_BYTES_MAX)]
_REPOSITORY: Final = re.compile(r"hf:[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*\Z")


KEY_PARTS_MAX: Final = 16
"""Of a dotted key: Python's parser takes time by the square of them, minutes for one key as long as a file may be."""
_TOKEN: Final = re.compile(
    r'(?P<text>"""(?:[^\\]|\\.)*?"""|\'\'\'.*?\'\'\'|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\')|(?P<word>[\w-]+)'
    r"|(?P<dot>\.)|(?P<blank>[ \t]+)|(?P<rest>#[^\n]*|.)",
    re.DOTALL,
)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    name: _FileName
    sha256: _Sha256
    size_bytes: _Size


class _Model(msgspec.Struct, forbid_unknown_fields=True):
    model_id: Annotated[str, msgspec.Meta(pattern=MODEL_ID_PATTERN)]
    source: str
    context_length_tokens: Annotated[int, msgspec.Meta(gt=0, le=CONTEXT_TOKENS_MAX)]
    slot_count: Annotated[int, msgspec.Meta(ge=1, le=SLOTS_MAX)]
    prompt_price_micro_credits: _Price
    completion_price_micro_credits: _Price
    licence: str
    endpoints: Annotated[list[Endpoint], msgspec.Meta(min_length=1)]
    created_at_unix_seconds: Annotated[int, msgspec.Meta(ge=0, le=UNIX_SECONDS_MAX)]
    engine_kind: str = ""
    engine_kinds: list[str] = []
    file_name: _FileName | None = None
    sha256: _Sha256 | None = None
    size_bytes: _Size | None = None
    source_sha256: str = ""
    files: list[_File] = []
    pinned: bool = True
    architecture: str | dict[str, Any] | None = None
    quantization: str = ""
    unchecked: str = ""

    def entry(self) -> CatalogueEntry:
        """The value behind the file's words; raises ValueError where they do not go together."""
        engine_kinds = tuple(self.engine_kinds) or ((self.engine_kind,) if self.engine_kind else ())
        if not engine_kinds or (self.engine_kind and self.engine_kinds):
            raise ValueError("it needs engine_kinds, the preferred one first, or one engine_kind")
        if (ATTACH_KIND in engine_kinds) != self.source.startswith(ATTACH_PREFIX) or (
            ATTACH_KIND in engine_kinds and len(engine_kinds) > 1
        ):
            raise ValueError(f'the engine kind "{ATTACH_KIND}" and a source "{ATTACH_PREFIX}NAME" go together, and with no other')
        if not self.pinned and not self.unchecked:
            raise ValueError("an entry that is not pinned must say in `unchecked` which of its facts nobody has checked")
        architecture = _architecture(self.architecture)
        if architecture is not None and self.context_length_tokens > architecture.context_length_max_tokens:
            raise ValueError(f"its context is longer than the model's, {architecture.context_length_max_tokens} tokens")
        made = CatalogueEntry(
            model_id=ModelId(self.model_id),
            file=self._file(),
            engine_kinds=engine_kinds,
            context_length_tokens=self.context_length_tokens,
            slot_count=self.slot_count,
            prompt_price_micro_credits=self.prompt_price_micro_credits,
            completion_price_micro_credits=self.completion_price_micro_credits,
            licence=self.licence,
            endpoints=tuple(self.endpoints),
            created_at_unix_seconds=self.created_at_unix_seconds,
            architecture=architecture,
            quantization=self.quantization,
            repository="" if self.pinned else self.source,
            unchecked=self.unchecked,
        )
        if refusal := entry_refusal(made):
            raise ValueError(refusal)
        return made

    def _file(self) -> ModelFile | None:
        model_id = ModelId(self.model_id)
        pins = self._pins()
        if not self.pinned:
            if pins or not _REPOSITORY.match(self.source):
                raise ValueError("an entry that is not pinned has no files, and its source is hf:ORG/NAME without a revision")
            return None
        if self.source.startswith(ATTACH_PREFIX):
            if pins:
                raise ValueError(f"a source {ATTACH_PREFIX}NAME has no files, for its owner's engine has them")
            return ModelFile(model_id, self.source, file_name="", sha256="", size_bytes=0)
        if refusal := source_refusal(self.source):
            raise ValueError(refusal)
        if not pins:
            raise ValueError("it has no files: give file_name, sha256 and size_bytes, or `files`")
        if len({pin.file_name for pin in pins}) != len(pins):
            raise ValueError("it names a file twice")
        if unfit := [pin.file_name for pin in pins if not holds_no_code(pin.file_name)]:
            raise ValueError(f"{', '.join(unfit)}: only safetensors, GGUF, JSON and tokenizer files are served, which hold no code")
        first = pins[0]
        return ModelFile(model_id, self.source, first.file_name, first.sha256, first.size_bytes, self.source_sha256, further_files=pins[1:])

    def _pins(self) -> tuple[PinnedFile, ...]:
        single = (self.file_name, self.sha256, self.size_bytes)
        if any(word is not None for word in single):
            if self.files or self.file_name is None or self.sha256 is None or self.size_bytes is None:
                raise ValueError("one file is pinned by file_name, sha256 and size_bytes, several by `files`")
            return (PinnedFile(self.file_name, self.sha256, self.size_bytes),)
        return tuple(PinnedFile(file.name, file.sha256, file.size_bytes) for file in self.files)


def _architecture(words: str | dict[str, Any] | None) -> ModelArchitecture | None:
    """By its name or written out; raises ValueError, also for a field that there is none of."""
    if words is None:
        return None
    if isinstance(words, str):
        return known_architecture(words)
    quantization = words.get("quantization", {})
    for said, form in ((words, ModelArchitecture), (quantization if isinstance(quantization, dict) else {}, Quantization)):
        if unknown := sorted(set(said) - {field.name for field in fields(form)}):
            raise ValueError(f"an architecture has no {unknown[0]}")
    return msgspec.convert(words, ModelArchitecture)


class _Catalogue(msgspec.Struct, forbid_unknown_fields=True):
    model: list[_Model] = []


def built_in_catalogue() -> tuple[CatalogueEntry, ...]:
    """The models that ship with Potluck."""
    return parse_catalogue(files("potluck_coordinator").joinpath("catalogue.toml").read_text(), "the built-in catalogue")


def read_catalogue(path: Path) -> tuple[CatalogueEntry, ...]:
    """An operator's catalogue file; raises PotluckError(INVALID_REQUEST) naming the file and what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"The catalogue {path} is not text in UTF-8.") from error
    except OSError as error:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"Cannot read the catalogue {path}: {error.strerror}.") from error
    return parse_catalogue(text, str(path))


def parse_catalogue(text: str, name: str) -> tuple[CatalogueEntry, ...]:
    """The entries of a TOML text with `[[model]]` tables; raises PotluckError(INVALID_REQUEST)."""
    if _key_parts_most(text) > KEY_PARTS_MAX:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"{name} is not a good catalogue: a key has more than {KEY_PARTS_MAX} parts.")
    try:
        words = tomllib.loads(text)
        _require_all(words)
        models = msgspec.convert(words, _Catalogue).model
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        # Beside its own TOMLDecodeError the parser lets through what numbers of many digits and deep nesting raise.
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"{name} is not a good catalogue: {error}.") from error
    if not models:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"{name} is not a good catalogue: it has no [[model]].")
    entries = []
    for model in models:
        try:
            entries.append(model.entry())
        except ValueError as error:
            raise PotluckError(ErrorCode.INVALID_REQUEST, f"{name}: {model.model_id} is not a good entry: {error}.") from error
    if len({entry.model_id for entry in entries}) != len(entries):
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"{name} names a model twice.")
    return tuple(entries)


def _require_all(words: dict[str, Any]) -> None:
    """Raises ValueError with everything that an entry lacks, where msgspec would name one field after the other."""
    tables = words.get("model")
    known = msgspec.structs.fields(_Model)
    for number, table in enumerate(tables if isinstance(tables, list) else []):
        if not isinstance(table, dict):
            continue
        named = str(table.get("model_id", f"number {number + 1}"))[:96]
        # A field that is missing may be there under a wrong name.
        unknown = sorted(set(table) - {field.encode_name for field in known})
        strange = f", and there is no field {unknown[0][:96]}" if unknown else ""
        if missing := [field.encode_name for field in known if field.required and field.encode_name not in table]:
            raise ValueError(f"the entry {named} lacks {', '.join(missing)}{strange}")


def _key_parts_most(text: str) -> int:
    """The dots in a row between words or quoted words, and one; more than a key has where a number or a version stands elsewhere."""
    most = parts = 1
    for token in _TOKEN.finditer(text):
        if token.lastgroup == "dot":
            parts += 1
        elif token.lastgroup == "rest":
            most, parts = max(most, parts), 1
    return max(most, parts)
