"""What engines say of themselves, in our words: one table from each engine's metrics to them.

Decides which metric of which engine means what. Where an engine does not tell, there is None, which is not 0. It must not know who asks,
nor what for. vLLM's names are those that version 0.32 was seen to use; the others' are those of their documentation (llama.cpp, SGLang
0.5, Text Generation Inference 3, TensorRT-LLM 1.3), and were not tried. Ollama and TabbyAPI have no metrics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from potluck_node.engines.base import EngineAddress

ASKING_SECONDS_MAX: Final = 2.0
METRICS_BYTES_MAX: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """One look at an engine."""

    running_count: int | None = None
    """Requests that it computes."""
    waiting_count: int | None = None
    """Requests that it has taken and not begun."""
    kv_used_ratio: float | None = None
    """How full the cache of keys and values is, 0 to 1."""
    kv_capacity_tokens: int | None = None
    prefix_queried_tokens: int | None = None
    """Prompt tokens that were looked up in the cache since the engine started."""
    prefix_hit_tokens: int | None = None
    """Those of them that were there."""

    @property
    def kv_used_tokens(self) -> int | None:
        """How much of the capacity is used."""
        if self.kv_used_ratio is None or self.kv_capacity_tokens is None:
            return None
        return round(self.kv_used_ratio * self.kv_capacity_tokens)


@dataclass(frozen=True, slots=True)
class _Reading:
    """Where a number stands: a metric's value, or one of its labels; with a second one, their product."""

    metric: str
    label: str = ""
    times: _Reading | None = None


@dataclass(frozen=True, slots=True)
class _Dialect:
    """One engine's metrics. Of several readings of one thing the first that is there counts."""

    path: str
    running: tuple[_Reading, ...] = ()
    waiting: tuple[_Reading, ...] = ()
    kv_used_ratio: tuple[_Reading, ...] = ()
    kv_capacity: tuple[_Reading, ...] = ()
    prefix_queried: tuple[_Reading, ...] = ()
    prefix_hit: tuple[_Reading, ...] = ()

    @property
    def readings(self) -> tuple[_Reading, ...]:
        """All of them."""
        return (*self.running, *self.waiting, *self.kv_used_ratio, *self.kv_capacity, *self.prefix_queried, *self.prefix_hit)


_VLLM_CACHE: Final = "vllm:cache_config_info"
_BLOCK: Final = _Reading(_VLLM_CACHE, "block_size")
_DIALECTS: Final[Mapping[str, _Dialect]] = MappingProxyType(
    {
        "vllm": _Dialect(
            path="/metrics",
            running=(_Reading("vllm:num_requests_running"),),
            waiting=(_Reading("vllm:num_requests_waiting"),),
            kv_used_ratio=(_Reading("vllm:kv_cache_usage_perc"),),
            # Not every layer of a model keeps every token; then blocks times their size is not it.
            kv_capacity=(_Reading(_VLLM_CACHE, "kv_cache_size_tokens"), _Reading(_VLLM_CACHE, "num_gpu_blocks", times=_BLOCK)),
            prefix_queried=(_Reading("vllm:prefix_cache_queries_total"),),
            prefix_hit=(_Reading("vllm:prefix_cache_hits_total"),),
        ),
        "llamacpp": _Dialect(
            path="/metrics",
            running=(_Reading("llamacpp:requests_processing"),),
            waiting=(_Reading("llamacpp:requests_deferred"),),
            kv_used_ratio=(_Reading("llamacpp:kv_cache_usage_ratio"),),
        ),
        "sglang": _Dialect(
            path="/metrics",
            running=(_Reading("sglang:num_running_reqs"),),
            waiting=(_Reading("sglang:num_queue_reqs"),),
            kv_used_ratio=(_Reading("sglang:token_usage"),),
            kv_capacity=(_Reading("sglang:max_total_num_tokens"),),
            prefix_queried=(_Reading("sglang:prompt_tokens_total"),),
            prefix_hit=(_Reading("sglang:cached_tokens_total"),),
        ),
        "tgi": _Dialect(
            path="/metrics",
            running=(_Reading("tgi_batch_current_size"),),
            waiting=(_Reading("tgi_queue_size"),),
        ),
        "tensorrt_llm": _Dialect(
            path="/prometheus/metrics",
            running=(_Reading("trtllm_num_requests_running"),),
            waiting=(_Reading("trtllm_num_requests_waiting"),),
            kv_used_ratio=(_Reading("trtllm_kv_cache_utilization"),),
            kv_capacity=(_Reading("trtllm_kv_cache_max_blocks", times=_Reading("trtllm_kv_cache_tokens_per_block")),),
            prefix_queried=(_Reading("trtllm_prompt_tokens_total"),),
            prefix_hit=(_Reading("trtllm_prompt_cached_tokens_total"),),
        ),
    }
)


