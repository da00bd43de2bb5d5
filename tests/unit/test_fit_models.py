"""What the fit reads out of a config.json, a GGUF file's metadata and its own table of architectures, and the bytes that follow from it."""

from __future__ import annotations

import struct
import tomllib
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest

from potluck_coordinator.architectures import known_architecture, known_model_ids
from potluck_coordinator.domain.fit.architecture import GIB, UNQUANTIZED, ModelArchitecture, Quantization
from potluck_coordinator.domain.fit.config_json import architecture_of_config, quantization_of_config
from potluck_coordinator.domain.fit.gguf_header import gguf_header
from potluck_coordinator.domain.fit.gguf_metadata import architecture_of_gguf
from potluck_coordinator.domain.fit.quantizations import FP8, MXFP4, NF4, grouped, known_quantizations, quantization_named

LLAMA_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 128}
LLAMA_GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "general.file_type": 15,
    "llama.block_count": 32,
    "llama.embedding_length": 4096,
    "llama.feed_forward_length": 14336,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
    "llama.context_length": 8192,
    "llama.vocab_size": 128256,
}
SMALL = ModelArchitecture("small", 4, 256, 8, 2, 32, 512, 1000, 4096)


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def test_a_llama_config_gives_the_architecture_that_the_table_has_under_its_name() -> None:
    read = architecture_of_config(LLAMA_CONFIG, model_id="llama-3-8b-instruct")
    assert read == known_architecture("meta-llama/Meta-Llama-3-8B-Instruct")
    assert 8.02e9 < read.parameter_count < 8.04e9


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"num_key_value_heads": None}, "kv_head_count", 32),
        ({"head_dim": 64}, "head_dim", 64),
        ({"sliding_window": 4096, "use_sliding_window": False}, "sliding_layer_count", 0),
        ({"layer_types": ["sliding_attention"] * 32, "sliding_window": None}, "sliding_layer_count", 0),
        ({"layer_types": ["sliding_attention", "full_attention"] * 16, "sliding_window": 128}, "sliding_layer_count", 16),
        ({"layer_types": ["linear_attention"] * 24 + ["full_attention"] * 8}, "linear_attention_layer_count", 24),
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, "experts_per_token", 2),
        ({"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}, "intermediate_size", 768),
        (
            {"n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "n_shared_experts": 2},
            "shared_expert_intermediate_size",
            2816,
        ),
        ({"torch_dtype": "float32"}, "dtype_bytes", 4),
        ({"attention_k_eq_v": True}, "key_equals_value", True),
        ({"text_config": {"num_hidden_layers": 40}}, "layer_count", 40),
    ],
)
def test_a_config_key_decides_its_field(changes: dict[str, Any], field: str, value: object) -> None:
    assert getattr(architecture_of_config({**LLAMA_CONFIG, **changes}), field) == value


@pytest.mark.parametrize(
    ("model_type", "changes", "sliding_layer_count"),
    [
        ("llama", {}, 0),
        ("a-model-of-tomorrow", {}, 0),
        ("a-model-of-tomorrow", {"sliding_window_pattern": 4}, 24),
        ("mistral", {}, 32),
        ("mistral", {"sliding_window": None}, 0),
        ("gemma2", {}, 16),
        ("gpt_oss", {}, 16),
        ("gemma3_text", {}, 27),
        ("gemma3_text", {"sliding_window_pattern": 2}, 16),
        ("cohere2", {"sliding_window_pattern": 4}, 24),
        ("cohere2", {}, 24),
        ("qwen2", {"max_window_layers": 28}, 0),
        ("qwen2", {"max_window_layers": 28, "use_sliding_window": False}, 0),
        ("qwen2", {"max_window_layers": 28, "use_sliding_window": True}, 4),
        ("qwen2", {"max_window_layers": 64, "use_sliding_window": True}, 0),
        ("qwen2", {"use_sliding_window": True}, 0),
    ],
)
def test_layers_that_are_not_listed_have_a_window_only_where_it_is_known(
    model_type: str, changes: dict[str, Any], sliding_layer_count: int
) -> None:
    config = {**LLAMA_CONFIG, "model_type": model_type, "sliding_window": 4096, **changes}
    assert architecture_of_config(config).sliding_layer_count == sliding_layer_count


def test_gemma_ties_its_tables_where_its_config_does_not_say() -> None:
    assert architecture_of_config({**without(LLAMA_CONFIG, "tie_word_embeddings"), "model_type": "gemma2"}).tie_word_embeddings


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (without(LLAMA_CONFIG, "hidden_size"), "config.json has no hidden_size"),
        ({**LLAMA_CONFIG, "num_hidden_layers": "32"}, "num_hidden_layers = '32', which is no count"),
        ({**LLAMA_CONFIG, "vocab_size": 0}, "vocab_size = 0, which is no count"),
        ({**LLAMA_CONFIG, "num_key_value_heads": 7}, "32 attention heads cannot share 7 KV heads"),
        ({**LLAMA_CONFIG, "kv_lora_rank": 512}, "multi-head latent attention"),
        ({**LLAMA_CONFIG, "state_size": 16}, "state space model"),
        ({**LLAMA_CONFIG, "is_encoder_decoder": True}, "encoder-decoder"),
        ({**LLAMA_CONFIG, "layer_types": ["full_attention"]}, "32 layers and 1 layer_types"),
        ({**LLAMA_CONFIG, "full_attention_interval": 4}, "does not list them in layer_types"),
        ({**LLAMA_CONFIG, "num_local_experts": 8}, "0 of 8 experts a token"),
        ({**LLAMA_CONFIG, "quantization_config": {"quant_method": "magic"}}, "quant_method magic, which the fit does not know"),
        ({**LLAMA_CONFIG, "quantization_config": {"quant_method": "compressed-tensors"}}, "without the bits of its weights"),
    ],
)
def test_a_config_that_the_arithmetic_does_not_hold_for_is_refused_with_the_reason(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        architecture_of_config(config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, UNQUANTIZED),
        (AWQ_CONFIG, grouped("awq", 4)),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, Quantization("gptq", 8)),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 32}, grouped("auto-round", 4, 32)),
        ({"quant_method": "mxfp4"}, MXFP4),
        ({"quant_method": "fp8"}, FP8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, NF4),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"num_bits": 4, "group_size": 128, "type": "int"}}}},
            grouped("int4", 4),
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"num_bits": 8, "type": "float"}}}}, FP8),
    ],
)
def test_a_quantization_config_leads_to_its_bits(config: object, expected: Quantization) -> None:
    assert quantization_of_config(config) == expected


