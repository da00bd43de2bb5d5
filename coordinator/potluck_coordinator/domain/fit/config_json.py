"""Reads a model's architecture from its Hugging Face `config.json`.

Decides which keys mean what, and refuses what the arithmetic of `architecture` does not hold for, with the reason. It must not know files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from potluck_coordinator.domain.fit.architecture import UNQUANTIZED, ModelArchitecture, Quantization
from potluck_coordinator.domain.fit.quantizations import FP8, MXFP4, NF4, grouped

_UNMODELLED: Final = {
    "kv_lora_rank": "multi-head latent attention keeps other things than keys and values",
    "state_size": "a state space model keeps no keys and values",
    "is_encoder_decoder": "an encoder-decoder is no chat model",
}
_DTYPE_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}
_TIED_BY_DEFAULT: Final = ("gemma",)
_ALL_LAYERS_HAVE_THE_WINDOW: Final = frozenset({"mistral", "mixtral", "ministral", "phi3", "starcoder2"})
_FIRST_LAYERS_ARE_FULL: Final = frozenset({"qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl"})
"""As many as `max_window_layers`, and without `use_sliding_window` all."""
_FULL_LAYER_EVERY: Final = {"gemma2": 2, "gpt_oss": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "olmo3": 4}
"""Where neither `layer_types` nor `sliding_window_pattern` say so: what transformers makes of a model type (its `configuration_*.py`)."""


def architecture_of_config(config: Mapping[str, Any], *, model_id: str = "", weight_bytes: int | None = None) -> ModelArchitecture:
    """The architecture that a parsed `config.json` describes.

    Args:
        config: the parsed file; of a model with images, its `text_config` counts.
        model_id: how reports and corrections call it.
        weight_bytes: the exact size of the weight files, where it is known.

    Raises:
        ValueError: a key is missing or makes no sense, or the model is of a kind that the arithmetic does not hold for.
    """
    text = {**config, **config["text_config"]} if isinstance(config.get("text_config"), Mapping) else config
    for key, reason in _UNMODELLED.items():
        if text.get(key):
            raise ValueError(f"config.json has {key}: {reason}, which the fit does not model")
    heads = _integer(text, "num_attention_heads")
    hidden_size = _integer(text, "hidden_size")
    layer_count = _integer(text, "num_hidden_layers")
    expert_count = _first(text, "num_local_experts", "num_experts", "n_routed_experts")
    sliding, linear = _layer_kinds(text, layer_count)
    return ModelArchitecture(
        model_id=model_id,
        layer_count=layer_count,
        hidden_size=hidden_size,
        attention_head_count=heads,
        kv_head_count=_first(text, "num_key_value_heads") or heads,
        head_dim=_first(text, "head_dim") or hidden_size // heads,
        intermediate_size=(_first(text, "moe_intermediate_size") if expert_count else 0) or _integer(text, "intermediate_size"),
        vocabulary_size=_integer(text, "vocab_size"),
        context_length_max_tokens=_integer(text, "max_position_embeddings"),
        expert_count=expert_count,
        experts_per_token=_first(text, "num_experts_per_tok", "experts_per_token", "num_experts_per_token") if expert_count else 0,
        shared_expert_intermediate_size=_shared_experts(text) if expert_count else 0,
        tie_word_embeddings=bool(text.get("tie_word_embeddings", str(text.get("model_type", "")).startswith(_TIED_BY_DEFAULT))),
        sliding_window_tokens=_first(text, "sliding_window") if sliding else 0,
        sliding_layer_count=sliding,
        linear_attention_layer_count=linear,
        key_equals_value=bool(text.get("attention_k_eq_v")),
        dtype_bytes=_DTYPE_BYTES.get(str(text.get("dtype") or text.get("torch_dtype") or "bfloat16"), 2),
        quantization=quantization_of_config(config.get("quantization_config") or text.get("quantization_config")),
        weight_bytes_of_files=weight_bytes,
    )


def quantization_of_config(config: Any) -> Quantization:
    """What a `quantization_config` says; none where it is missing. Raises ValueError for a method that is not known."""
    if not isinstance(config, Mapping):
        return UNQUANTIZED
    method = str(config.get("quant_method", "")).lower()
    if method == "mxfp4":
        return MXFP4
    if method in {"fp8", "fbgemm_fp8"}:
        return FP8
    if method == "bitsandbytes":
        return NF4 if config.get("load_in_4bit") else Quantization("bitsandbytes", 8)
    if method in {"awq", "gptq", "auto-round", "auto_round"}:
        return grouped(method, _first(config, "bits", "w_bit") or 4, _first(config, "group_size", "q_group_size"))
    if method == "compressed-tensors":
        return _compressed_tensors(config)
    raise ValueError(f"config.json has quant_method {method or 'missing'}, which the fit does not know")


def _compressed_tensors(config: Mapping[str, Any]) -> Quantization:
    groups = config.get("config_groups")
    first: Any = next(iter(groups.values()), {}) if isinstance(groups, Mapping) else {}
    weights = first.get("weights") if isinstance(first, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ValueError("config.json has compressed-tensors without the bits of its weights")  # noqa: TRY004 - the file is wrong
    bits = _integer(weights, "num_bits")
    if weights.get("type") == "float" and bits == 8:
        return FP8
    return grouped(f"int{bits}", bits, _first(weights, "group_size"))


def _layer_kinds(text: Mapping[str, Any], layer_count: int) -> tuple[int, int]:
    """How many layers have a sliding window, and how many linear attention."""
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and kinds:
        if len(kinds) != layer_count:
            raise ValueError(f"config.json has {layer_count} layers and {len(kinds)} layer_types")
        sliding = kinds.count("sliding_attention") if _first(text, "sliding_window") > 0 else 0
        return sliding, kinds.count("linear_attention")
    if text.get("full_attention_interval"):
        raise ValueError("config.json has linear attention layers and does not list them in layer_types")
    return _sliding_layers(text, layer_count), 0


def _sliding_layers(text: Mapping[str, Any], layer_count: int) -> int:
    """How many layers have the window, where they are not listed.

    Layers of which nobody says so are taken for full ones: counted too large a cache is not filled, and counted too small it does not fit.
    """
    if _first(text, "sliding_window") < 1 or not text.get("use_sliding_window", True):
        return 0
    model_type = str(text.get("model_type", ""))
    full_every = _first(text, "sliding_window_pattern") or _FULL_LAYER_EVERY.get(model_type, 0)
    if full_every > 0:
        return layer_count - layer_count // full_every
    if model_type in _FIRST_LAYERS_ARE_FULL and text.get("use_sliding_window"):
        return max(0, layer_count - _first(text, "max_window_layers")) if "max_window_layers" in text else 0
    return layer_count if model_type in _ALL_LAYERS_HAVE_THE_WINDOW else 0


def _shared_experts(text: Mapping[str, Any]) -> int:
    return _first(text, "shared_expert_intermediate_size") or _first(text, "n_shared_experts") * _first(text, "moe_intermediate_size")


def _integer(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json has {'no ' + key if value is None else f'{key} = {value!r}, which is no count'}")
    return value


def _first(config: Mapping[str, Any], *keys: str) -> int:
    """The first of the keys that is a number; 0 where none is."""
    values = (config.get(key) for key in keys)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), 0)
