"""What the gateway counts, and under which names it shows it at `/metrics`.

Decides names, labels and buckets. Calls are per HTTP request, answer, ledger commit or scrape, never per token, and no label carries an
account, a key or a request. Calls over gRPC are not counted as requests; their answers are counted, and each call has its line in the log.
It must not know who counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

from potluck_coordinator.domain.hedging import HedgeEnd
from potluck_coordinator.domain.tiers import NO_COMPLIANCE, Compliance
from potluck_protocol.values import ModelId, Usage
from potluck_protocol.version import package_version

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_LATENCY_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_DURATION_SECONDS: Final = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_COMMIT_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


@dataclass(frozen=True, slots=True)
class PoolReading:
    """The pool's position at the moment of a scrape."""

    queued_count_by_model: Mapping[ModelId, int]
    connected_node_count: int
    in_flight_count: int
    refused_request_count: int = 0
    compliance: Compliance = NO_COMPLIANCE


class _OfModel(NamedTuple):
    """What is counted of one model's answers."""

    relayed: Counter
    prompt: Counter
    completion: Counter
    cached_prompt: Counter
    first_token: Histogram


class _Labelled:
    """A registry whose every sample bears one label more, as its collector; for `generate_latest`."""

    def __init__(self, registry: CollectorRegistry, name: str, value: str) -> None:
        self._registry = registry
        self._name = name
        self._value = value

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample._replace(labels={**sample.labels, self._name: self._value}) for sample in metric.samples]
            yield metric


def _task_count() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # whoever reads this has no loop
        return 0


class Metrics:
    """One process's counts, in a registry of its own.

    Args:
        gateway: which of several gateways it is; every sample says so. None: there is but one.
    """

    def __init__(self, gateway: int | None = None) -> None:
        self._registry = CollectorRegistry()
        self._shown: Any = self._registry if gateway is None else _Labelled(self._registry, "gateway", str(gateway))
        self._read_pool: Callable[[], PoolReading] | None = None
        self._by_route: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._by_model: dict[ModelId, _OfModel] = {}
        registry = self._registry
        self._requests = Counter("potluck_requests", "HTTP requests by route and status.", ("endpoint", "status"), registry=registry)
        self._duration = Histogram(
            "potluck_request_duration_seconds",
            "From an HTTP request's arrival to its last byte.",
            ("endpoint",),
            registry=registry,
            buckets=_DURATION_SECONDS,
        )
        self._first_token = Histogram(
            "potluck_request_ttft_seconds",
            "From a request's arrival to the first bytes of its answer.",
            ("model",),
            registry=registry,
            buckets=_LATENCY_SECONDS,
        )
        self._tokens = Counter("potluck_tokens", "Tokens by kind, as engines counted them.", ("kind", "model"), registry=registry)
        self._relayed = Counter("potluck_relayed_bytes", "Bytes of answers handed to clients.", ("model",), registry=registry)
        self._commit = Histogram(
            "potluck_ledger_commit_seconds",
            "How long the directory took for a batch of ledger commands.",
            registry=registry,
            buckets=_COMMIT_SECONDS,
        )
        self._hedges = Counter("potluck_hedges", "Second attempts where a first token was late.", ("end", "model"), registry=registry)
        self._wasted = Counter("potluck_hedge_wasted_tokens", "Of the attempts that lost to another.", ("end", "model"), registry=registry)
        self._queue_depth = Gauge("potluck_queue_depth", "Requests waiting for a slot.", ("model",), registry=registry)
        self._nodes = Gauge("potluck_nodes_connected", "Nodes with a link.", registry=registry)
        self._in_flight = Gauge("potluck_requests_in_flight", "Answers on their way.", registry=registry)
        self._promised = Gauge(
            "potluck_promise_requests", "Requests of the default tier in a window of time.", ("window",), registry=registry
        )
        self._kept = Gauge(
            "potluck_promise_kept_share",
            "Of them, the share whose first token came within the objective.",
            ("window",),
            registry=registry,
        )
        self._refused = Gauge("potluck_requests_refused_for_good", "Requests that killed two engines.", registry=registry)
        tasks = Gauge("potluck_asyncio_tasks", "Tasks of the gateway's loop: a number that only ever grows is a leak.", registry=registry)
        tasks.set_function(_task_count)
        Gauge("potluck_build_info", "The version that runs.", ("version",), registry=registry).labels(package_version()).set(1)

    def watch_pool(self, read: Callable[[], PoolReading]) -> None:
        """Names the function that is asked for the pool's position at every scrape."""
        self._read_pool = read

    def observe_request(self, endpoint: str, status: int, duration_seconds: float) -> None:
        """Counts one HTTP request that is over. `endpoint` is a route's pattern, never a path as it came."""
        known = self._by_route.get((endpoint, status))
        if known is None:
            # As many as there are routes and statuses. To find them by their labels costs more than to count.
            known = self._by_route[endpoint, status] = self._requests.labels(endpoint, str(status)), self._duration.labels(endpoint)
        known[0].inc()
        known[1].observe(duration_seconds)

    def observe_answer(self, model_id: ModelId, usage: Usage | None, relayed_bytes: int, first_token_seconds: float | None) -> None:
        """Counts one answer that is over; `model_id` is one of the catalogue's. None: the engine never said, or no byte came."""
        known = self._by_model.get(model_id)
        if known is None:
            known = self._by_model[model_id] = _OfModel(
                relayed=self._relayed.labels(model_id),
                prompt=self._tokens.labels("prompt", model_id),
                completion=self._tokens.labels("completion", model_id),
                cached_prompt=self._tokens.labels("cached_prompt", model_id),
                first_token=self._first_token.labels(model_id),
            )
        known.relayed.inc(relayed_bytes)
        if usage is not None:
            known.prompt.inc(usage.prompt_token_count)
            known.completion.inc(usage.completion_token_count)
            if usage.cached_prompt_token_count:
                known.cached_prompt.inc(usage.cached_prompt_token_count)
        if first_token_seconds is not None:
            known.first_token.observe(first_token_seconds)

    def observe_hedge(self, model_id: ModelId, end: HedgeEnd, wasted_tokens: float) -> None:
        """Counts one second attempt whose request is over."""
        self._hedges.labels(end, model_id).inc()
        self._wasted.labels(end, model_id).inc(wasted_tokens)

    def observe_ledger_commit_seconds(self, seconds: float) -> None:
        """Counts one commit of ledger commands."""
        self._commit.observe(seconds)

    def render(self) -> bytes:
        """Everything, in Prometheus' text format."""
        if self._read_pool is not None:
            reading = self._read_pool()
            self._queue_depth.clear()
            for model_id, count in reading.queued_count_by_model.items():
                self._queue_depth.labels(model_id).set(count)
            self._nodes.set(reading.connected_node_count)
            self._in_flight.set(reading.in_flight_count)
            self._refused.set(reading.refused_request_count)
            for window, promised in reading.compliance.windows.items():
                self._promised.labels(window).set(promised.count)
                # Of none at all the promise was kept.
                self._kept.labels(window).set(1.0 if promised.share is None else promised.share)
        return generate_latest(self._shown)
