"""Whether a GGUF file is one: its header, read once from the start, checked against the file's size.

Decides by the format's rules and llama.cpp's, read strictly: counts, lengths and nesting within bounds, every name once, every tensor of a
known type right behind the one before it, and nothing after the last. It must not know files: it is given a function that reads on.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Types and their blocks: `ggml_type` in ggml.h.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from potluck_node.domain.strict_json import BadModelError, shown

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
HEADER_BYTES_MAX: Final = 256 * 1024 * 1024
"""A vocabulary of 262,144 tokens with its merges has 16 MB."""
TENSORS_MAX: Final = 65_536
KEYS_MAX: Final = 4_096
KEY_BYTES_MAX: Final = 65_535
TENSOR_NAME_BYTES_MAX: Final = 63
DIMENSIONS_MAX: Final = 4
ALIGNMENT_DEFAULT: Final = 32
ALIGNMENT_MAX: Final = 64 * 1024
_DIMENSION_MAX: Final = 2**48

_STRING: Final = 8
_ARRAY: Final = 9
_UNSIGNED_32: Final = 4
_VALUE_BYTES: Final = {0: 1, 1: 1, 2: 2, 3: 2, _UNSIGNED_32: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

# fmt: off
_TENSOR_BLOCKS: Final = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40), 10: (256, 84), 11: (256, 110),
    12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50),
    20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56),
    30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18),
}
# fmt: on
"""By the type's number: how many weights a block has, and its bytes."""


def check_gguf(read: Callable[[int], bytes], size_bytes: int, file_count: int) -> None:
    """Returns when the file is a whole GGUF.

    Args:
        read: gives the next bytes of the file, fewer only at its end.
        size_bytes: of the file.
        file_count: GGUF files of the model. llama.cpp opens whatever lies beside a file that is one of several.

    Raises:
        BadModelError: it is not.
    """
    header = _Header(read, size_bytes)
    if header.take(len(MAGIC)) != MAGIC:
        raise BadModelError("it does not begin as a GGUF does")
    version = header.number(4)
    if version not in VERSIONS:
        raise BadModelError(f"its GGUF version is {version}, not 2 or 3")
    tensor_count, key_count = header.number(8), header.number(8)
    if tensor_count > TENSORS_MAX or key_count > KEYS_MAX:
        raise BadModelError(f"its header counts {tensor_count} tensors and {key_count} keys; {TENSORS_MAX} and {KEYS_MAX} are the most")
    alignment, part_count = _take_values(header, key_count)
    if part_count > 1 and part_count != file_count:
        raise BadModelError(f"it is one of {part_count} files, and the catalogue pins {file_count}")
    data_bytes = _take_tensors(header, tensor_count, alignment)
    begin = _padded(header.position, alignment) if tensor_count else header.position
    # The last tensor's own padding may be missing; anything beyond it is not the model.
    if not 0 <= size_bytes - begin - data_bytes < alignment:
        raise BadModelError(f"its tensors end at {begin + data_bytes} bytes, and the file at {size_bytes}")


class _Header:
    """The bytes so far taken, and what may still come."""

    def __init__(self, read: Callable[[int], bytes], size_bytes: int) -> None:
        self._read = read
        self._end = min(size_bytes, HEADER_BYTES_MAX)
        self.position = 0

    def take(self, count: int) -> bytes:
        if count > self._end - self.position:
            raise BadModelError(f"its header at byte {self.position} asks for {count} bytes more than a header or the file has")
        content = self._read(count)
        if len(content) != count:
            raise BadModelError(f"it ends within its header, at byte {self.position + len(content)}")
        self.position += count
        return content

    def number(self, byte_count: int) -> int:
        return int.from_bytes(self.take(byte_count), "little")

    def text(self, bytes_max: int, what: str) -> str:
        length = self.number(8)
        if length > bytes_max:
            raise BadModelError(f"its header has a {what} of {length} bytes; {bytes_max} are the most")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise BadModelError(f"its header has a {what} that is not UTF-8") from None

    def skip_texts(self, count: int) -> None:
        """Tokens need not be UTF-8, and none is kept."""
        if count * 8 > self._end - self.position:
            raise BadModelError(f"its header has a list of {count} texts, more than a header or the file has room for")
        take, length_of = self.take, struct.Struct("<Q").unpack
        for _ in range(count):
            take(length_of(take(8))[0])


