"""Reads a model's architecture from a GGUF file's metadata.

Decides which keys mean what (the GGUF specification, and llama.cpp's names for the file types). It must not know files: the size is passed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from potluck_coordinator.domain.fit.architecture import ModelArchitecture, Quantization
from potluck_coordinator.domain.fit.quantizations import GGUF_MXFP4

_FILE_TYPES: Final = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    25: "IQ4_NL",
    30: "IQ4_XS",
    32: "BF16",
    38: "MXFP4",
}
_FULL_LAYER_EVERY: Final = {"gpt-oss": 2, "gemma2": 2, "gemma3": 6, "cohere2": 4}
"""llama.cpp knows it by the family (`set_swa_pattern`). Of Mistral and Phi-3 it uses no window."""


def architecture_of_gguf(
    metadata: Mapping[str, Any], *, weight_bytes: int, has_output_table: bool, model_id: str = ""
) -> ModelArchitecture:
    """The architecture that a GGUF file's metadata describes.

    Args:
        metadata: its key-value pairs, arrays as sequences.
        weight_bytes: of its tensors; the file's size will do.
        has_output_table: whether it has a tensor `output.weight`; without it the table of the embeddings serves both ways.
        model_id: how reports and corrections call it.

    Raises:
        ValueError: a key is missing or makes no sense, or the model is of a kind that the arithmetic does not hold for.
    """
    family = metadata.get("general.architecture")
    if not isinstance(family, str):
        raise ValueError("the GGUF file has no general.architecture")  # noqa: TRY004 - the file is wrong, not the caller
    own = {key.removeprefix(f"{family}."): value for key, value in metadata.items() if key.startswith(f"{family}.")}
    if any(key.startswith(("ssm.", "attention.kv_lora_rank")) for key in own):
        raise ValueError(f"the GGUF file is of family {family}, which the fit does not model")
    layer_count = _count(own, "block_count")
    heads = _count(own, "attention.head_count")
    if heads == 0:
        raise ValueError("the GGUF file has attention.head_count = 0, which the fit does not model")
    hidden_size = _count(own, "embedding_length")
    expert_count = _count(own, "expert_count", 0)
    window = _count(own, "attention.sliding_window", 0)
    derived = ModelArchitecture(
        model_id=model_id,
        layer_count=layer_count,
        hidden_size=hidden_size,
        attention_head_count=heads,
        kv_head_count=_count(own, "attention.head_count_kv", heads),
        head_dim=_count(own, "attention.key_length", hidden_size // heads),
        intermediate_size=_count(own, "expert_feed_forward_length", 0) or _count(own, "feed_forward_length"),
        vocabulary_size=_vocabulary_size(own, metadata),
        context_length_max_tokens=_count(own, "context_length"),
        expert_count=expert_count,
        experts_per_token=_count(own, "expert_used_count", 0) if expert_count else 0,
        sliding_window_tokens=window,
        sliding_layer_count=_sliding_layers(own, family, layer_count) if window else 0,
        tie_word_embeddings=not has_output_table,
        weight_bytes_of_files=weight_bytes,
    )
    kind = _FILE_TYPES.get(metadata.get("general.file_type", -1), "mixed")
    if kind == "MXFP4":
        return dataclasses.replace(derived, quantization=GGUF_MXFP4)
    bits = min(32.0, max(1.0, 8 * weight_bytes / derived.parameter_count))
    return dataclasses.replace(derived, quantization=Quantization(f"gguf:{kind}", bits, covers_embeddings=True))


def _sliding_layers(own: Mapping[str, Any], family: str, layer_count: int) -> int:
    """How many layers have the window: by the file's pattern, else by what llama.cpp knows of the family, else none, the safe side.

    A pattern says so of each layer, and is repeated; or it is a number N, and every N-th layer is full, of 0 none.
    """
    key = "attention.sliding_window_pattern"
    pattern = own.get(key)
    if isinstance(pattern, Sequence) and not isinstance(pattern, str):
        flags = [item for item in pattern if isinstance(item, bool)]
        return sum(flags[layer % len(flags)] for layer in range(layer_count)) if flags else 0
    full_every = _count(own, key, _FULL_LAYER_EVERY.get(family, 1))
    return layer_count - layer_count // full_every if full_every else layer_count


def _vocabulary_size(own: Mapping[str, Any], metadata: Mapping[str, Any]) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, Sequence) and not isinstance(tokens, str) else _count(own, "vocab_size")


def _count(own: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = own.get(key, default)
    if isinstance(value, Sequence) and not isinstance(value, str):
        raise ValueError(f"the GGUF file has a {key} for each layer, which the fit does not model")  # noqa: TRY004 - as above
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"the GGUF file has {'no ' + key if value is None else f'{key} = {value!r}, which is no count'}")
    return value
