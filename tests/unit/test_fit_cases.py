"""Holds the fit against `tests/fixtures/fit_cases.toml`: what others measured on real cards, every row of it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from potluck_coordinator.architectures import known_architecture
from potluck_coordinator.domain.fit.architecture import GIB, ModelArchitecture
from potluck_coordinator.domain.fit.cards import CARD_MODELS
from potluck_coordinator.domain.fit.engines import EngineTraits, traits_of
from potluck_coordinator.domain.fit.fitting import fit
from potluck_coordinator.domain.fit.hardware import BoxLink, NodeCard, NodeHardware
from potluck_coordinator.domain.fit.load import Load
from potluck_coordinator.domain.fit.memory import CardMemory, shape_memory
from potluck_coordinator.domain.fit.quantizations import quantization_named
from potluck_coordinator.domain.fit.rates import rates_of
from potluck_coordinator.domain.fit.report import ShapeFit, Verdict, judge, memory_error_bytes

RATE_TOLERANCE_SHARE = 0.25
MEMORY_TOLERANCE_GIB = 1.5
MEMORY_TOLERANCE_SHARE = 0.1
NUMBERS = (
    "layer_count",
    "hidden_size",
    "attention_head_count",
    "kv_head_count",
    "head_dim",
    "intermediate_size",
    "vocabulary_size",
    "context_length_max_tokens",
)
CASES: dict[str, Any] = tomllib.loads((Path(__file__).parents[1] / "fixtures" / "fit_cases.toml").read_text())


class Row(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """One published case."""

    engine: str
    context: int
    model: str
    card: str
    quant: str | None = None
    weight_bytes: int | None = None
    kv_dtype_bytes: float = 2.0
    count: int = 0
    stages: int = 1
    tensor_parallel: int = 1
    nvlink: tuple[tuple[int, int], ...] = ()
    pcie_width: int = 16
    watts: int | None = None
    memory_gib: float | None = None
    sequences: int = 1
    batch_tokens: int | None = None
    utilization: float | None = None
    runs: bool = True
    weights_gib: float | None = None
    kv_gib: float | None = None
    room_gib: float | None = None
    needed_gib: float | None = None
    decode: float | None = None
    decode_total: float | None = None
    prefill: float | None = None

    @property
    def label(self) -> str:
        """For the test's report."""
        words = (self.model, self.quant, f"{self.tensor_parallel * self.stages}x{self.card}", self.engine, self.context, self.batch_tokens)
        return " ".join(str(word) for word in (*words, f"{self.watts} W" if self.watts else None) if word is not None)


class Case:
    """The fit's answer to a row: for the shape that the publisher ran, whether or not the fit would choose it."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.architecture = _architecture(row)
        self.traits = _traits(row)
        self.load = Load(self.traits, row.context, row.sequences)
        self.answer = self._answer()
        self.memory = shape_memory(self.architecture, self.answer.shape, self.load)
        self.rates = rates_of(self.architecture, self.answer.shape, self.load, row.sequences, BoxLink())

    @property
    def runs(self) -> bool:
        """By the memory of the publisher's engine settings; a shape that loses to another runs too."""
        band = memory_error_bytes(self.memory, trusted=False)
        verdict, _ = judge(replace(self.architecture, context_length_max_tokens=10**9), self.load, self.memory, band)
        return verdict is not Verdict.DOES_NOT_FIT

    @property
    def fullest(self) -> CardMemory:
        """The card that decides."""
        return min(self.memory, key=lambda card: card.spare_bytes)

    def memory_gib(self) -> Iterator[tuple[str, float, float]]:
        """What was published of memory, and what the fit says, in GiB."""
        row, kv_bytes = self.row, self.row.sequences * self.architecture.sequence_kv_bytes(self.row.context)
        for name, published, predicted in (
            ("weights", row.weights_gib, self.architecture.weight_bytes),
            ("KV", row.kv_gib, kv_bytes),
            ("room for KV", row.room_gib, self.fullest.kv_available_bytes),
            ("needed", row.needed_gib, self.fullest.needed_bytes),
        ):
            if published is not None:
                yield name, published, predicted / GIB

    def tokens_per_second(self) -> Iterator[tuple[str, float, float]]:
        """What was published of rates, and what the fit says."""
        row = self.row
        for name, published, predicted in (
            ("one answer", row.decode, self.rates.decode_single),
            ("all answers", row.decode_total, self.rates.decode_batched),
            ("prompts", row.prefill, self.rates.prefill),
        ):
            if published is not None:
                yield name, published, predicted

    def _answer(self) -> ShapeFit:
        row = self.row
        card = CARD_MODELS[row.card]
        model = card if row.memory_gib is None else replace(card, memory_gib=row.memory_gib)
        node_card = NodeCard(model, pcie_width=row.pcie_width, power_limit_watts=row.watts)
        box = NodeHardware((node_card,) * (row.count or row.tensor_parallel * row.stages), nvlink_pairs=row.nvlink)
        report = fit(
            self.architecture,
            [box],
            engine_kind=row.engine,
            context_length_tokens=row.context,
            sequence_count_wanted=row.sequences,
            memory_utilization=row.utilization,
        )
        return next(
            answer
            for answer in report.shapes
            if answer.shape.tensor_parallel == row.tensor_parallel and len(answer.shape.stages) == row.stages
        )


