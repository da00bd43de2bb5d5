"""What engines say of themselves, in our words: one table from each engine's metrics to them.

Decides which metric of which engine means what. Where an engine does not tell, there is None, which is not 0. It must not know who asks,
nor what for.

vLLM's names are those that version 0.32 was seen to use, llama.cpp's those of xllamacpp 2026.10; the two of its cache are those that it had
until the spring of 2025. The others' are those of their source or documentation, and were not tried: SGLang 0.5
(`python/sglang/srt/metrics/collector.py`), Text Generation Inference 3 (`docs/source/reference/metrics.md`), TensorRT-LLM 1.3
(`tensorrt_llm/metrics/collector.py`, told at `/prometheus/metrics` where `return_perf_metrics` is set), TabbyAPI
(`endpoints/core/types/model.py`), which has no metrics but a model card. Ollama and LM Studio tell nothing of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from potluck_node.domain.model_source import ATTACHED_KIND
from potluck_node.engines.metrics_json import from_info, from_model_card, from_props, from_slots
from potluck_node.engines.metrics_page import Sample, samples_of
from potluck_node.engines.metrics_words import OURS, EngineLoad, believed


@dataclass(frozen=True, slots=True)
class _Reading:
    """Where a number stands: a metric's value, or one of its labels; with a second one, their product or their sum."""

    metric: str
    label: str = ""
    times: _Reading | None = None
    plus: _Reading | None = None
    adds_up_over: str = ""
    """A label whose values stand for parts of the whole."""
    averages_over: str = ""
    """A label whose values stand for parts, of which this is a share each."""

    @property
    def names(self) -> frozenset[str]:
        """The metrics that it takes."""
        return frozenset({self.metric}).union(*(other.names for other in (self.times, self.plus) if other))


@dataclass(frozen=True, slots=True)
class JsonPage:
    """Something that an engine tells in JSON."""

    path: str
    read: Callable[[Any], Mapping[str, float]]
    """To our metrics."""
    idle: Mapping[str, float] | None = None
    """What it comes to without requests. It is then not asked for: llama.cpp that was told to sleep when idle would never sleep again."""


@dataclass(frozen=True, slots=True)
class _Dialect:
    """One engine's metrics. Of several readings of one thing the first that is there counts, and ours after them."""

    path: str = ""
    """Of its metrics; empty: it has none."""
    metrics_wake: bool = False
    """A question for them wakes one that was told to sleep when idle, and keeps it awake: so do llama.cpp's of before August 2026."""
    running: tuple[_Reading, ...] = ()
    waiting: tuple[_Reading, ...] = ()
    kv_used_ratio: tuple[_Reading, ...] = ()
    kv_used: tuple[_Reading, ...] = ()
    kv_capacity: tuple[_Reading, ...] = ()
    prefix_queried: tuple[_Reading, ...] = ()
    prefix_hit: tuple[_Reading, ...] = ()
    generated: tuple[_Reading, ...] = ()
    json_pages: tuple[JsonPage, ...] = ()


_VLLM_CACHE: Final = "vllm:cache_config_info"
_BLOCK: Final = _Reading(_VLLM_CACHE, "block_size")
_ENGINE: Final = "engine"
"""vLLM's label for each of several engines with a whole model, and a cache, of its own."""
_RANK: Final = "dp_rank"
"""SGLang's."""
_LLAMACPP_CACHED: Final = _Reading("llamacpp:prompt_tokens_cached_total")
LLAMACPP_SLOTS: Final = JsonPage("/slots", from_slots, idle={OURS.kv_used: 0})
_DIALECTS: Final[Mapping[str, _Dialect]] = MappingProxyType(
    {
        "vllm": _Dialect(
            path="/metrics",
            running=(_Reading("vllm:num_requests_running", adds_up_over=_ENGINE),),
            waiting=(_Reading("vllm:num_requests_waiting", adds_up_over=_ENGINE),),
            # The second is what versions before 0.10 call it.
            kv_used_ratio=(
                _Reading("vllm:kv_cache_usage_perc", averages_over=_ENGINE),
                _Reading("vllm:gpu_cache_usage_perc", averages_over=_ENGINE),
            ),
            # Not every layer of a model keeps every token; then blocks times their size is not it.
            kv_capacity=(
                _Reading(_VLLM_CACHE, "kv_cache_size_tokens", adds_up_over=_ENGINE),
                _Reading(_VLLM_CACHE, "num_gpu_blocks", times=_BLOCK, adds_up_over=_ENGINE),
            ),
            prefix_queried=(_Reading("vllm:prefix_cache_queries_total", adds_up_over=_ENGINE),),
            prefix_hit=(_Reading("vllm:prefix_cache_hits_total", adds_up_over=_ENGINE),),
            generated=(_Reading("vllm:generation_tokens_total", adds_up_over=_ENGINE),),
        ),
        "llamacpp": _Dialect(
            path="/metrics",
            metrics_wake=True,
            running=(_Reading("llamacpp:requests_processing"),),
            waiting=(_Reading("llamacpp:requests_deferred"),),
            kv_used_ratio=(_Reading("llamacpp:kv_cache_usage_ratio"),),
            kv_used=(_Reading("llamacpp:kv_cache_tokens"),),
            # Since it tells what it found, it leaves that out of what it computed.
            prefix_queried=(_Reading("llamacpp:prompt_tokens_total", plus=_LLAMACPP_CACHED),),
            prefix_hit=(_LLAMACPP_CACHED,),
            generated=(_Reading("llamacpp:tokens_predicted_total"),),
            json_pages=(JsonPage("/props", from_props), LLAMACPP_SLOTS),
        ),
        "sglang": _Dialect(
            path="/metrics",
            running=(_Reading("sglang:num_running_reqs", adds_up_over=_RANK),),
            waiting=(_Reading("sglang:num_queue_reqs", adds_up_over=_RANK),),
            kv_used_ratio=(_Reading("sglang:token_usage", averages_over=_RANK),),
            kv_capacity=(_Reading("sglang:max_total_num_tokens", adds_up_over=_RANK),),
            prefix_queried=(_Reading("sglang:prompt_tokens_total"),),
            prefix_hit=(_Reading("sglang:cached_tokens_total", adds_up_over="cache_source"),),
            generated=(_Reading("sglang:generation_tokens_total"),),
        ),
        "tgi": _Dialect(
            path="/metrics",
            running=(_Reading("tgi_batch_current_size"),),
            waiting=(_Reading("tgi_queue_size"),),
            # What the batch may grow to, which TGI sets aside when it takes a request.
            kv_used=(_Reading("tgi_batch_current_max_tokens"),),
            generated=(_Reading("tgi_request_generated_tokens_sum"),),
            json_pages=(JsonPage("/info", from_info),),
        ),
        "tensorrt_llm": _Dialect(
            path="/prometheus/metrics",
            running=(_Reading("trtllm_num_requests_running"),),
            waiting=(_Reading("trtllm_num_requests_waiting"),),
            kv_used_ratio=(_Reading("trtllm_kv_cache_utilization"),),
            kv_capacity=(_Reading("trtllm_kv_cache_max_blocks", times=_Reading("trtllm_kv_cache_tokens_per_block")),),
            prefix_queried=(_Reading("trtllm_prompt_tokens_total"),),
            prefix_hit=(_Reading("trtllm_prompt_cached_tokens_total"),),
            generated=(_Reading("trtllm_generation_tokens_total"),),
        ),
        "tabbyapi": _Dialect(json_pages=(JsonPage("/v1/model", from_model_card),)),
        # Told by `attach_server`, which reads the server's own by the row of what it is.
        ATTACHED_KIND: _Dialect(path="/metrics"),
        # In our words, where its script has a cost.
        "scripted": _Dialect(path="/metrics"),
    }
)


