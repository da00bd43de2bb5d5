"""Hostile by the headers of their weights, which the catalogue pins as they are."""

from __future__ import annotations

import json
import struct

from tests.support.hostile_draft import GGUF, Draft
from tests.support.tiny_model_folder import SHARDS, with_header


def header_length(draft: Draft) -> str:
    """A safetensors header longer than its file, or than a header may be."""
    name = draft.any_of(*SHARDS)
    if draft.random.random() < 0.1:
        padded = json.dumps({"__metadata__": {}}).encode().ljust(33 * 1024 * 1024)
        draft.files[name] = with_header(padded, b"")
        return rf"{name} is not loaded: its header of {len(padded)} bytes is longer than 33554432"
    content = draft.files[name]
    wrong = draft.random.choice([2**63, 2**64 - 1, len(content) - 7, 100_000_001, len(content), 10**12])
    draft.files[name] = wrong.to_bytes(8, "little") + content[8:]
    return rf"{name} is not loaded: its header would be longer than the file: {wrong} bytes"


def safetensors_header(draft: Draft) -> str:
    name = draft.any_of(*SHARDS)
    data = bytes(16)
    sound = {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}
    header, reason = draft.random.choice(
        [
            ({"a": {**sound, "shape": [8], "data_offsets": [8, 16]}}, "its tensor 'a' has a hole before it"),
            ({"a": sound, "b": {**sound, "shape": [8], "data_offsets": [4, 12]}}, "its tensor 'b' overlaps another"),
            ({"a": {**sound, "shape": [32], "data_offsets": [0, 32]}}, "its tensors have 32 bytes, and the file has 16 for them"),
            ({"a": {**sound, "shape": [8], "data_offsets": [0, 8]}}, "its tensors have 8 bytes, and the file has 16 for them"),
            ({"a": {**sound, "dtype": "PICKLE"}}, "its tensor 'a' has the unknown type 'PICKLE'"),
            ({"a": {**sound, "dtype": ["U8"]}}, r"its tensor 'a' has the unknown type .*"),
            ({"a": {**sound, "shape": [-16]}}, "its tensor 'a' has no shape that a tensor can have"),
            ({"a": {**sound, "shape": [True, 16]}}, "its tensor 'a' has no shape that a tensor can have"),
            ({"a": {**sound, "shape": [2**62, 2**62]}}, "its tensor 'a' has no shape that a tensor can have"),
            ({"a": {**sound, "shape": [2**40, 2**40]}}, "its tensor 'a' has 16 bytes, and its shape needs .*"),
            ({"a": {**sound, "shape": [15]}}, "its tensor 'a' has 16 bytes, and its shape needs 15"),
            ({"a": {**sound, "dtype": "F4", "shape": [31]}}, "its tensor 'a' has 16 bytes, and its shape needs 15.5"),
            ({"a": {**sound, "data_offsets": [16, 0]}}, "its tensor 'a' has no place in the file"),
            ({"a": {**sound, "data_offsets": [0]}}, "its tensor 'a' has no place in the file"),
            ({"a": {**sound, "data_offsets": [0, 16.0]}}, "its tensor 'a' has no place in the file"),
            ({"a": {**sound, "file": "/etc/passwd"}}, "its tensor 'a' is not described by dtype, shape and data_offsets"),
            ({"a": sound, "__metadata__": {"format": {"auto_map": 1}}}, "its metadata are not texts by name"),
            ({"a": sound, "__metadata__": ["pt"]}, "its metadata are not texts by name"),
            (b'{"a":1,"a":2}', "its JSON names 'a' twice in one object"),
            (b'[{"a":1}]', "its header is no JSON object"),
            (b'{"a":', "it is no JSON: .*"),
            (b'{"\xff":1}', "it is not UTF-8"),
            (b"{" + b'"a":{' * 5000, "its JSON is nested deeper than 32 levels"),
        ]
    )
    draft.files[name] = with_header(header, data)
    return rf"{name} is not loaded: {reason}"