def metrics_path(kind: str) -> str | None:
    """Where an engine of this kind tells its metrics; None: nowhere."""
    dialect = _DIALECTS.get(kind)
    return dialect.path if dialect else None


def load_from(kind: str, text: str) -> EngineLoad:
    """What an engine's metrics say.

    Args:
        kind: of the engine; of an unknown one nothing is known.
        text: Prometheus's text format; what is not in it, or does not parse, is not known.
    """
    dialect = _DIALECTS.get(kind)
    if dialect is None:
        return EngineLoad()
    samples = _samples(dialect, text)
    ratio = _first(samples, dialect.kv_used_ratio)
    return EngineLoad(
        running_count=_whole(_first(samples, dialect.running)),
        waiting_count=_whole(_first(samples, dialect.waiting)),
        kv_used_ratio=None if ratio is None else min(1.0, max(0.0, ratio)),
        kv_capacity_tokens=_whole(_first(samples, dialect.kv_capacity)),
        prefix_queried_tokens=_whole(_first(samples, dialect.prefix_queried)),
        prefix_hit_tokens=_whole(_first(samples, dialect.prefix_hit)),
    )


async def ask_load(session: aiohttp.ClientSession, kind: str, address: EngineAddress) -> EngineLoad:
    """Asks an engine; of one that does not answer in time nothing is known."""
    path = metrics_path(kind)
    if path is None:
        return EngineLoad()
    limit = aiohttp.ClientTimeout(total=ASKING_SECONDS_MAX)
    try:
        async with session.get(address.url + path, headers=address.headers, timeout=limit) as response:
            body = await response.content.read(METRICS_BYTES_MAX) if response.status == 200 else b""
    except (aiohttp.ClientError, TimeoutError):
        body = b""
    return load_from(kind, body.decode(errors="replace"))


def _samples(dialect: _Dialect, text: str) -> list[Sample]:
    metrics = {reading.metric for each in dialect.readings for reading in (each, each.times) if reading}
    # Engines tell thousands of lines of histograms; to parse those too takes a hundred times as long.
    told = "\n".join(line for line in text.splitlines() if line.partition("{")[0].partition(" ")[0] in metrics)
    try:
        return [sample for family in text_string_to_metric_families(told + "\n") for sample in family.samples]
    except ValueError:
        return []


def _first(samples: list[Sample], readings: tuple[_Reading, ...]) -> float | None:
    return next((number for reading in readings if (number := _number(samples, reading)) is not None), None)


def _number(samples: list[Sample], reading: _Reading) -> float | None:
    """Processes of one engine that share the work tell the same number each; the largest is the one that is up to date."""
    found = [
        number
        for sample in samples
        if sample.name == reading.metric
        if (number := _finite(sample.labels.get(reading.label) if reading.label else sample.value)) is not None
    ]
    if not found:
        return None
    if reading.times is None:
        return max(found)
    factor = _number(samples, reading.times)
    return None if factor is None else max(found) * factor


def _finite(told: str | float | None) -> float | None:
    try:
        number = float(told) if told is not None else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _whole(number: float | None) -> int | None:
    return None if number is None else max(0, round(number))
