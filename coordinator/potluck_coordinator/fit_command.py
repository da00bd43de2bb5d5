"""`potluck fit …`: whether a model runs on given cards, without a pool and without fetching anything.

Decides the flags, how cards are written, and how the answer is shown. It must not know how the answer comes about; `domain.fit` does.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from potluck_coordinator.architectures import known_architecture, known_model_ids
from potluck_coordinator.catalogue_file import CONTEXT_TOKENS_MAX
from potluck_coordinator.domain.fit.architecture import GIB, ModelArchitecture
from potluck_coordinator.domain.fit.card_order import CARDS_LOOKED_AT_MAX
from potluck_coordinator.domain.fit.cards import CARD_MODELS, CardModel, card_model
from potluck_coordinator.domain.fit.config_json import architecture_of_config
from potluck_coordinator.domain.fit.engines import ENGINES, LLAMACPP, VLLM, loads
from potluck_coordinator.domain.fit.fitting import fit
from potluck_coordinator.domain.fit.hardware import (
    PCIE_GENERATION_OF_MEASUREMENTS,
    PCIE_LANES_MAX,
    BoxLink,
    NodeCard,
    NodeHardware,
    NodeProcessor,
)
from potluck_coordinator.domain.fit.quantizations import quantization_named
from potluck_coordinator.domain.fit.report import FitReport, ShapeFit
from potluck_coordinator.offline_command import application, option, refuse
from potluck_protocol.vllm_words import UTILIZATION_PERCENT_MAX

EXIT_DOES_NOT_FIT: Final = 1
CONTEXT_DEFAULT_TOKENS: Final = 4096
SEQUENCES_DEFAULT: Final = 2
"""Two, so that one long answer does not keep everyone else waiting."""
SEQUENCES_MAX: Final = 100_000
"""Beyond this and the bounds that follow nothing is built, and the arithmetic would end in words that help nobody."""
ROUND_TRIP_MS_MAX: Final = 60_000
LAN_GBIT_BOUNDS: Final = (0.001, 10_000)
CPU_GIB_BOUNDS: Final = (0.1, 100_000)
CPU_BANDWIDTH_BOUNDS: Final = (0.1, 100_000)
PCIE_GENERATION_MAX: Final = 7
UTILIZATION_PERCENT_MIN: Final = 10
WEIGHTS_GIB_BOUNDS: Final = (0.001, 100_000)
KV_BYTES: Final = {VLLM: 1.0, LLAMACPP: 34 / 32}
"""Of a key or value in 8 bits: vLLM's FP8; llama.cpp's Q8_0, which has a scale of two bytes for every 32 of them."""
ADOPTED: Final = (
    "Potluck's nodes run llama.cpp on their processors. On cards this is of a llama-server that you start yourself, and share with "
    "potluck node run --attach URL."
)

_CARDS: Final = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9 _-]*?)(?::(?P<count>\d{1,2}))?(?:@(?P<watts>\d{2,4})W?)?", re.IGNORECASE)
_PAIR: Final = re.compile(r"(\d{1,2})-(\d{1,2})")
_CPU: Final = re.compile(r"(?P<gib>\d+(?:\.\d+)?)(?::(?P<bandwidth>\d+(?:\.\d+)?))?")

app = application("fit")


Model = Annotated[str, typer.Argument(help="A model id, a repository's name on the hub, or the path of a config.json.", show_default=False)]
Gpu = Annotated[str | None, option("Cards of the box: rtx3090, rtx3090:4, or rtx3090:2@250W where their power is capped.")]
Nvlink = Annotated[str, option("Pairs with a bridge, counted from 0: 0-1,2-3.")]
Box = Annotated[list[str] | None, option("A further box for a pipeline, written as for --gpu. May be given again.")]
Cpu = Annotated[str | None, option("Instead of cards: memory for engines in GiB, and GB/s of bandwidth: 16:40.")]
Context = Annotated[int, option(f"Tokens of one sequence, prompt and answer together. [{CONTEXT_DEFAULT_TOKENS}]")]
Sequences = Annotated[int, option(f"Sequences at a time. [{SEQUENCES_DEFAULT}]")]
Engine = Annotated[str | None, option(f"{' or '.join(ENGINES)}. [llamacpp for GGUF files and without a card, else vllm]")]
Weights = Annotated[float | None, option("What the weights' files hold, in GiB, where it is known. [by the model's shape]")]
KvBits = Annotated[int, option("Bits of a key or value in the cache: 16 or 8. [16]")]
BatchTokens = Annotated[int | None, option("Prompt tokens that go through the model at a time. [2048; 64 with llama.cpp without a card]")]
Utilization = Annotated[int | None, option("How much of each card vLLM may take, in percent. [95]")]
Quant = Annotated[str | None, option("Weights in another form than the model's own: none, awq, gptq, fp8, int8, Q4_K_M …")]
PcieWidth = Annotated[int, option("PCIe lanes of every card. [16]")]
PcieGeneration = Annotated[int, option("PCIe generation of every slot. [4]")]
PeerToPeer = Annotated[bool, typer.Option("--p2p", help="The driver lets cards reach each other over PCIe; GeForce's own does not.")]
CardGib = Annotated[float | None, option("GiB of each card, where others leave less of it or it has more than usual. [the card's own]")]
RoundTrip = Annotated[float, option("Between boxes, in ms. [0.5]")]
Lan = Annotated[float, option("Between boxes, in Gbit/s. [1]")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.callback()
def answer(  # noqa: PLR0917 - a command's parameters are its flags
    model: Model,
    gpu: Gpu = None,
    nvlink: Nvlink = "",
    box: Box = None,
    cpu: Cpu = None,
    context: Context = CONTEXT_DEFAULT_TOKENS,
    sequences: Sequences = SEQUENCES_DEFAULT,
    engine: Engine = None,
    quant: Quant = None,
    weights_gib: Weights = None,
    kv_bits: KvBits = 16,
    batch_tokens: BatchTokens = None,
    utilization: Utilization = None,
    card_gib: CardGib = None,
    pcie_width: PcieWidth = PCIE_LANES_MAX,
    pcie_generation: PcieGeneration = PCIE_GENERATION_OF_MEASUREMENTS,
    p2p: PeerToPeer = False,
    round_trip_ms: RoundTrip = 0.5,
    lan_gbit: Lan = 1.0,
    as_json: Json = False,
) -> None:
    """Say whether a model runs on some cards, in which shape, how fast, and with which flags. Nothing is fetched or started.

    potluck fit qwen2.5-32b-instruct-awq --gpu rtx3090

    potluck fit llama-3.3-70b-instruct --quant awq --gpu rtx3090:4 --nvlink 0-1,2-3 --context 8192

    potluck fit ./config.json --gpu rtx3090:2 --box rtx3090:2 --lan-gbit 10

    Memory is of the fullest card. KV TOKENS is what the cache holds that the flags make: vLLM fills its cards; llama.cpp, and vLLM without
    a card, hold what --context and --sequences ask for. PREFILL, ONE and ALL are prompt tokens a second, answer tokens a second of one
    sequence, and of as many at a time as the cache holds, for one replica over sequences that are half full. Predictions err by up to
    1.5 GiB a card and by a quarter of each rate, until nodes of a pool have reported what they see. A split over cards that brings less
    than a fifth over a smaller one is refused.

    Exit codes: 0 it fits, 1 it does not, 2 wrong usage.
    """
    try:
        _check("--context", context, 1, CONTEXT_TOKENS_MAX)
        _check("--sequences", sequences, 1, SEQUENCES_MAX)
        _check("--round-trip-ms", round_trip_ms, 0, ROUND_TRIP_MS_MAX)
        _check("--lan-gbit", lan_gbit, *LAN_GBIT_BOUNDS)
        if batch_tokens is not None:
            _check("--batch-tokens", batch_tokens, 1, CONTEXT_TOKENS_MAX)
        if utilization is not None:
            _check("--utilization", utilization, UTILIZATION_PERCENT_MIN, UTILIZATION_PERCENT_MAX)
        boxes = _boxes(gpu, nvlink, box or [], cpu, _Slot(pcie_width, pcie_generation, card_gib, p2p))
        architecture = _architecture(model, quant, weights_gib)
        kind = _engine_for(architecture, boxes, engine)
        architecture = _with_cache_of(architecture, kv_bits, kind)
        report = fit(
            architecture,
            boxes,
            engine_kind=kind,
            context_length_tokens=context,
            sequence_count_wanted=sequences,
            link=BoxLink(round_trip_ms, lan_gbit),
            memory_utilization=None if utilization is None else utilization / 100,
            batch_tokens=batch_tokens,
        )
    except ValueError as error:
        refuse(str(error))
    typer.echo(json.dumps(_plain(report), indent=2) if as_json else _text(report))
    if report.best is None:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def _check(name: str, value: float, least: float, most: float) -> None:
    """Raises ValueError for what is out of bounds, or no number."""
    if not least <= value <= most:
        raise ValueError(f"{name} is from {least:g} to {most:,}")


def _architecture(model: str, quant: str | None, weights_gib: float | None) -> ModelArchitecture:
    path = Path(model)
    if path.suffix == ".json" or path.is_file():
        found = _read_config(path)
    else:
        try:
            found = known_architecture(model)
        except ValueError:
            known = "\n  ".join(known_model_ids())
            raise ValueError(f"no model is known as {model}. Give the path of its config.json, or one of\n  {known}") from None
    if quant is not None:
        found = dataclasses.replace(found, quantization=quantization_named(quant), weight_bytes_of_files=None)
    if weights_gib is None:
        return found
    _check("--weights-gib", weights_gib, *WEIGHTS_GIB_BOUNDS)
    return dataclasses.replace(found, weight_bytes_of_files=int(weights_gib * GIB))


def _with_cache_of(architecture: ModelArchitecture, kv_bits: int, engine_kind: str) -> ModelArchitecture:
    """The model with keys and values of so many bits, as the engine stores them."""
    if kv_bits not in {8, 16}:
        raise ValueError("--kv-bits is 16 or 8")
    return architecture if kv_bits == 16 else dataclasses.replace(architecture, kv_dtype_bytes=KV_BYTES.get(engine_kind, 1.0))


def _read_config(path: Path) -> ModelArchitecture:
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON that can be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a model's config.json")  # noqa: TRY004 - the file is wrong, not the caller
    return architecture_of_config(config, model_id=path.resolve().parent.name)


@dataclasses.dataclass(frozen=True, slots=True)
class _Slot:
    """What is said of all cards alike."""

    pcie_width: int
    pcie_generation: int
    card_gib: float | None
    peer_to_peer: bool

    def card(self, model: CardModel, watts: int | None) -> NodeCard:
        """One card; raises ValueError for what no card has."""
        _check("--pcie-width", self.pcie_width, 1, PCIE_LANES_MAX)
        _check("--pcie-generation", self.pcie_generation, 1, PCIE_GENERATION_MAX)
        usable_bytes = None
        if self.card_gib is not None:
            _check("--card-gib", self.card_gib, *CPU_GIB_BOUNDS)
            if self.card_gib > model.memory_gib:
                model = dataclasses.replace(model, memory_gib=self.card_gib)
            else:
                usable_bytes = int(self.card_gib * GIB)
        return NodeCard(model, usable_bytes, watts, self.pcie_width, self.pcie_generation)

    def box(self, cards: tuple[NodeCard, ...]) -> NodeHardware:
        """The cards of one box."""
        return NodeHardware(cards, pcie_peer_pairs=tuple(combinations(range(len(cards)), 2)) if self.peer_to_peer else ())


def _boxes(gpu: str | None, nvlink: str, further: Sequence[str], cpu: str | None, slot: _Slot) -> tuple[NodeHardware, ...]:
    if (gpu is None) == (cpu is None):
        raise ValueError(f"say what the model is to run on: --gpu with one of {', '.join(CARD_MODELS)}, or --cpu")
    if cpu is not None:
        if nvlink or further or slot.peer_to_peer or slot.card_gib is not None:
            raise ValueError("--nvlink, --box, --p2p and --card-gib go with --gpu")
        return (NodeHardware(processor=_processor(cpu)),)
    boxes = [slot.box(_cards(text, slot)) for text in (gpu or "", *further)]
    first = dataclasses.replace(boxes[0], nvlink_pairs=_pairs(nvlink))
    if nvlink and not first.cards[0].model.nvlink_gb_per_second:
        raise ValueError(f"the {first.cards[0].model.name} has no NVLink")
    return (first, *boxes[1:])


def _cards(text: str, slot: _Slot) -> tuple[NodeCard, ...]:
    match = _CARDS.fullmatch(text.strip())
    found = card_model(match["name"]) if match else None
    if match is None or found is None:
        raise ValueError(f"{text} names no cards; write one such as rtx3090:4, with one of {', '.join(CARD_MODELS)}")
    count = int(match["count"] or 1)
    if not 1 <= count <= CARDS_LOOKED_AT_MAX:
        raise ValueError(f"{text}: the fit looks at 1 to {CARDS_LOOKED_AT_MAX} cards of a box")
    watts = int(match["watts"]) if match["watts"] else None
    return tuple(slot.card(found, watts) for _ in range(count))


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    words = [word for word in text.split(",") if word]
    matches = [_PAIR.fullmatch(word.strip()) for word in words]
    if not all(matches):
        raise ValueError(f"{text} is no list of pairs; write 0-1,2-3")
    return tuple((int(match[1]), int(match[2])) for match in matches if match)


def _processor(text: str) -> NodeProcessor:
    match = _CPU.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text} is no memory; write GiB, or GiB:GB/s such as 16:40")
    memory_gib, bandwidth = float(match["gib"]), float(match["bandwidth"] or 40.0)
    _check("the memory of --cpu", memory_gib, *CPU_GIB_BOUNDS)
    _check("the bandwidth of --cpu", bandwidth, *CPU_BANDWIDTH_BOUNDS)
    return NodeProcessor(int(memory_gib * GIB), bandwidth, core_count=8)


def _engine_for(architecture: ModelArchitecture, boxes: Sequence[NodeHardware], wished: str | None) -> str:
    quantization = architecture.quantization
    kind = wished or (LLAMACPP if quantization.is_gguf or not boxes[0].cards else VLLM)
    if not loads(kind, quantization):
        raise ValueError(
            f"llama.cpp does not load {quantization.name} weights: add --engine vllm, or --quant with a form of GGUF such as Q4_K_M"
        )
    return kind


def _plain(report: FitReport) -> dict[str, Any]:
    """The report as JSON: the answer in short, and everything behind it."""
    shapes = [{"label": entry.shape.label, "total_decode": entry.total_decode} | dataclasses.asdict(entry) for entry in report.shapes]
    return {
        "model": report.architecture.model_id,
        "engine": report.engine_kind,
        "verdict": report.verdict,
        "reason": report.reason,
        "best": None if report.best is None else report.best.shape.label,
        "note": _note(report),
        "shapes": shapes,
    }


def _text(report: FitReport) -> str:
    architecture = report.architecture
    size = f"{architecture.parameter_count / 1e9:.1f} billion weights in {architecture.weight_bytes / GIB:.1f} GiB"
    kind = f"{architecture.quantization.name}, {architecture.sequence_kv_bytes(1) / 1024:.0f} KiB of KV a token"
    lines = [
        f"{architecture.model_id or 'The model'} on {report.engine_kind}: {size} ({kind})",
        f"{report.sequence_count_wanted} sequences of {report.context_length_tokens:,} tokens: {report.verdict}. {report.reason}.",
        "",
        *_table(("SHAPE", "VERDICT", "MEMORY", "KV TOKENS", "PREFILL", "ONE", "ALL"), [_row(entry) for entry in report.shapes]),
    ]
    others = [entry for entry in report.shapes if not entry.runs]
    if others:
        lines += ["", *(f"{entry.shape.label}: {entry.verdict}: {entry.reason}" for entry in others)]
    if report.best is not None:
        flags = report.best.flags
        environment = "".join(f"{key}={value} " for key, value in flags.environment)
        lines += ["", f"Run {report.best.shape.replica_label} with", f"  {environment}{' '.join(flags.arguments)}"]
        if note := _note(report):
            lines.append(note)
    return "\n".join(lines)


def _note(report: FitReport) -> str:
    """What keeps a node from running the answer by itself."""
    best = report.best
    return ADOPTED if best is not None and report.engine_kind == LLAMACPP and best.shape.stages[0].cards else ""


def _row(entry: ShapeFit) -> tuple[str, ...]:
    fullest = min(entry.memory, key=lambda card: card.spare_bytes)
    rates = entry.rates
    return (
        entry.shape.label,
        entry.verdict,
        f"{fullest.needed_bytes / GIB:.1f}±{entry.memory_error_bytes / GIB:.1f}/{fullest.usable_bytes / GIB:.1f} GiB",
        f"{entry.kv_cache_tokens:,}",
        f"{rates.prefill:,.0f}",
        f"{rates.decode_single:,.1f}",
        f"{rates.decode_batched:,.0f} of {rates.batched_sequence_count}",
    )


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they need to be."""
    lines = [tuple(headers), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