def _take_values(header: _Header, key_count: int) -> tuple[int, int]:
    """Reads past all keys; the alignment that they ask for, and how many files they say the model has."""
    alignment, part_count, seen = ALIGNMENT_DEFAULT, 1, set()
    for _ in range(key_count):
        key = header.text(KEY_BYTES_MAX, "key")
        if not key or key in seen:
            raise BadModelError(f"its header has the key {shown(key)!r} twice" if key else "its header has a key without a name")
        seen.add(key)
        kind = header.number(4)
        if key == "general.alignment":
            alignment = _take_alignment(header, kind)
        elif key == "split.count":
            part_count = header.number(_value_bytes(kind, key))
        elif kind == _ARRAY:
            _skip_array(header, key)
        elif kind == _STRING:
            header.take(header.number(8))
        else:
            header.take(_value_bytes(kind, key))
    return alignment, part_count


def _take_alignment(header: _Header, kind: int) -> int:
    alignment = header.number(4) if kind == _UNSIGNED_32 else 0
    if alignment.bit_count() != 1 or alignment > ALIGNMENT_MAX:
        raise BadModelError("its alignment is no power of two that a file can have")
    return alignment


def _skip_array(header: _Header, key: str) -> None:
    kind, count = header.number(4), header.number(8)
    if kind == _STRING:
        header.skip_texts(count)
    else:
        header.take(count * _value_bytes(kind, key))


def _value_bytes(kind: int, key: str) -> int:
    try:
        return _VALUE_BYTES[kind]
    except KeyError:
        what = "a list of lists" if kind == _ARRAY else f"the unknown type {kind}"
        raise BadModelError(f"the value of {shown(key)!r} in its header has {what}") from None


def _take_tensors(header: _Header, tensor_count: int, alignment: int) -> int:
    """Reads past all tensors; where the last one ends, without its padding, from the first one's begin."""
    seen: set[str] = set()
    end = 0
    for _ in range(tensor_count):
        name = header.text(TENSOR_NAME_BYTES_MAX, "tensor name")
        if name in seen:
            raise BadModelError(f"its header has the tensor {shown(name)!r} twice")
        seen.add(name)
        size_bytes = _tensor_bytes(header, name)
        if header.number(8) != _padded(end, alignment):
            raise BadModelError(f"its tensor {shown(name)!r} does not lie right behind the one before it")
        end = _padded(end, alignment) + size_bytes
    return end


def _tensor_bytes(header: _Header, name: str) -> int:
    dimension_count = header.number(4)
    if dimension_count > DIMENSIONS_MAX:
        raise BadModelError(f"its tensor {shown(name)!r} has {dimension_count} dimensions; {DIMENSIONS_MAX} are the most")
    dimensions = [header.number(8) for _ in range(dimension_count)] or [1]
    kind = header.number(4)
    if kind not in _TENSOR_BLOCKS:
        raise BadModelError(f"its tensor {shown(name)!r} has the unknown type {kind}")
    weights, block_bytes = _TENSOR_BLOCKS[kind]
    if max(dimensions) > _DIMENSION_MAX or dimensions[0] % weights:
        raise BadModelError(f"its tensor {shown(name)!r} has no shape that its type can have")
    size_bytes = block_bytes * (dimensions[0] // weights)
    for dimension in dimensions[1:]:
        size_bytes *= dimension
    return size_bytes


def _padded(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment
