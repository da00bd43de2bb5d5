"""From a model's repository to a catalogue entry: which of its files are served, and what is refused.

Decides that only formats which hold no code are taken, that a model whose configuration asks for Python of its own is refused, and what an
entry says where its operator did not. It must not know how a repository is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from potluck_coordinator.domain.catalogue import CatalogueEntry
from potluck_coordinator.domain.fit.config_json import architecture_of_config
from potluck_coordinator.domain.fit.gguf_header import GgufHeader
from potluck_coordinator.domain.fit.gguf_metadata import architecture_of_gguf
from potluck_protocol.values import Endpoint, ModelFile, ModelId, PinnedFile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from potluck_coordinator.domain.fit.architecture import ModelArchitecture

FILE_NAME_PATTERN: Final = r"^[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)*\Z"
"""Of a file that is served: a path inside its folder that means nothing to a shell."""
SHA256_PATTERN: Final = r"^[0-9a-f]{64}\Z"
WEIGHT_INDEX: Final = "model.safetensors.index.json"
CONFIG: Final = "config.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
TOKENIZER_FILES: Final = ("tokenizer.model", "merges.txt", "vocab.txt", "chat_template.jinja")
CONTEXT_TOKENS_DEFAULT: Final = 8192
"""Where neither the operator nor an offer says; a model made for less gets its own."""
CONTEXT_TOKENS_UNKNOWN: Final = 4096
SLOTS_DEFAULT: Final = 8
PROMPT_PRICE_DEFAULT: Final = 1
COMPLETION_PRICE_DEFAULT: Final = 4
_OTHER_FORMATS: Final = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")
_PART: Final = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
_MODEL_ID_UNFIT: Final = re.compile(r"[^a-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class RepositoryFile:
    """One file of a repository."""

    name: str
    size_bytes: int
    sha256: str = ""
    """Empty for a file that the hub keeps without one: it is hashed after it was fetched."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A model's repository at one commit."""

    name: str
    """ "ORG/NAME"."""
    commit: str
    files: tuple[RepositoryFile, ...]
    licence: str
    created_at_unix_seconds: int
    gated: bool
    """Whether its owners ask who fetches it."""


@dataclass(frozen=True, slots=True)
class ModelWishes:
    """What the operator says of a new entry; None leaves it to the offer of the same id, then to a default."""

    model_id: str | None = None
    file_name: str | None = None
    prompt_price_micro_credits: int | None = None
    completion_price_micro_credits: int | None = None
    engine_kinds: tuple[str, ...] = ()
    context_length_tokens: int | None = None
    slot_count: int | None = None


def holds_no_code(file_name: str) -> bool:
    """Whether a file of that name is of a format that holds data alone."""
    return file_name.endswith((".safetensors", ".gguf", ".json")) or file_name.rpartition("/")[2] in TOKENIZER_FILES


def files_to_serve(files: Sequence[RepositoryFile], wanted: str | None, weight_map: Mapping[str, str] | None) -> tuple[RepositoryFile, ...]:
    """The files of the repository that an engine needs, weights first.

    Args:
        files: all of them.
        wanted: the GGUF file that the operator named; None for none.
        weight_map: of the index of the weights, which tensor is in which file; None where there is no index.

    Raises:
        ValueError: with the reason why there is nothing to serve, or what must be said first.
    """
    present = {file.name: file for file in files if file.size_bytes > 0}
    ggufs = sorted(name for name in present if name.endswith(".gguf"))
    if wanted is not None:
        if wanted not in ggufs:
            raise ValueError(f"the repository has no GGUF file {wanted}; it has {_names(ggufs)}")
        return _with_its_parts(wanted, present)
    tensors = sorted(name for name in present if name.endswith(".safetensors") and "/" not in name)
    if tensors:
        return _folder(present, tensors, weight_map)
    if ggufs:
        whole = {_PART.sub(r"\g<stem>.gguf", name) for name in ggufs}
        if len(whole) > 1:
            raise ValueError(f"the repository has several GGUF files; say which one with --file: {_names(ggufs)}")
        return _with_its_parts(ggufs[0], present)
    others = sorted(name for name in present if name.endswith(_OTHER_FORMATS))
    if others:
        raise ValueError(f"its weights are in {_names(others)}, a format that may hold code; only safetensors and GGUF are served")
    raise ValueError("the repository has no safetensors or GGUF files")