def metrics_path(kind: str, *, may_wake: bool = True) -> str | None:
    """Where an engine of this kind tells its metrics; None: nowhere, or only where the question would wake it."""
    dialect = _DIALECTS.get(kind)
    return None if dialect is None or (dialect.metrics_wake and not may_wake) else dialect.path or None


def json_pages(kind: str) -> tuple[JsonPage, ...]:
    """What an engine of this kind tells beside them."""
    dialect = _DIALECTS.get(kind)
    return dialect.json_pages if dialect else ()


def load_from(kind: str, page: str) -> EngineLoad:
    """What an engine's metrics say.

    Args:
        kind: of the engine; of an unknown one nothing is known.
        page: Prometheus's text format; what is not in it, does not parse, or cannot be, is not known.
    """
    dialect = _DIALECTS.get(kind)
    if dialect is None:
        return EngineLoad()
    places = {
        "running": (*dialect.running, _Reading(OURS.running)),
        "waiting": (*dialect.waiting, _Reading(OURS.waiting)),
        "kv_used_ratio": (*dialect.kv_used_ratio, _Reading(OURS.kv_used_ratio)),
        "kv_used": (*dialect.kv_used, _Reading(OURS.kv_used)),
        "kv_capacity": (*dialect.kv_capacity, _Reading(OURS.kv_capacity)),
        "prefix_queried": (*dialect.prefix_queried, _Reading(OURS.prefix_queried)),
        "prefix_hit": (*dialect.prefix_hit, _Reading(OURS.prefix_hit)),
        "generated": (*dialect.generated, _Reading(OURS.generated)),
    }
    names = {name for readings in places.values() for reading in readings for name in reading.names}
    samples = samples_of(page, names)
    return believed(**{word: _first(samples, readings) for word, readings in places.items()})


def metrics_of(load: EngineLoad) -> Mapping[str, float | None]:
    """The look in our metrics' names."""
    return {
        OURS.running: load.running_count,
        OURS.waiting: load.waiting_count,
        OURS.kv_used_ratio: load.kv_used_ratio,
        OURS.kv_used: load.kv_used_tokens,
        OURS.kv_capacity: load.kv_capacity_tokens,
        OURS.prefix_queried: load.prefix_queried_tokens,
        OURS.prefix_hit: load.prefix_hit_tokens,
        OURS.generated: load.generated_tokens,
    }


def _first(samples: list[Sample], readings: tuple[_Reading, ...]) -> float | None:
    return next((number for reading in readings if (number := _number(samples, reading)) is not None), None)


def _number(samples: list[Sample], reading: _Reading) -> float | None:
    """Processes of one engine that share the work tell the same number each; the largest is the one that is up to date."""
    part_label = reading.adds_up_over or reading.averages_over
    largest: dict[str, float] = {}
    for sample in samples:
        number = _finite(sample.labels.get(reading.label) if reading.label else sample.value) if sample.name == reading.metric else None
        if number is not None and number >= 0:
            part = sample.labels.get(part_label, "")
            largest[part] = max(number, largest.get(part, number))
    if not largest:
        return None
    factor = _number(samples, reading.times) if reading.times else 1.0
    summand = _number(samples, reading.plus) if reading.plus else 0.0
    whole = sum(largest.values()) / (len(largest) if reading.averages_over else 1)
    return None if factor is None or summand is None else _finite(whole * factor + summand)


def _finite(told: str | float | None) -> float | None:
    try:
        number = float(told) if told is not None else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
