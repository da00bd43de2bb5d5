"""Whether the files of a model, right by their hashes, hold data and nothing that an engine would run.

A hash proves that a file is the one the catalogue means; who wrote the catalogue may mean harm. So the content is checked too, whoever
pinned it. Decides which check a file's name asks for, and what no JSON file of a model may say: names by which engines are told to import
code, which some of them obeyed although they were told not to (CVE-2026-22807, CVE-2026-4372, CVE-2026-5241). Headers of weights are for
`safetensors_header` and `gguf_header`. It must not know files or processes: `model_store.checker` reads.

Chat templates are not judged. They are programs in a small language, and every engine runs them in a sandbox of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any, Final

from potluck_node.domain.gguf_header import check_gguf
from potluck_node.domain.safetensors_header import LENGTH_BYTES, check_header, header_bytes
from potluck_node.domain.strict_json import DEPTH_MAX, BadModelError, parse, shown

TEXT_BYTES_MAX: Final = 64 * 1024 * 1024
"""Of a file that is read whole. The tokenizer of a vocabulary of 262,144 has 33 MB."""

CODE_WORDS: Final = frozenset(
    {"auto_map", "auto_mapping", "trust_remote_code", "custom_pipeline", "custom_pipelines", "custom_generate", "custom_code"}
)
"""Names in a JSON file that make some library import code of the file's choice."""
_INTERNAL: Final = "_internal"
"""Names that end so are a library's own state; read back from a file, they named code to load."""
_KERNEL_CHOICE: Final = re.compile(r"_?(?:attn|experts)_implementation")
_KERNEL_NAME: Final = re.compile(r"[a-z0-9_]{1,64}")
"""A kernel that the engine has. Anything else names a repository to take one from."""

_INDEX_SUFFIX: Final = ".index.json"
_VOCABULARIES: Final = {"vocab.json": (), "added_tokens.json": (), "tokenizer.json": ("model", "vocab")}
"""Where a file has numbers of tokens by their texts; a text there is no name of a setting."""
_SENTENCEPIECE_FIELDS: Final = frozenset(range(1, 6))
_SENTENCEPIECE_EXTENSIONS: Final = 200


class Check(StrEnum):
    """What is looked at in a file; the version in a value changes with the check, so that files are checked again."""

    SAFETENSORS = "safetensors 1"
    GGUF = "gguf 1"
    JSON = "json 1"
    INDEX = "index 1"
    SENTENCEPIECE = "sentencepiece 1"
    TEXT = "text 1"


CHECKS_OF_A_SET: Final = frozenset({Check.INDEX, Check.GGUF})
"""What a file passes among these files, it need not pass among others."""


def check_of(file_name: str) -> Check:
    """The check that a file of this name needs; `model_source` has let the name through."""
    base = PurePosixPath(file_name).name
    if base.endswith(_INDEX_SUFFIX):
        return Check.INDEX
    by_suffix = {".safetensors": Check.SAFETENSORS, ".gguf": Check.GGUF, ".json": Check.JSON, ".model": Check.SENTENCEPIECE}
    return by_suffix.get(PurePosixPath(base).suffix, Check.TEXT)


def check_content(file_name: str, size_bytes: int, read: Callable[[int], bytes], pinned_names: frozenset[str]) -> None:
    """Returns when the file holds what its name says and nothing to run.

    Args:
        file_name: as the catalogue names it.
        size_bytes: of the file.
        read: gives the file's next bytes from its start on, fewer only at its end.
        pinned_names: all files of the model, as the catalogue names them.

    Raises:
        BadModelError: it does not.
    """
    check = check_of(file_name)
    if check is Check.GGUF:
        check_gguf(read, size_bytes, sum(check_of(name) is Check.GGUF for name in pinned_names))
        return
    if check is Check.SAFETENSORS:
        length = header_bytes(read(LENGTH_BYTES), size_bytes)
        check_header(read(length), size_bytes - LENGTH_BYTES - length)
        return
    if size_bytes > TEXT_BYTES_MAX:
        raise BadModelError(f"it has {size_bytes} bytes; {TEXT_BYTES_MAX} are the most for a file of its kind")
    content = read(size_bytes)
    if check is Check.SENTENCEPIECE:
        check_sentencepiece(content)
    elif check is Check.TEXT:
        check_text(content)
    else:
        value = parse(content)
        check_words(PurePosixPath(file_name).name, value)
        if check is Check.INDEX:
            check_index(file_name, value, pinned_names)