def gguf_key(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def gguf_tensor(name: str, dimensions: list[int], kind: int, offset: int) -> bytes:
    shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return struct.pack("<Q", len(name)) + name.encode() + shape + struct.pack("<IQ", kind, offset)


def gguf(keys: list[bytes], tensors: list[bytes], data: bytes, *, version: int = 3, key_count: int | None = None) -> bytes:
    """A file of these parts, whatever they say."""
    counts = struct.pack("<IQQ", version, len(tensors), len(keys) if key_count is None else key_count)
    header = b"GGUF" + counts + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


def gguf_header(draft: Draft) -> str:
    text = struct.pack("<Q", 3) + b"abc"
    tensor = gguf_tensor("t", [8], 0, 0)
    data = bytes(32)
    content, reason = draft.random.choice(
        [
            (gguf([], [tensor], data, version=1), "its GGUF version is 1, not 2 or 3"),
            (gguf([], [tensor], data, version=0x03000000), "its GGUF version is 50331648, not 2 or 3"),
            (gguf([], [tensor], data, key_count=2**63), "its header counts 1 tensors and 9223372036854775808 keys; .* are the most"),
            (
                gguf([], [tensor], data, key_count=9),
                "its header (at byte .* more than .* the file has|has a key without a name)",
            ),
            (
                gguf([gguf_key("k", 8, struct.pack("<Q", 2**40))], [tensor], data),
                "its header at byte .* asks for 1099511627776 bytes more .*",
            ),
            (gguf([gguf_key("k", 9, struct.pack("<IQ", 8, 2**40))], [], b""), "its header has a list of 1099511627776 texts, more than .*"),
            (
                gguf([gguf_key("k", 9, struct.pack("<IQ", 4, 2**61))], [], b""),
                "its header at byte .* asks for 9223372036854775808 bytes more .*",
            ),
            (gguf([gguf_key("k", 9, struct.pack("<IQ", 9, 1))], [], b""), "the value of 'k' in its header has a list of lists"),
            (gguf([gguf_key("k", 13, b"")], [], b""), "the value of 'k' in its header has the unknown type 13"),
            (gguf([gguf_key("k", 8, text)] * 2, [tensor], data), "its header has the key 'k' twice"),
            (gguf([gguf_key("", 8, text)], [tensor], data), "its header has a key without a name"),
            (gguf([gguf_key("k" * 70_000, 8, text)], [], b""), "its header has a key of 70000 bytes; 65535 are the most"),
            (gguf([gguf_key("general.alignment", 4, struct.pack("<I", 0))], [tensor], data), "its alignment is no power of two .*"),
            (gguf([gguf_key("general.alignment", 4, struct.pack("<I", 2**31))], [tensor], data), "its alignment is no power of two .*"),
            (gguf([gguf_key("general.alignment", 8, text)], [tensor], data), "its alignment is no power of two .*"),
            (gguf([gguf_key("split.count", 2, b"\x02\0")], [tensor], data), "it is one of 2 files, and the catalogue pins 1"),
            (gguf([], [tensor, gguf_tensor("t", [8], 0, 32)], data * 2), "its header has the tensor 't' twice"),
            (gguf([], [gguf_tensor("t" * 64, [8], 0, 0)], data), "its header has a tensor name of 64 bytes; 63 are the most"),
            (gguf([], [gguf_tensor("t", [2] * 5, 0, 0)], bytes(128)), "its tensor 't' has 5 dimensions; 4 are the most"),
            (gguf([], [gguf_tensor("t", [8], 99, 0)], data), "its tensor 't' has the unknown type 99"),
            (gguf([], [gguf_tensor("t", [8], 2, 0)], data), "its tensor 't' has no shape that its type can have"),
            (gguf([], [gguf_tensor("t", [2**60], 0, 0)], data), "its tensor 't' has no shape that its type can have"),
            (gguf([], [gguf_tensor("t", [8], 0, 2**40)], data), "its tensor 't' does not lie right behind the one before it"),
            (gguf([], [tensor, gguf_tensor("u", [8], 0, 0)], data), "its tensor 'u' does not lie right behind the one before it"),
            (gguf([], [gguf_tensor("t", [8, 2**40], 0, 0)], data), "its tensors end at .* bytes, and the file at .*"),
            (gguf([], [tensor], data)[:-9], "its tensors end at .* bytes, and the file at .*"),
            (gguf([], [tensor], data)[:40], "its header at byte .* asks for .* bytes more than a header or the file has"),
        ]
    )
    draft.files[GGUF] = content
    return rf"{GGUF} is not loaded: {reason}"
