"""The built-in model as the folder that vLLM and SGLang want: safetensors made from the GGUF, with its tokenizer and its chat template.

llama.cpp keeps the rows of a llama's query and key matrices in another order; here they go back. Nothing is fetched that the node's own
model store would not fetch. The file format is that of safetensors: the header's length in eight bytes, the header as JSON, the tensors.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import platformdirs

from potluck_coordinator.catalogue_file import built_in_catalogue
from potluck_node.model_store.store import ModelStore

ROOT = Path(__file__).parents[2]
LICENCE_NOTE = "Made from a GGUF file of the same model by tests/support/safetensors_model.py."

_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def built_in_gguf() -> Path:
    """The built-in model's file, as a node of this machine's user keeps it; it is fetched where it is missing."""
    (entry,) = (entry for entry in built_in_catalogue() if entry.model_id == "smollm2-135m-instruct")
    store = ModelStore(platformdirs.user_cache_path("potluck"), disk_budget_bytes=None, environment=os.environ)
    return asyncio.run(store.ensure(entry.file, keep=frozenset(), on_progress=lambda _: None))


def built_in_folder() -> Path:
    """The built-in model's folder."""
    return made_of_built_in("smollm2-135m-instruct", Path(__file__), write_folder)


def made_of_built_in(name: str, code: Path, write: Callable[[Path, Path], None]) -> Path:
    """A folder that `write` makes of the built-in model's file, once for that code and that file, in the checkout's cache."""
    source = built_in_gguf()
    made_of = hashlib.sha256(code.read_bytes() + source.parent.name.encode()).hexdigest()[:16]
    target = ROOT / ".cache" / "models" / f"{name}-{made_of}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix="making-", dir=target.parent))
        write(source, making)
        try:
            making.rename(target)
        except OSError:  # another run was first
            shutil.rmtree(making)
    return target


def write_folder(source: Path, target: Path) -> None:
    """Writes the files of a llama with a byte-level BPE vocabulary and tied embeddings; SmolLM2 is one."""
    reader = gguf.GGUFReader(source)
    for name, content in (
        ("config.json", _config(reader)),
        ("generation_config.json", _special_tokens(reader)),
        ("tokenizer.json", _tokenizer(reader)),
        ("tokenizer_config.json", _tokenizer_config(reader)),
    ):
        (target / name).write_text(json.dumps(content, ensure_ascii=False, indent=1))
    _write_safetensors(target / "model.safetensors", reader)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where the first of them begins."""
    with path.open("rb") as file:
        size_bytes = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size_bytes)), 8 + size_bytes


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def _special_tokens(reader: gguf.GGUFReader) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {ours: int(_value(reader, f"tokenizer.ggml.{theirs}_token_id")) for ours, theirs in names.items()}


def _config(reader: gguf.GGUFReader) -> dict[str, Any]:
    head_count = _value(reader, "llama.attention.head_count")
    width = _value(reader, "llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "dtype": "bfloat16",
        "head_dim": width // head_count,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": _value(reader, "llama.feed_forward_length"),
        "max_position_embeddings": _value(reader, "llama.context_length"),
        "num_attention_heads": head_count,
        "num_hidden_layers": _value(reader, "llama.block_count"),
        "num_key_value_heads": _value(reader, "llama.attention.head_count_kv"),
        "rms_norm_eps": round(_value(reader, "llama.attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": _value(reader, "llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "vocab_size": _value(reader, "llama.vocab_size"),
        **_special_tokens(reader),
    }


def _tokenizer(reader: gguf.GGUFReader) -> dict[str, Any]:
    tokens = _value(reader, "tokenizer.ggml.tokens")
    kinds = _value(reader, "tokenizer.ggml.token_type")
    special = [
        {"id": index, "content": token, "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == gguf.TokenType.CONTROL
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    # `smollm` is llama.cpp's name for these two steps: digits one by one, then GPT-2's pieces.
    assert _value(reader, "tokenizer.ggml.pre") == "smollm"
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": _value(reader, "tokenizer.ggml.merges"),
        },
    }


def _tokenizer_config(reader: gguf.GGUFReader) -> dict[str, Any]:
    tokens = _value(reader, "tokenizer.ggml.tokens")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": _value(reader, "tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": _value(reader, "llama.context_length"),
        **{name.removesuffix("_id"): tokens[index] for name, index in _special_tokens(reader).items()},
    }


def _write_safetensors(path: Path, reader: gguf.GGUFReader) -> None:
    arrays = {_tensor_name(tensor.name): _array(reader, tensor) for tensor in reader.tensors}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "note": LICENCE_NOTE}}
    end = 0
    for name, array in arrays.items():
        header[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": [end, end := end + array.nbytes]}
    encoded = json.dumps(header).encode()
    # The tensors begin at a multiple of eight.
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for array in arrays.values():
            file.write(array.tobytes())


def _tensor_name(name: str) -> str:
    stem, _, part = name.rpartition(".")
    if stem in _TENSORS:
        return f"{_TENSORS[stem]}.{part}"
    _, layer, kind = stem.split(".")
    return f"model.layers.{layer}.{_LAYER_TENSORS[kind]}.{part}"


def _array(reader: gguf.GGUFReader, tensor: gguf.ReaderTensor) -> np.ndarray:
    array = gguf.quantize(gguf.dequantize(tensor.data, tensor.tensor_type), gguf.GGMLQuantizationType.BF16).view(np.uint16)
    heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(tensor.name.split(".")[-2])
    if heads is None:
        return array
    # llama.cpp turns neighbouring rows of a head, and transformers row i with row i + half.
    head_count = _value(reader, f"llama.attention.{heads}")
    rows, columns = array.shape
    half = rows // head_count // 2
    return array.reshape(head_count, half, 2, columns).swapaxes(1, 2).reshape(rows, columns)