def python_needed(documents: Mapping[str, Any]) -> str:
    """Why the model cannot be served without running code of its repository; empty if it can. `documents` are parsed files by name."""
    for name, document in documents.items():
        for place, part in _parts(document):
            if "auto_map" in part:
                where = f"{name}{f' ({place})' if place else ''}"
                return f"{where} has auto_map: the model needs Python code of its repository, and no node runs such code"
    return ""


def entry_of_repository(
    repository: Repository,
    pins: Sequence[PinnedFile],
    documents: Mapping[str, Any],
    wishes: ModelWishes,
    offer: CatalogueEntry | None,
) -> CatalogueEntry:
    """The catalogue entry for the pinned files.

    Args:
        repository: where they are from.
        pins: the files, weights first, each with its hash.
        documents: the parsed JSON files by name; of a GGUF file its `GgufHeader`, or in words why there is none.
        wishes: what the operator said.
        offer: the catalogue's entry without files that this one takes the place of; None for none.

    Raises:
        ValueError: the model cannot be served, with the reason.
    """
    _check(pins)
    if reason := python_needed(documents):
        raise ValueError(reason)
    if not isinstance(documents.get(CONFIG, {}), dict):
        raise ValueError(f"its {CONFIG} is no JSON object, and engines read no other")  # noqa: TRY004 - the file is wrong, not the caller
    unchecked: list[str] = []
    architecture = _architecture(pins, documents, unchecked)
    base = offer or _unsaid(repository, pins[0], architecture)
    licence = repository.licence or base.licence
    if not licence:
        unchecked.append("its licence, which the repository does not name")
    if repository.gated:
        unchecked.append("whether nodes may fetch it: its owners ask who does, so each node needs a token of the hub")
    context_length_tokens = wishes.context_length_tokens or base.context_length_tokens
    if architecture is not None and context_length_tokens > architecture.context_length_max_tokens:
        raise ValueError(f"the model has a context of {architecture.context_length_max_tokens} tokens; ask for no more with --context")
    model_id = ModelId(wishes.model_id or base.model_id)
    source = f"hf:{repository.name}@{repository.commit}"
    first, *further = pins
    return replace(
        base,
        model_id=model_id,
        file=ModelFile(model_id, source, first.file_name, first.sha256, first.size_bytes, further_files=tuple(further)),
        engine_kinds=wishes.engine_kinds or base.engine_kinds,
        context_length_tokens=context_length_tokens,
        slot_count=wishes.slot_count or base.slot_count,
        prompt_price_micro_credits=_said(wishes.prompt_price_micro_credits, base.prompt_price_micro_credits),
        completion_price_micro_credits=_said(wishes.completion_price_micro_credits, base.completion_price_micro_credits),
        licence=licence,
        created_at_unix_seconds=repository.created_at_unix_seconds,
        architecture=architecture,
        quantization=_quantization(architecture),
        repository="",
        unchecked="; ".join(unchecked),
    )


def _check(pins: Sequence[PinnedFile]) -> None:
    """What a catalogue file may not say, a hub may not either; raises ValueError."""
    for pin in pins:
        if not re.match(FILE_NAME_PATTERN, pin.file_name) or not holds_no_code(pin.file_name):
            raise ValueError(f"no node takes a file of the name {pin.file_name!r}")
        if not re.match(SHA256_PATTERN, pin.sha256) or pin.size_bytes <= 0:
            raise ValueError(f"{pin.file_name} has no good hash or size: {pin.sha256!r}, {pin.size_bytes} bytes")
    if len({pin.file_name for pin in pins}) != len(pins):
        raise ValueError("it names a file twice")