def _architecture(row: Row) -> ModelArchitecture:
    known: dict[str, Any] = CASES["models"].get(row.model, {})
    rest = {key: value for key, value in known.items() if key != "numbers"}
    numbers = dict(zip(NUMBERS, known.get("numbers", ()), strict=bool(known)))
    found = ModelArchitecture(row.model, **numbers, **rest) if known else known_architecture(row.model)
    if row.quant is not None:
        found = replace(found, quantization=quantization_named(row.quant), weight_bytes_of_files=None)
    return replace(found, weight_bytes_of_files=row.weight_bytes or found.weight_bytes_of_files, kv_dtype_bytes=row.kv_dtype_bytes)


def _traits(row: Row) -> EngineTraits:
    traits = traits_of(row.engine)
    return replace(
        traits,
        batch_tokens=row.batch_tokens or traits.batch_tokens,
        memory_utilization=row.utilization or traits.memory_utilization,
    )


def rows_of(section: str) -> list[Row]:
    """All rows of a section, with what their source says once for all of them."""
    given = [
        {"engine": source["engine"], "context": source["context"]} | source.get("defaults", {}) | row
        for source in CASES[section]
        for row in source["rows"]
    ]
    return [msgspec.convert(row, Row) for row in given]


def misses(case: Case) -> list[str]:
    """Rates that are off by more than a quarter."""
    return [
        f"{name}: published {published}, predicted {predicted:.1f}"
        for name, published, predicted in case.tokens_per_second()
        if abs(predicted / published - 1) > RATE_TOLERANCE_SHARE
    ]


@pytest.mark.parametrize("row", rows_of("source"), ids=lambda row: row.label)
def test_a_published_case_comes_out_as_published(row: Row) -> None:
    case = Case(row)
    assert case.runs == row.runs, f"the fullest card: {case.fullest}"
    for name, published, predicted in case.memory_gib():
        tolerance = min(MEMORY_TOLERANCE_GIB, 0.25 + MEMORY_TOLERANCE_SHARE * published)
        assert abs(predicted - published) <= tolerance, f"{name}: published {published} GiB, predicted {predicted:.2f}"
    assert misses(case) == []


@pytest.mark.parametrize("row", rows_of("outlier"), ids=lambda row: row.label)
def test_an_outlier_is_missed_as_the_table_says(row: Row) -> None:
    assert misses(Case(row)) != []


@pytest.mark.parametrize("order", CASES["order"], ids=lambda order: order["name"])
def test_of_two_shapes_the_one_that_was_faster_comes_out_faster(order: dict[str, Any]) -> None:
    given = {"engine": "vllm"} | {key: order[key] for key in ("model", "quant", "context")}
    faster, slower = (Case(msgspec.convert(given | order[name], Row)) for name in ("faster", "slower"))
    if order.get("in_total", False):
        assert faster.answer.total_decode > slower.answer.total_decode
    else:
        assert faster.rates.decode_single > slower.rates.decode_single


def test_the_table_is_as_long_as_was_promised_and_begins_with_the_card_of_most_nodes() -> None:
    rows = rows_of("source")
    assert len(rows) >= 25
    assert rows[0].card == "rtx3090"
    assert sum(row.card == "rtx3090" for row in rows) >= 25
    assert sum(not row.runs for row in rows) >= 10
    assert all(source["url"] and source["says"] for source in CASES["source"])