def test_every_quantisation_that_is_offered_can_be_named() -> None:
    assert all(quantization_named(name).bits_per_weight >= 1 for name in known_quantizations())
    assert quantization_named("gguf:q4_k_m") == quantization_named("Q4_K_M")
    with pytest.raises(ValueError, match=r"Q4_X is no quantisation that the fit knows: none, fp8"):
        quantization_named("Q4_X")


def test_a_gguf_file_gives_the_sizes_of_the_model_and_the_bits_of_its_file() -> None:
    weight_bytes = int(4.58 * GIB)
    read = architecture_of_gguf(LLAMA_GGUF, weight_bytes=weight_bytes, has_output_table=True, model_id="llama-3-8b-instruct")
    known = known_architecture("llama-3-8b-instruct")
    assert replace(read, quantization=UNQUANTIZED, weight_bytes_of_files=None) == known
    assert read.weight_bytes == weight_bytes
    assert read.quantization.name == "gguf:Q4_K_M"
    assert 4.8 < read.quantization.bits_per_weight < 5.0


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"llama.attention.key_length": 64}, "head_dim", 64),
        ({"llama.expert_count": 8, "llama.expert_used_count": 2}, "experts_per_token", 2),
        ({"llama.expert_count": 8, "llama.expert_used_count": 2, "llama.expert_feed_forward_length": 768}, "intermediate_size", 768),
        ({"tokenizer.ggml.tokens": ["a", "b", "c"]}, "vocabulary_size", 3),
        ({"llama.attention.sliding_window": 4096}, "sliding_layer_count", 0),
        ({"llama.attention.sliding_window": 4096, "llama.attention.sliding_window_pattern": 4}, "sliding_layer_count", 24),
        ({"llama.attention.sliding_window": 4096, "llama.attention.sliding_window_pattern": 0}, "sliding_layer_count", 32),
        ({"llama.attention.sliding_window": 4096, "llama.attention.sliding_window_pattern": [True, False]}, "sliding_layer_count", 16),
        ({"llama.attention.sliding_window": 4096, "llama.attention.sliding_window_pattern": range(32)}, "sliding_layer_count", 0),
    ],
)
def test_a_gguf_key_decides_its_field(changes: dict[str, Any], field: str, value: object) -> None:
    read = architecture_of_gguf({**LLAMA_GGUF, **changes}, weight_bytes=5 * GIB, has_output_table=True)
    assert getattr(read, field) == value


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"general.architecture": None}, "no general.architecture"),
        ({"llama.block_count": None}, "no block_count"),
        ({"llama.attention.head_count": [32, 16]}, "attention.head_count for each layer"),
        ({"llama.attention.head_count": 0}, "attention.head_count = 0"),
        ({"llama.attention.head_count_kv": 0}, "at least 1"),
        ({"llama.block_count": 0}, "at least 1"),
        ({"llama.ssm.state_size": 16}, "family llama, which the fit does not model"),
    ],
)
def test_a_gguf_file_that_the_arithmetic_does_not_hold_for_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        architecture_of_gguf({**LLAMA_GGUF, **changes}, weight_bytes=GIB, has_output_table=True)


