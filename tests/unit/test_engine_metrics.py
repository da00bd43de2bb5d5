"""Each engine's metrics in our words; what an engine does not tell stays unknown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_node.engines.metrics import EngineLoad, load_from, metrics_path

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="smol"} 3.0
vllm:num_requests_waiting{engine="0",model_name="smol"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="smol",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="smol"} 0.25
vllm:prefix_cache_queries_total{engine="0",model_name="smol"} 224.0
vllm:prefix_cache_hits_total{engine="0",model_name="smol"} 128.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="smol"} 0.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",engine="0",kv_cache_size_tokens="11648",num_cpu_blocks="None",num_gpu_blocks="91"} 1.0
"""
LLAMACPP = """\
# HELP llamacpp:requests_processing Number of requests processing.
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 1
llamacpp:requests_deferred 4
"""
SGLANG = """\
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m",tp_rank="0"} 12.0
sglang:num_running_reqs{model_name="m",tp_rank="1"} 12.0
sglang:num_queue_reqs{model_name="m"} 1.0
sglang:token_usage{model_name="m"} 0.5
sglang:max_total_num_tokens{model_name="m"} 471258.0
sglang:prompt_tokens_total{model_name="m"} 8.128902e+06
sglang:cached_tokens_total{cache_source="device",model_name="m"} 1000.0
"""
TGI = "tgi_batch_current_size 4\ntgi_queue_size 7\ntgi_request_generated_tokens_sum 8123\n"
TENSORRT_LLM = """\
trtllm_num_requests_running{engine_type="trtllm"} 2.0
trtllm_num_requests_waiting{engine_type="trtllm"} 0.0
trtllm_kv_cache_utilization{engine_type="trtllm"} 0.125
trtllm_kv_cache_max_blocks{engine_type="trtllm"} 1000.0
trtllm_kv_cache_tokens_per_block{engine_type="trtllm"} 32.0
trtllm_prompt_tokens_total{engine_type="trtllm"} 90.0
trtllm_prompt_cached_tokens_total{engine_type="trtllm"} 30.0
"""


@pytest.mark.parametrize(
    ("kind", "text", "load"),
    [
        ("vllm", VLLM, EngineLoad(3, 2, 0.25, 11_648, 224, 128)),
        ("llamacpp", LLAMACPP, EngineLoad(1, 4)),
        ("sglang", SGLANG, EngineLoad(12, 1, 0.5, 471_258, 8_128_902, 1000)),
        ("tgi", TGI, EngineLoad(4, 7)),
        ("tensorrt_llm", TENSORRT_LLM, EngineLoad(2, 0, 0.125, 32_000, 90, 30)),
        ("ollama", VLLM, EngineLoad()),
        ("vllm", "", EngineLoad()),
        ("vllm", LLAMACPP, EngineLoad()),
        ("vllm", 'vllm:num_requests_running{engine="0" 3.0\n', EngineLoad()),
        ("vllm", "vllm:kv_cache_usage_perc NaN\nvllm:num_requests_running 1\n", EngineLoad(running_count=1)),
        ("vllm", "vllm:kv_cache_usage_perc 1.02\n", EngineLoad(kv_used_ratio=1.0)),
        ("vllm", 'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0\n', EngineLoad(kv_capacity_tokens=1600)),
        ("vllm", 'vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0\n', EngineLoad()),
    ],
)
def test_an_engines_metrics_in_our_words(kind, text, load):
    assert load_from(kind, text) == load


def test_used_tokens_need_both_the_ratio_and_the_capacity():
    assert load_from("vllm", VLLM).kv_used_tokens == 2912
    assert EngineLoad(kv_used_ratio=0.5).kv_used_tokens is None
    assert EngineLoad(kv_capacity_tokens=100).kv_used_tokens is None
    assert EngineLoad(kv_used_ratio=0.0, kv_capacity_tokens=100).kv_used_tokens == 0


def test_engines_without_metrics_have_no_path():
    assert metrics_path("vllm") == "/metrics"
    assert metrics_path("tensorrt_llm") == "/prometheus/metrics"
    assert metrics_path("ollama") is None


@given(st.sampled_from(["vllm", "sglang", "tensorrt_llm"]), st.text(max_size=60), st.integers(0, len(VLLM)))
def test_no_text_is_too_broken_to_be_read(kind, noise, cut):
    load_from(kind, VLLM[:cut] + noise + VLLM[cut:])


@given(st.floats(), st.floats())
def test_what_is_known_is_within_its_bounds(ratio, running):
    load = load_from("vllm", f"vllm:kv_cache_usage_perc {ratio}\nvllm:num_requests_running {running}\n")
    assert load.kv_used_ratio is None or 0.0 <= load.kv_used_ratio <= 1.0
    assert load.running_count is None or load.running_count >= 0
