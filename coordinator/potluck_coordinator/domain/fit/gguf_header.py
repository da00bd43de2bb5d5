"""A GGUF file's metadata, read from its first bytes.

Decides what of them is kept: single values, how long each list is, and whether the file has a table of its own for the output. Counts and
lengths are a stranger's, and bounded. It must not know what the keys mean, nor how the bytes were had; nodes check the whole file.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

VERSIONS: Final = (2, 3)
TENSORS_MAX: Final = 65_536
KEYS_MAX: Final = 4_096
DIMENSIONS_MAX: Final = 4
OUTPUT_TABLE: Final = "output.weight"
_BOOLEAN: Final = 7
_STRING: Final = 8
_ARRAY: Final = 9
_FORMATS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


class HeaderCutError(ValueError):
    """The header is longer than what there is of it."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a header says."""

    metadata: Mapping[str, Any]
    """Of a list its length alone, as a range; of one of booleans, which may be said of each layer, all of it."""
    has_output_table: bool
    """True of a series of files, where another may have it."""


def gguf_header(content: bytes) -> GgufHeader:
    """The header at the beginning of a file.

    Raises:
        HeaderCutError: it goes on behind `content`.
        ValueError: it is none.
    """
    bytes_ = _Bytes(content)
    if bytes_.take(4) != b"GGUF":
        raise ValueError("it does not begin as a GGUF does")
    version, tensor_count, key_count = bytes_.number("<I"), bytes_.number("<Q"), bytes_.number("<Q")
    if version not in VERSIONS or tensor_count > TENSORS_MAX or key_count > KEYS_MAX:
        raise ValueError(f"its header of version {version} counts {tensor_count} tensors and {key_count} keys")
    metadata = {}
    for _ in range(key_count):
        key = bytes_.text()
        metadata[key] = _value(bytes_, bytes_.number("<I"))
    names = {_tensor_name(bytes_) for _ in range(tensor_count)}
    parts = metadata.get("split.count", 1)
    return GgufHeader(metadata, OUTPUT_TABLE in names or (isinstance(parts, int) and parts > 1))


class _Bytes:
    """The bytes so far read."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._position = 0

    def take(self, count: int) -> bytes:
        if count > len(self._content) - self._position:
            raise HeaderCutError(f"its header is longer than {len(self._content)} bytes")
        self._position += count
        return self._content[self._position - count : self._position]

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode(errors="replace")


def _value(bytes_: _Bytes, kind: int) -> Any:
    if kind == _STRING:
        return bytes_.text()
    if kind != _ARRAY:
        return bytes_.number(_layout(kind))
    item_kind, count = bytes_.number("<I"), bytes_.number("<Q")
    if item_kind == _STRING:
        for _ in range(count):
            bytes_.take(bytes_.number("<Q"))
    elif item_kind == _BOOLEAN:
        return tuple(map(bool, bytes_.take(count)))
    else:
        bytes_.take(count * struct.calcsize(_layout(item_kind)))
    return range(count)


def _layout(kind: int) -> str:
    layout = _FORMATS.get(kind)
    if layout is None:
        raise ValueError(f"its header has a value of the unknown type {kind}")
    return layout


def _tensor_name(bytes_: _Bytes) -> str:
    name, dimension_count = bytes_.text(), bytes_.number("<I")
    if dimension_count > DIMENSIONS_MAX:
        raise ValueError(f"its header has a tensor of {dimension_count} dimensions")
    bytes_.take(8 * dimension_count + 4 + 8)
    return name