@pytest.mark.parametrize(("family", "sliding_layer_count"), [("gpt-oss", 16), ("gemma2", 16), ("gemma3", 27), ("cohere2", 24)])
def test_a_family_whose_layers_are_known_has_its_window_in_so_many_of_a_gguf_file_s(family: str, sliding_layer_count: int) -> None:
    renamed = {key.replace("llama.", f"{family}."): value for key, value in LLAMA_GGUF.items()}
    metadata = {**renamed, "general.architecture": family, "general.file_type": 38, f"{family}.attention.sliding_window": 128}
    read = architecture_of_gguf(metadata, weight_bytes=GIB, has_output_table=True)
    assert (read.sliding_layer_count, read.quantization.name) == (sliding_layer_count, "gguf:MXFP4")


def test_a_header_keeps_which_layers_have_the_window() -> None:
    key = b"llama.attention.sliding_window_pattern"
    pattern = struct.pack("<IIQ", 9, 7, 4) + bytes([1, 1, 1, 0])
    header = gguf_header(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key + pattern)
    metadata = {**LLAMA_GGUF, "llama.attention.sliding_window": 4096, **header.metadata}
    assert architecture_of_gguf(metadata, weight_bytes=GIB, has_output_table=True).sliding_layer_count == 24


def test_keys_and_values_grow_with_every_token_but_in_windows_and_linear_layers() -> None:
    a_token = 2 * 2 * 32 * 2
    assert SMALL.sequence_kv_bytes(100) == 4 * 100 * a_token
    assert replace(SMALL, sliding_window_tokens=10, sliding_layer_count=3).sequence_kv_bytes(100) == (100 + 3 * 10) * a_token
    assert replace(SMALL, linear_attention_layer_count=3).sequence_kv_bytes(100) == 100 * a_token
    assert replace(SMALL, key_equals_value=True).sequence_kv_bytes(100) == 4 * 100 * a_token / 2
    assert replace(SMALL, kv_dtype_bytes=1).sequence_kv_bytes(100) == 4 * 100 * a_token / 2


def test_one_token_reads_the_experts_that_it_chose_and_many_read_all() -> None:
    experts = replace(SMALL, expert_count=8, experts_per_token=2)
    one_expert = experts.expert_parameters * 2
    assert experts.layer_read_bytes(1) == pytest.approx(experts.layer_bytes - 6 * one_expert)
    assert experts.layer_read_bytes(1000) == pytest.approx(experts.layer_bytes)
    assert SMALL.layer_read_bytes(1) == SMALL.layer_bytes