def check_words(base_name: str, value: Any) -> None:
    """Returns when a JSON file names no code; raises BadModelError. The walk ends at DEPTH_MAX, as every engine's own does somewhere."""
    vocabulary = _VOCABULARIES.get(base_name)
    for path, name, child in _fields(value):
        if path == vocabulary and type(child) is int:
            continue
        if name in CODE_WORDS or name.endswith(_INTERNAL):
            raise BadModelError(f"it says {shown(name)!r}, by which engines load code")
        if _KERNEL_CHOICE.fullmatch(name):
            _check_kernels(name, child)


def _fields(value: Any) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Every named value, with the names on the way to its object. Of what is open only iterators are held, as deep as the value is."""
    open_values: list[tuple[tuple[str, ...], Iterator[tuple[str | None, Any]]]] = [((), iter([(None, value)]))]
    while open_values:
        path, entries = open_values[-1]
        for name, child in entries:
            if name is not None:
                yield path, name, child
            if isinstance(child, dict | list):
                if len(open_values) > DEPTH_MAX:
                    raise BadModelError(f"its JSON is nested deeper than {DEPTH_MAX} levels")
                inner = iter(child.items()) if isinstance(child, dict) else ((None, each) for each in child)
                open_values.append((path if name is None else (*path, name), inner))
                break
        else:
            open_values.pop()


def _check_kernels(name: str, choice: Any) -> None:
    """One kernel for the model, or one for each of its parts."""
    for kernel in choice.values() if isinstance(choice, dict) else (choice,):
        if kernel is not None and not (isinstance(kernel, str) and _KERNEL_NAME.fullmatch(kernel)):
            raise BadModelError(f"its {shown(name)!r} names a kernel that no engine has: {shown(str(kernel))!r}")


def check_index(file_name: str, value: Any, pinned_names: frozenset[str]) -> None:
    """Returns when the index names files of the model only; raises BadModelError. Names count from the index's own folder."""
    weights = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weights, dict):
        raise BadModelError("it is no index: it has no weight_map")
    folder = PurePosixPath(file_name).parent
    for name in sorted({part if isinstance(part, str) else "" for part in weights.values()}):
        if "/" in name or str(folder / name) not in pinned_names:
            raise BadModelError(f"its weight_map names {shown(name)!r}, which the catalogue does not pin")


def check_text(content: bytes) -> None:
    """Returns when the bytes are text; raises BadModelError."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise BadModelError("it is not UTF-8") from None
    if "\0" in text:
        raise BadModelError("it is no text: it holds a NUL")


def check_sentencepiece(content: bytes) -> None:
    """Returns when the bytes are a SentencePiece model as far as its outer fields go; raises BadModelError.

    A protobuf message of fields 1 (a piece, often), 2 to 5 and extensions from 200 on, each a length and as many bytes:
    https://github.com/google/sentencepiece, sentencepiece_model.proto.
    """
    position, piece_count = 0, 0
    while position < len(content):
        tag, position = _varint(content, position)
        length, position = _varint(content, position)
        field, wire_type = tag >> 3, tag & 7
        if wire_type != 2 or not (field in _SENTENCEPIECE_FIELDS or field >= _SENTENCEPIECE_EXTENSIONS):
            raise BadModelError("it is no SentencePiece model")
        piece_count += field == 1
        position += length
    if position != len(content) or not piece_count:
        raise BadModelError("it is no SentencePiece model")


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 63, 7):
        if position >= len(content):
            break
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise BadModelError("it is no SentencePiece model")
