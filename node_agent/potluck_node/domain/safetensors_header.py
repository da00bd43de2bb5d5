"""Whether a safetensors file is one: its header, checked against its size.

Decides by the format's own rules, read strictly: the header's length in eight bytes, a JSON object, every tensor of a known type with as
many bytes as its shape needs, and the tensors one after another to the file's end, so that nothing else fits in. It must not know files.

The format: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

from typing import Any, Final

from potluck_node.domain.strict_json import BadModelError, parse, shown

LENGTH_BYTES: Final = 8
HEADER_BYTES_MAX: Final = 32 * 1024 * 1024
"""The format allows 100 MB; a mixture of 256 experts in one file has 10."""
DIMENSIONS_MAX: Final = 16
_DIMENSION_MAX: Final = 2**48

_METADATA: Final = "__metadata__"
_BITS: Final = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


def header_bytes(first: bytes, size_bytes: int) -> int:
    """The length of the header that follows the first eight bytes of a file of this size; raises BadModelError."""
    length = int.from_bytes(first, "little")
    if len(first) < LENGTH_BYTES or LENGTH_BYTES + length > size_bytes:
        raise BadModelError(f"its header would be longer than the file: {length} bytes")
    if length > HEADER_BYTES_MAX:
        raise BadModelError(f"its header of {length} bytes is longer than {HEADER_BYTES_MAX}")
    return length


def check_header(header: bytes, data_bytes: int) -> None:
    """Returns when the header describes exactly the bytes after it; raises BadModelError."""
    if not header.startswith(b"{"):
        raise BadModelError("its header is no JSON object")
    fields = parse(header)
    _check_metadata(fields.pop(_METADATA, {}))
    spans = sorted(_span(name, tensor) for name, tensor in fields.items())
    end = 0
    for begin, tensor_end, name in spans:
        if begin != end:
            what = "overlaps another" if begin < end else "has a hole before it"
            raise BadModelError(f"its tensor {shown(name)!r} {what}")
        end = tensor_end
    if end != data_bytes:
        raise BadModelError(f"its tensors have {end} bytes, and the file has {data_bytes} for them")


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadModelError("its metadata are not texts by name")


def _span(name: str, tensor: Any) -> tuple[int, int, str]:
    if not isinstance(tensor, dict) or set(tensor) != {"dtype", "shape", "data_offsets"}:
        raise BadModelError(f"its tensor {shown(name)!r} is not described by dtype, shape and data_offsets")
    bits = _BITS.get(tensor["dtype"]) if isinstance(tensor["dtype"], str) else None
    if bits is None:
        raise BadModelError(f"its tensor {shown(name)!r} has the unknown type {shown(str(tensor['dtype']))!r}")
    shape = _counts(tensor["shape"])
    offsets = _counts(tensor["data_offsets"])
    if shape is None or len(shape) > DIMENSIONS_MAX:
        raise BadModelError(f"its tensor {shown(name)!r} has no shape that a tensor can have")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadModelError(f"its tensor {shown(name)!r} has no place in the file")
    for dimension in shape:
        bits *= dimension
    if bits != 8 * (offsets[1] - offsets[0]):
        raise BadModelError(f"its tensor {shown(name)!r} has {offsets[1] - offsets[0]} bytes, and its shape needs {bits / 8:g}")
    return offsets[0], offsets[1], name


def _counts(value: Any) -> list[int] | None:
    """A list of numbers that count something; None for anything else. A boolean counts nothing."""
    if not isinstance(value, list):
        return None
    return value if all(type(each) is int and 0 <= each <= _DIMENSION_MAX for each in value) else None