def _unsaid(repository: Repository, first: PinnedFile, architecture: ModelArchitecture | None) -> CatalogueEntry:
    """What an entry says where neither its operator nor an offer does."""
    return CatalogueEntry(
        model_id=model_id_of(repository.name),
        file=None,
        engine_kinds=("llamacpp",) if first.file_name.endswith(".gguf") else ("vllm", "sglang"),
        context_length_tokens=CONTEXT_TOKENS_UNKNOWN
        if architecture is None
        else min(CONTEXT_TOKENS_DEFAULT, architecture.context_length_max_tokens),
        slot_count=SLOTS_DEFAULT,
        prompt_price_micro_credits=PROMPT_PRICE_DEFAULT,
        completion_price_micro_credits=COMPLETION_PRICE_DEFAULT,
        licence="",
        endpoints=(Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS),
        created_at_unix_seconds=0,
    )


def model_id_of(repository_name: str) -> ModelId:
    """How a model is called if nobody says: the repository's own name, in small letters."""
    return ModelId(_MODEL_ID_UNFIT.sub("-", repository_name.rpartition("/")[2].lower()).strip("-._")[:96])


def _said(word: int | None, otherwise: int) -> int:
    return otherwise if word is None else word


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown


def _with_its_parts(name: str, present: Mapping[str, RepositoryFile]) -> tuple[RepositoryFile, ...]:
    """A GGUF file, with the others of its series where it is one of several."""
    match = _PART.fullmatch(name)
    if match is None:
        return (present[name],)
    series = [f"{match['stem']}-{number:05}-of-{match['count']}.gguf" for number in range(1, int(match["count"]) + 1)]
    if missing := [part for part in series if part not in present]:
        raise ValueError(f"the repository lacks {_names(missing)}")
    return tuple(present[part] for part in series)


def _folder(
    present: Mapping[str, RepositoryFile], tensors: Sequence[str], weight_map: Mapping[str, str] | None
) -> tuple[RepositoryFile, ...]:
    if CONFIG not in present:
        raise ValueError(f"the repository has no {CONFIG}, without which no engine knows what its weights are")
    if weight_map is not None:
        weights = sorted(set(weight_map.values()))
        if missing := [name for name in weights if name not in tensors]:
            raise ValueError(f"{WEIGHT_INDEX} names {_names(missing)}, and the repository lacks that")
    else:
        # Some repositories hold the same weights a second time, under other names.
        weights = ["model.safetensors"] if "model.safetensors" in tensors else list(tensors)
    beside = [name for name in sorted(present) if "/" not in name and _goes_along(name, indexed=weight_map is not None)]
    return tuple(present[name] for name in (*weights, *beside))


def _goes_along(name: str, *, indexed: bool) -> bool:
    if name in TOKENIZER_FILES:
        return True
    if name.endswith(".index.json"):
        return indexed and name == WEIGHT_INDEX
    # `params.json` describes the same weights in another layout, for which some engines would then look.
    return name.endswith(".json") and name != "params.json"


def _parts(document: object, place: str = "") -> list[tuple[str, Mapping[str, Any]]]:
    """Every object within a JSON document, with where it stands."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    waiting: list[tuple[str, object]] = [(place, document)]
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, dict):
            found.append((where, value))
            waiting += [(f"{where}.{key}" if where else str(key), item) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [(where, item) for item in value]
    return found


def _architecture(pins: Sequence[PinnedFile], documents: Mapping[str, Any], unchecked: list[str]) -> ModelArchitecture | None:
    config, header = documents.get(CONFIG), documents.get(pins[0].file_name)
    weight_bytes = sum(pin.size_bytes for pin in pins if pin.file_name.endswith((".safetensors", ".gguf")))
    try:
        if isinstance(header, GgufHeader):
            return architecture_of_gguf(header.metadata, weight_bytes=weight_bytes, has_output_table=header.has_output_table)
        if not isinstance(config, dict):
            unchecked.append(f"its architecture: {header or 'a GGUF file says it inside, and only its size and hash were read'}")
            return None
        return architecture_of_config(config, weight_bytes=weight_bytes or None)
    except ValueError as error:
        unchecked.append(f"what it needs beside its files: {error}")
        return None


def _quantization(architecture: ModelArchitecture | None) -> str:
    name = architecture.quantization.name if architecture is not None else "none"
    return "" if name == "none" or name.startswith("gguf") else name
