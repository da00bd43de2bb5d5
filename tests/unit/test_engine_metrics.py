"""Each engine's metrics in our words; what an engine does not tell stays unknown, and what cannot be is not believed."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_node.engines.metrics import json_pages, load_from, metrics_of, metrics_path
from potluck_node.engines.metrics_json import from_info, from_model_card, from_props, from_slots
from potluck_node.engines.metrics_page import LINE_CHARACTERS_MAX, LINES_MAX, Sample, page_of, samples_of
from potluck_node.engines.metrics_words import REQUESTS_MAX, TOKENS_MAX, EngineLoad

FIXTURES = Path(__file__).parent.parent / "fixtures" / "metrics"


def fixture(name: str) -> str:
    return (FIXTURES / name).read_text()


VLLM = fixture("vllm.txt")
LLAMACPP = fixture("llamacpp.txt")


@pytest.mark.parametrize(
    ("kind", "page", "load"),
    [
        ("vllm", VLLM, EngineLoad(3, 2, 0.25, 11_648, 224, 128, 77, 2912)),
        ("vllm", "vllm:gpu_cache_usage_perc 0.25\n", EngineLoad(kv_used_ratio=0.25)),
        ("llamacpp", LLAMACPP, EngineLoad(2, 1, None, None, 869, 243, 10)),
        ("llamacpp", fixture("llamacpp_2024.txt"), EngineLoad(1, 0, 0.25, generated_tokens=3469, kv_used_tokens=1024)),
        ("sglang", fixture("sglang.txt"), EngineLoad(12, 1, 0.5, 471_258, 8_128_902, 1200, 7_557_572, 235_629)),
        ("tgi", fixture("tgi.txt"), EngineLoad(4, 7, generated_tokens=8123, kv_used_tokens=6144)),
        ("tensorrt_llm", fixture("tensorrt_llm.txt"), EngineLoad(2, 0, 0.125, 32_000, 90, 30, 41, 4000)),
        ("ollama", VLLM, EngineLoad()),
        ("", VLLM, EngineLoad()),
        ("vllm", "", EngineLoad()),
        ("vllm", LLAMACPP, EngineLoad()),
        ("attach", VLLM, EngineLoad()),
        ("vllm", 'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0\n', EngineLoad(kv_capacity_tokens=1600)),
        ("vllm", 'vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0\n', EngineLoad()),
        ("llamacpp", "llamacpp:prompt_tokens_total 5\n", EngineLoad()),
    ],
)
def test_an_engines_metrics_in_our_words(kind, page, load):
    assert load_from(kind, page) == load


SEVERAL_ENGINES = """
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 5.0
vllm:num_requests_waiting{engine="0",model_name="m"} 0.0
vllm:num_requests_waiting{engine="1",model_name="m"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
vllm:cache_config_info{block_size="16",engine="0",kv_cache_size_tokens="16000",num_gpu_blocks="1000"} 1.0
vllm:cache_config_info{block_size="16",engine="1",kv_cache_size_tokens="16000",num_gpu_blocks="1000"} 1.0
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 100.0
vllm:prefix_cache_queries_total{engine="1",model_name="m"} 50.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 10.0
vllm:prefix_cache_hits_total{engine="1",model_name="m"} 20.0
vllm:generation_tokens_total{engine="0",model_name="m"} 7.0
vllm:generation_tokens_total{engine="1",model_name="m"} 9.0
"""
SEVERAL_RANKS = "".join(
    f'sglang:{name}{{dp_rank="{data_rank}",tp_rank="{tensor_rank}"}} {values[data_rank]}\n'
    for name, values in {"num_running_reqs": (3, 5), "num_queue_reqs": (0, 2), "token_usage": (0.25, 0.75)}.items()
    for data_rank in (0, 1)
    for tensor_rank in (0, 1)
)


@pytest.mark.parametrize(
    ("kind", "page", "load"),
    [
        ("vllm", SEVERAL_ENGINES, EngineLoad(8, 2, 0.5, 32_000, 150, 30, 16, 16_000)),
        ("vllm", SEVERAL_ENGINES.replace("kv_cache_size_tokens", "x"), EngineLoad(8, 2, 0.5, 32_000, 150, 30, 16, 16_000)),
        ("sglang", SEVERAL_RANKS, EngineLoad(8, 2, 0.5)),
    ],
)
def test_engines_that_share_the_requests_of_one_server_are_added_up_and_their_shares_averaged(kind, page, load):
    assert load_from(kind, page) == load


@pytest.mark.parametrize(
    ("nonsense", "kept"),
    [
        ('vllm:num_requests_running{engine="0" 3.0', EngineLoad(waiting_count=2)),
        ("vllm:num_requests_running NaN", EngineLoad(waiting_count=2)),
        ("vllm:num_requests_running +Inf", EngineLoad(waiting_count=2)),
        ("vllm:num_requests_running -1", EngineLoad(waiting_count=2)),
        (f"vllm:num_requests_running {'9' * 400}", EngineLoad(waiting_count=2)),
        (f"vllm:num_requests_running {REQUESTS_MAX + 1}", EngineLoad(waiting_count=2)),
        (f"vllm:num_requests_running {REQUESTS_MAX}", EngineLoad(REQUESTS_MAX, 2)),
        (f"vllm:generation_tokens_total {TOKENS_MAX * 2}", EngineLoad(waiting_count=2)),
        ("vllm:kv_cache_usage_perc 1.02", EngineLoad(waiting_count=2, kv_used_ratio=1.0)),
        ("vllm:kv_cache_usage_perc 55", EngineLoad(waiting_count=2)),
        ("vllm:kv_cache_usage_perc -0.1", EngineLoad(waiting_count=2)),
        ("vllm:prefix_cache_queries_total 4\nvllm:prefix_cache_hits_total 5", EngineLoad(waiting_count=2, prefix_queried_tokens=4)),
        ('vllm:cache_config_info{block_size="1e300",num_gpu_blocks="1e300"} 1', EngineLoad(waiting_count=2)),
        ('vllm:num_requests_running{engine="' + "0" * LINE_CHARACTERS_MAX + '"} 3', EngineLoad(waiting_count=2)),
        ("potluck:kv_capacity_tokens 10\npotluck:kv_used_tokens 11", EngineLoad(None, 2, None, 10, kv_used_tokens=10)),
    ],
)
def test_what_cannot_be_costs_itself_only(nonsense, kept):
    assert load_from("vllm", f"{nonsense}\nvllm:num_requests_waiting 2\n") == kept


def test_used_tokens_are_told_or_follow_from_the_ratio_and_the_capacity():
    assert load_from("vllm", "vllm:kv_cache_usage_perc 0.5\n").kv_used_tokens is None
    assert load_from("vllm", "potluck:kv_capacity_tokens 100\n").kv_used_tokens is None
    assert load_from("vllm", "potluck:kv_capacity_tokens 100\nvllm:kv_cache_usage_perc 0\n").kv_used_tokens == 0
    assert load_from("vllm", "potluck:kv_capacity_tokens 100\npotluck:kv_used_tokens 7\nvllm:kv_cache_usage_perc 0\n").kv_used_tokens == 7


def test_a_page_is_looked_at_up_to_a_bound():
    page = "vllm:num_requests_running 1\n" * (LINES_MAX + 5)
    assert len(samples_of(page, ["vllm:num_requests_running"])) == LINES_MAX


@pytest.mark.parametrize(
    "line", ["vllm:num_requests_running 1", "", 'vllm:num_requests_running{a="' + '\\"' * 500_000 + '"} 1', "vllm:num_requests_running 1,"]
)
def test_a_page_costs_little_beside_itself(line):
    page = f"{line}\n" * (2**22 // (len(line) + 1))
    tracemalloc.start()
    try:
        load_from("vllm", page)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.timed
@pytest.mark.parametrize(
    "labels",
    [
        'a="' + '\\"' * 2000 + '"',
        'a="' + "\\" * 4000,
        'a="' * 1300,
        "}{" * 2000,
        "," * 4000,
        " " * 4000,
        "a" * 4000,
        ",".join(f'a{number}="1"' for number in range(400)),
    ],
)
def test_labels_cost_as_much_time_as_they_are_long_however_odd(labels):
    page = f"vllm:num_requests_running{{{labels}}} 1\n" * LINES_MAX
    began = time.process_time()
    samples_of(page, ["vllm:num_requests_running"])
    # They take less than a tenth of a second. Parsers that look at a character again and again take a whole one.
    assert time.process_time() - began < 0.5


@given(st.dictionaries(st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,5}", fullmatch=True), st.text(max_size=8), max_size=4), st.floats())
def test_a_line_is_read_as_it_was_meant(labels, value):
    def escaped(text):
        return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')

    told = ",".join(f'{name}="{escaped(text)}"' for name, text in labels.items())
    for page in (f"m{{{told}}} {value}\n", f"m {{ {told} }} {value} 1395066363000\n"):
        (sample,) = samples_of(page, ["m"])
        assert (sample.name, sample.labels, repr(sample.value)) == ("m", labels, repr(value))


@pytest.mark.parametrize(
    ("line", "sample"),
    [
        ("m 1", Sample("m", {}, 1.0)),
        ('m{a="1",} 2 17', Sample("m", {"a": "1"}, 2.0)),
        ('m{ a = "x\\"}" , b="" } 2', Sample("m", {"a": 'x"}', "b": ""}, 2.0)),
        ("m{} 3", Sample("m", {}, 3.0)),
        ('m{a="1"b="2"} 1', None),
        ('m{a="1",a="2"} 1', None),
        ('m{a="1"', None),
        ('m{a="1} 1', None),
        ("m{a=1} 1", None),
        ("m", None),
        ("m 1_000", None),
        ("m 1 now", None),
        ("m 1 2 3", None),
        ("m1 1", None),
    ],
)
def test_a_line_that_is_none_tells_nothing(line, sample):
    assert samples_of(f"{line}\n", ["m"]) == ([] if sample is None else [sample])


@pytest.mark.parametrize("load", [EngineLoad(), EngineLoad(3, 2, 0.25, 11_648, 224, 128, 77, 2912), EngineLoad(0, kv_used_tokens=0)])
def test_what_our_own_door_tells_is_what_it_was_told(load):
    assert load_from("attach", page_of(metrics_of(load))) == load


def test_engines_are_asked_where_they_tell():
    assert [metrics_path(kind) for kind in ("vllm", "attach", "tensorrt_llm")] == ["/metrics", "/metrics", "/prometheus/metrics"]
    assert [metrics_path(kind) for kind in ("ollama", "tabbyapi", "")] == [None, None, None]
    assert [metrics_path(kind, may_wake=False) for kind in ("llamacpp", "vllm", "")] == [None, "/metrics", None]
    assert [page.path for page in json_pages("tabbyapi")] == ["/v1/model"]
    assert json_pages("ollama") == ()


def told(numbers: object) -> EngineLoad:
    return load_from("attach", page_of(numbers))


def test_the_slots_of_llama_cpp_tell_what_its_requests_hold_and_its_cache_where_it_is_one():
    slots, props = json.loads(fixture("llamacpp_slots.json")), json.loads(fixture("llamacpp_props.json"))
    assert told(from_slots(slots)) == EngineLoad(kv_used_tokens=282 + 2 + 101 + 2)
    assert told(from_slots([slots[0] | {"is_processing": False}, {}])) == EngineLoad(kv_used_tokens=0)
    assert told(from_slots([slots[0] | {"next_token": {"n_decoded": 9}}])) == EngineLoad(kv_used_tokens=291)
    assert told(from_props(props)) == EngineLoad(), "two slots may share 1,024 tokens or have as many each"
    assert told(from_props(props, has_shared_cache=False)) == EngineLoad(kv_capacity_tokens=2048)
    assert told(from_props(props | {"total_slots": 1})) == EngineLoad(kv_capacity_tokens=1024)


def test_a_cache_that_is_told_in_json_is_read():
    assert told(from_model_card({"owned_by": "tabbyAPI", "parameters": {"cache_size": 16_384}})) == EngineLoad(kv_capacity_tokens=16_384)
    assert told(from_info({"router": "text-generation-router", "max_batch_total_tokens": 8192})) == EngineLoad(kv_capacity_tokens=8192)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("total_slots", "default_generation_settings", "n_ctx", "is_processing", "next_token", "n_decoded", "parameters"),
                    *("n_prompt_tokens_cache", "n_prompt_tokens_processed", "cache_size", "max_batch_total_tokens"),
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON, st.sampled_from([from_props, from_slots, from_model_card, from_info]))
def test_no_json_is_too_strange_to_be_read(value, read):
    load = told(read(value))
    assert load.kv_used_tokens is None or 0 <= load.kv_used_tokens <= TOKENS_MAX


@given(st.sampled_from(["vllm", "sglang", "tensorrt_llm"]), st.text(max_size=60), st.integers(0, len(VLLM)))
def test_no_text_is_too_broken_to_be_read(kind, noise, cut):
    load_from(kind, VLLM[:cut] + noise + VLLM[cut:])


@given(st.text(st.sampled_from('{}",=\\ \t#0123456789.eENa:_vlm\r\u2028'), max_size=30))
def test_no_line_is_too_broken_to_be_read(rest):
    load_from("vllm", f"vllm:num_requests_running{{{rest}\n")


@given(st.floats(), st.floats())
def test_what_is_known_is_within_its_bounds(ratio, running):
    load = load_from("vllm", f"vllm:kv_cache_usage_perc {ratio}\nvllm:num_requests_running {running}\n")
    assert load.kv_used_ratio is None or 0.0 <= load.kv_used_ratio <= 1.0
    assert load.running_count is None or 0 <= load.running_count <= REQUESTS_MAX
