"""Holds the fit against `tests/fixtures/fit_cases.toml`: what others measured on real cards, every row of it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from potluck_coordinator.architectures import known_architecture
from potluck_coordinator.domain.fit.architecture import GIB, ModelArchitecture
from potluck_coordinator.domain.fit.cards import CARD_MODELS
from potluck_coordinator.domain.fit.engines import EngineTraits, traits_of
from potluck_coordinator.domain.fit.fitting import fit
from potluck_coordinator.domain.fit.hardware import BoxLink, NodeCard, NodeHardware
from potluck_coordinator.domain.fit.interconnect import all_reduce_seconds
from potluck_coordinator.domain.fit.load import Load
from potluck_coordinator.domain.fit.memory import CardMemory, shape_memory
from potluck_coordinator.domain.fit.quantizations import quantization_named
from potluck_coordinator.domain.fit.rates import rates_of
from potluck_coordinator.domain.fit.report import ShapeFit, Verdict, judge, memory_error_bytes
from potluck_coordinator.fit_command import app

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
        verdict, _ = judge(replace(self.architecture, context_length_max_tokens=2**24), self.load, self.memory, band)
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


def words_of(row: Row, folder: Path) -> list[str]:
    """The row as one types it after `potluck fit`; a model of the table's own becomes a config.json in the folder."""
    known = CASES["models"].get(row.model)
    model = row.model if known is None else str(_config_file(row.model, known, folder))
    card = f"{row.card}:{row.count or row.tensor_parallel * row.stages}" + (f"@{row.watts}W" if row.watts else "")
    told = {
        "--engine": row.engine,
        "--context": row.context,
        "--sequences": row.sequences,
        "--quant": row.quant,
        "--weights-gib": None if row.weight_bytes is None else row.weight_bytes / GIB,
        "--kv-bits": None if row.kv_dtype_bytes == 2 else round(8 * row.kv_dtype_bytes),
        "--batch-tokens": row.batch_tokens,
        "--utilization": None if row.utilization is None else round(100 * row.utilization),
        "--card-gib": row.memory_gib,
        "--pcie-width": row.pcie_width,
        "--nvlink": ",".join(f"{first}-{second}" for first, second in row.nvlink),
    }
    words = (word for name, value in told.items() if value not in {None, ""} for word in (name, str(value)))
    return [model, "--gpu", card, *words, "--json"]


def _config_file(name: str, known: dict[str, Any], folder: Path) -> Path:
    """The numbers under the names that repositories have for them."""
    keys = (
        *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("intermediate_size", "vocab_size", "max_position_embeddings"),
    )
    config = dict(zip(keys, known["numbers"], strict=True))
    if "expert_count" in known:
        config |= {"num_experts": known["expert_count"], "num_experts_per_tok": known["experts_per_token"]}
        config["moe_intermediate_size"] = config["intermediate_size"]
    linear, sliding = known.get("linear_attention_layer_count", 0), known.get("sliding_layer_count", 0)
    kinds = [*["linear_attention"] * linear, *["sliding_attention"] * sliding]
    config["layer_types"] = kinds + ["full_attention"] * (known["numbers"][0] - len(kinds))
    config["sliding_window"] = known.get("sliding_window_tokens") or None
    path = folder / name / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(config))
    return path


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


@pytest.mark.parametrize("row", rows_of("source"), ids=lambda row: row.label)
def test_a_row_can_be_asked_of_the_command_line(row: Row, tmp_path: Path) -> None:
    case = Case(row)
    report = json.loads(CliRunner().invoke(app, words_of(row, tmp_path)).stdout)
    shape = next(
        shape
        for shape in report["shapes"]
        if len(shape["shape"]["stages"]) == row.stages and len(shape["shape"]["stages"][0]["cards"]) == row.tensor_parallel
    )
    assert shape["rates"]["decode_single"] == pytest.approx(case.rates.decode_single, rel=0.01)
    assert shape["rates"]["prefill"] == pytest.approx(case.rates.prefill, rel=0.01)
    needed = [card["weight_bytes"] + card["overhead_bytes"] + card["kv_wanted_bytes"] for card in shape["memory"]]
    assert needed == [pytest.approx(card.needed_bytes, rel=0.01) for card in case.memory]


def test_every_miss_says_what_contradicts_it() -> None:
    assert {outlier["kind"] for outlier in CASES["outlier"]} == {"contradicted", "superseded"}
    assert all(outlier["url"] and outlier["why"] for outlier in CASES["outlier"])
    # No more than there were when each was looked at: of 270 rates that were published, and beside them.
    assert len(rows_of("outlier")) <= 13


@pytest.mark.parametrize("order", CASES["order"], ids=lambda order: order["name"])
def test_of_two_shapes_the_one_that_was_faster_comes_out_faster(order: dict[str, Any]) -> None:
    given = {"engine": "vllm"} | {key: order[key] for key in ("model", "quant", "context")}
    faster, slower = (Case(msgspec.convert(given | order[name], Row)) for name in ("faster", "slower"))
    if order.get("in_total", False):
        assert faster.answer.total_decode > slower.answer.total_decode
    else:
        assert faster.rates.decode_single > slower.rates.decode_single


def test_a_published_rate_is_too_high_for_a_ring_so_slow_that_a_pair_would_beat_four_cards_with_a_70b() -> None:
    """club-3090 issue 1028, four RTX 3090 without peer-to-peer: were layers free and memory as fast as its label, what were left?"""
    published = Case(next(row for row in rows_of("source") if row.model == "qwen3.8-27b" and row.quant == "fp8"))
    reading = published.architecture.weight_bytes / 4 / (CARD_MODELS["rtx3090"].bandwidth_gb_per_second * 1e9)
    ring_seconds_max = (1 / (published.row.decode or 0) - reading) / (2 * published.architecture.layer_count)
    given = {"engine": "vllm", "model": "llama-3-70b-instruct-awq", "context": 4096, "card": "rtx3090", "count": 4}
    pair, four = (
        Case(msgspec.convert(given | {"nvlink": [[0, 1], [2, 3]], "tensor_parallel": count}, Row)).rates.decode_single for count in (2, 4)
    )
    ring = all_reduce_seconds(published.answer.shape.stages[0].link, 4, 2 * 8192)
    ring_seconds_where_the_pair_wins = ring + (1 / pair - 1 / four) / (2 * 80)
    assert ring < ring_seconds_max < ring_seconds_where_the_pair_wins


def test_the_table_is_as_long_as_was_promised_and_begins_with_the_card_of_most_nodes() -> None:
    rows = rows_of("source")
    assert len(rows) >= 25
    assert rows[0].card == "rtx3090"
    assert sum(row.card == "rtx3090" for row in rows) >= 25
    assert sum(not row.runs for row in rows) >= 10
    assert all(source["url"] and source["says"] for source in CASES["source"])
