"""A model of several files, each of them sound and a few hundred bytes: what a folder from a hub looks like, without a model in it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from potluck_protocol.values import ModelFile, ModelId, PinnedFile

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
SCRIPT = "script.json"
"""What the scripted engine says; it stands for an engine that takes a folder."""


def safetensors(tensors: dict[str, bytes], metadata: dict[str, str] | None = None) -> bytes:
    """A file whose tensors are bytes."""
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    end = 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [end, end := end + len(data)]}
    return with_header(header, b"".join(tensors.values()))


def with_header(header: Any, data: bytes) -> bytes:
    """A file with this header, whatever it says."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def sentencepiece(pieces: tuple[str, ...]) -> bytes:
    """As much of a SentencePiece model as its outer fields: the pieces, and an empty description of the training."""
    encoded = [b"\x0a" + bytes([len(piece)]) + piece for piece in map(str.encode, pieces)]
    return b"".join((b"\x0a" + bytes([len(piece)]) + piece) for piece in encoded) + b"\x12\x00"


def good_files() -> dict[str, bytes]:
    """The files by name."""
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attn_implementation": "sdpa",
        "hidden_size": 64,
        "quantization_config": {"quant_method": "awq", "bits": 4, "modules_to_not_convert": None},
        "text_config": {"rope_scaling": {"factor": 8.0, "rope_type": "llama3"}},
        "time_step_limit": [0.0, 1e9],
    }
    tokens = {"auto_map": 0, "trust_remote_code": 1, "Ġthe": 2}
    tokenizer = {"version": "1.0", "added_tokens": [{"id": 0, "content": "<s>"}], "model": {"type": "BPE", "vocab": tokens, "merges": []}}
    first, second = safetensors({"a.weight": bytes(40), "b.weight": b"xy"}), safetensors({"c.weight": bytes(range(64))})
    weights = {"a.weight": SHARDS[0], "b.weight": SHARDS[0], "c.weight": SHARDS[1]}
    contents = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": [0, 1]},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template},
        "vocab.json": tokens,
        INDEX: {"metadata": {"total_size": 106}, "weight_map": weights},
        SCRIPT: {"tokens": [" a", " b"], "token_count": 4},
    }
    return {
        **{name: json.dumps(content).encode() for name, content in contents.items()},
        **dict(zip(SHARDS, (first, second), strict=True)),
        "chat_template.jinja": template.encode(),
        "merges.txt": "#version: 0.2\nĠ t\n".encode(),
        "tokenizer.model": sentencepiece(("<unk>", "▁a")),
    }


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def pin(name: str, content: bytes) -> PinnedFile:
    return PinnedFile(name, hashlib.sha256(content).hexdigest(), len(content))


def model_of(source: str, pins: list[PinnedFile], source_sha256: str = "") -> ModelFile:
    """A catalogue's model of these files."""
    first, *others = pins
    return ModelFile(ModelId("tiny"), source, first.file_name, first.sha256, first.size_bytes, source_sha256, tuple(others))


def pinned_folder(folder: Path, files: dict[str, bytes]) -> ModelFile:
    """The files written to the folder and pinned as they are."""
    write_files(folder, files)
    return model_of(f"path:{folder}", [pin(name, content) for name, content in files.items()])