def test_weights_follow_the_bits_of_what_is_quantised_and_the_files_where_they_are_known() -> None:
    layers = SMALL.layer_count * (SMALL.attention_parameters + SMALL.expert_parameters)
    tables = 2 * SMALL.embedding_parameters
    assert SMALL.weight_bytes == 2 * (layers + tables)
    assert replace(SMALL, tie_word_embeddings=True).weight_bytes == 2 * (layers + tables // 2)
    assert replace(SMALL, quantization=Quantization("q", 4)).weight_bytes == layers / 2 + 2 * tables
    assert replace(SMALL, quantization=Quantization("q", 4, covers_embeddings=True)).weight_bytes == (layers + tables) / 2
    known = replace(SMALL, weight_bytes_of_files=10**6)
    assert known.weight_bytes == 10**6
    assert known.layer_count * known.layer_bytes + 2 * known.embedding_bytes == pytest.approx(10**6)


def test_experts_alone_may_be_quantised_and_the_rest_otherwise() -> None:
    experts = replace(SMALL, expert_count=4, experts_per_token=1)
    expert_bytes = 4 * 4 * experts.expert_parameters * 4.25 / 8
    rest = experts.parameter_count - 4 * 4 * experts.expert_parameters
    assert replace(experts, quantization=MXFP4).weight_bytes == pytest.approx(expert_bytes + 2 * rest)
    in_gguf = replace(experts, quantization=quantization_named("gguf:MXFP4"))
    assert in_gguf.weight_bytes == pytest.approx(expert_bytes + rest * 8.5 / 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_count": 0},
        {"kv_head_count": 3},
        {"sliding_layer_count": 3, "linear_attention_layer_count": 2},
        {"expert_count": 2},
        {"expert_count": 2, "experts_per_token": 3},
    ],
)
def test_an_architecture_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        replace(SMALL, **changes)


def test_every_entry_of_the_table_says_how_it_was_checked_and_answers_to_each_of_its_names() -> None:
    tables = tomllib.loads(files("potluck_coordinator").joinpath("architectures.toml").read_text())
    assert list(tables) == list(known_model_ids())
    for model_id, table in tables.items():
        assert table["checked"]
        assert all(known_architecture(name.upper()).model_id == model_id for name in (model_id, *table.get("aliases", [])))


@pytest.mark.parametrize(
    ("model_id", "billions"),
    [
        ("smollm2-135m-instruct", 0.1345),
        ("mistral-7b-instruct-v0.3", 7.248),
        ("llama-2-13b-chat-gptq", 13.02),
        ("llama-3-8b-instruct-awq", 8.03),
        ("llama-3-70b-instruct-awq", 70.55),
        ("deepseek-r1-distill-llama-70b-awq", 70.55),
        ("qwen2.5-32b-instruct-awq", 32.76),
        ("qwen2.5-coder-32b-instruct-awq", 32.76),
        ("mixtral-8x22b-instruct-v0.1-awq", 140.63),
        ("qwen3-4b", 4.02),
        ("qwen3-8b", 8.19),
        ("gpt-oss-20b", 20.91),
    ],
)
def test_the_catalogue_models_have_as_many_weights_as_their_names_and_logs_say(model_id: str, billions: float) -> None:
    assert known_architecture(model_id).parameter_count / 1e9 == pytest.approx(billions, rel=0.005)


def test_an_unknown_name_is_answered_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"no architecture is known as llama-9; known are smollm2-135m-instruct, "):
        known_architecture("llama-9")


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_dtype_bytes": float("nan")},
        {"kv_dtype_bytes": float("inf")},
        {"kv_dtype_bytes": 0.0},
        {"kv_dtype_bytes": -2.0},
        {"layer_count": 10**9},
        {"layer_count": 1025},
        {"hidden_size": 2**24 + 1},
        {"intermediate_size": 10**12},
        {"vocabulary_size": 10**12},
        {"context_length_max_tokens": 10**12},
        {"expert_count": 10**9, "experts_per_token": 1},
        {"shared_expert_intermediate_size": -1},
        {"sliding_window_tokens": -1},
        {"sliding_layer_count": -1},
        {"linear_attention_layer_count": -5},
        {"dtype_bytes": 0},
        {"dtype_bytes": 10**9},
        {"weight_bytes_of_files": 0},
        {"weight_bytes_of_files": -1},
        {"weight_bytes_of_files": 2**60},
    ],
)
def test_numbers_that_no_model_has_are_refused(changes):
    with pytest.raises(ValueError, match=r"the most|at least|below 0|bytes"):
        replace(known_architecture("llama-3-8b-instruct"), **changes)
