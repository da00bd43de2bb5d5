"""`potluck fit …`: whether a model runs on given cards, without a pool and without fetching anything.

Decides the flags, how cards are written, and how the answer is shown. It must not know how the answer comes about; `domain.fit` does.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer

from potluck_coordinator.architectures import known_architecture, known_model_ids
from potluck_coordinator.domain.fit.architecture import GIB, ModelArchitecture
from potluck_coordinator.domain.fit.cards import CARD_MODELS, card_model
from potluck_coordinator.domain.fit.config_json import architecture_of_config
from potluck_coordinator.domain.fit.engines import ENGINES, LLAMACPP, VLLM
from potluck_coordinator.domain.fit.fitting import fit
from potluck_coordinator.domain.fit.hardware import BoxLink, NodeCard, NodeHardware, NodeProcessor
from potluck_coordinator.domain.fit.quantizations import quantization_named
from potluck_coordinator.domain.fit.report import FitReport, ShapeFit

EXIT_DOES_NOT_FIT: Final = 1
EXIT_USAGE: Final = 2
CONTEXT_DEFAULT_TOKENS: Final = 4096
SEQUENCES_DEFAULT: Final = 2
"""Two, so that one long answer does not keep everyone else waiting."""
CARDS_MAX: Final = 64

_CARDS: Final = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9 _-]*?)(?::(?P<count>\d{1,2}))?(?:@(?P<watts>\d{2,4})W?)?", re.IGNORECASE)
_PAIR: Final = re.compile(r"(\d{1,2})-(\d{1,2})")
_CPU: Final = re.compile(r"(?P<gib>\d+(?:\.\d+)?)(?::(?P<bandwidth>\d+(?:\.\d+)?))?")

app = typer.Typer(
    name="fit",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"allow_interspersed_args": True},
    subcommand_metavar="",
)


def _option(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text, show_default=False)


Model = Annotated[str, typer.Argument(help="A model id, a repository's name on the hub, or the path of a config.json.", show_default=False)]
Gpu = Annotated[str | None, _option("Cards of the box: rtx3090, rtx3090:4, or rtx3090:2@250W where their power is capped.")]
Nvlink = Annotated[str, _option("Pairs with a bridge, counted from 0: 0-1,2-3.")]
Box = Annotated[list[str] | None, _option("A further box for a pipeline, written as for --gpu. May be given again.")]
Cpu = Annotated[str | None, _option("Instead of cards: memory for engines in GiB, and GB/s of bandwidth: 16:40.")]
Context = Annotated[int, _option(f"Tokens of one sequence, prompt and answer together. [{CONTEXT_DEFAULT_TOKENS}]")]
Sequences = Annotated[int, _option(f"Sequences at a time. [{SEQUENCES_DEFAULT}]")]
Engine = Annotated[str | None, _option(f"{' or '.join(ENGINES)}. [llamacpp for GGUF files and without a card, else vllm]")]
Quant = Annotated[str | None, _option("Weights in another form than the model's own: none, awq, gptq, fp8, int8, Q4_K_M …")]
PcieWidth = Annotated[int, _option("PCIe lanes of every card. [16]")]
RoundTrip = Annotated[float, _option("Between boxes, in ms. [0.5]")]
Lan = Annotated[float, _option("Between boxes, in Gbit/s. [1]")]
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
    pcie_width: PcieWidth = 16,
    round_trip_ms: RoundTrip = 0.5,
    lan_gbit: Lan = 1.0,
    as_json: Json = False,
) -> None:
    """Say whether a model runs on some cards, in which shape, how fast, and with which flags. Nothing is fetched or started.

    potluck fit qwen2.5-32b-instruct-awq --gpu rtx3090

    potluck fit llama-3.3-70b-instruct --quant awq --gpu rtx3090:4 --nvlink 0-1,2-3 --context 8192

    potluck fit ./config.json --gpu rtx3090:2 --box rtx3090:2 --lan-gbit 10

    Memory is of the fullest card. KV TOKENS is what the cache holds; PREFILL, ONE and ALL are prompt tokens a second, answer tokens a
    second of one sequence, and of as many at a time as fit, for one replica over sequences that are half full. Predictions err by up to
    1.5 GiB a card and by a quarter of each rate, until nodes of a pool have reported what they see. A split over cards that brings less
    than a fifth over a smaller one is refused.

    Exit codes: 0 it fits, 1 it does not, 2 wrong usage.
    """
    try:
        architecture = _architecture(model, quant)
        boxes = _boxes(gpu, nvlink, box or [], cpu, pcie_width)
        report = fit(
            architecture,
            boxes,
            engine_kind=engine or _engine_for(architecture, boxes),
            context_length_tokens=context,
            sequence_count_wanted=sequences,
            link=BoxLink(round_trip_ms, lan_gbit),
        )
    except ValueError as error:
        _fail(str(error))
    typer.echo(json.dumps(_plain(report), indent=2) if as_json else _text(report))
    if report.best is None:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def _architecture(model: str, quant: str | None) -> ModelArchitecture:
    path = Path(model)
    if path.suffix == ".json" or path.is_file():
        found = _read_config(path)
    else:
        try:
            found = known_architecture(model)
        except ValueError:
            known = "\n  ".join(known_model_ids())
            raise ValueError(f"no model is known as {model}. Give the path of its config.json, or one of\n  {known}") from None
    if quant is None:
        return found
    return dataclasses.replace(found, quantization=quantization_named(quant), weight_bytes_of_files=None)


def _read_config(path: Path) -> ModelArchitecture:
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a model's config.json")  # noqa: TRY004 - the file is wrong, not the caller
    return architecture_of_config(config, model_id=path.resolve().parent.name)


def _boxes(gpu: str | None, nvlink: str, further: Sequence[str], cpu: str | None, pcie_width: int) -> tuple[NodeHardware, ...]:
    if (gpu is None) == (cpu is None):
        raise ValueError(f"say what the model is to run on: --gpu with one of {', '.join(CARD_MODELS)}, or --cpu")
    if cpu is not None:
        if nvlink or further:
            raise ValueError("--nvlink and --box go with --gpu")
        return (NodeHardware(processor=_processor(cpu)),)
    boxes = [NodeHardware(_cards(text, pcie_width)) for text in (gpu or "", *further)]
    first = dataclasses.replace(boxes[0], nvlink_pairs=_pairs(nvlink))
    if nvlink and not first.cards[0].model.nvlink_gb_per_second:
        raise ValueError(f"the {first.cards[0].model.name} has no NVLink")
    return (first, *boxes[1:])


def _cards(text: str, pcie_width: int) -> tuple[NodeCard, ...]:
    match = _CARDS.fullmatch(text.strip())
    found = card_model(match["name"]) if match else None
    if match is None or found is None:
        raise ValueError(f"{text} names no cards; write one such as rtx3090:4, with one of {', '.join(CARD_MODELS)}")
    count = int(match["count"] or 1)
    if not 1 <= count <= CARDS_MAX:
        raise ValueError(f"{text}: a box has 1 to {CARDS_MAX} cards")
    watts = int(match["watts"]) if match["watts"] else None
    return tuple(NodeCard(found, power_limit_watts=watts, pcie_width=pcie_width) for _ in range(count))


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
    return NodeProcessor(int(float(match["gib"]) * GIB), float(match["bandwidth"] or 40.0), core_count=8)


def _engine_for(architecture: ModelArchitecture, boxes: Sequence[NodeHardware]) -> str:
    gguf = architecture.quantization.name.startswith("gguf:")
    return LLAMACPP if gguf or not boxes[0].cards else VLLM


def _plain(report: FitReport) -> dict[str, Any]:
    """The report as JSON: the answer in short, and everything behind it."""
    shapes = [{"label": entry.shape.label, "total_decode": entry.total_decode} | dataclasses.asdict(entry) for entry in report.shapes]
    return {
        "model": report.architecture.model_id,
        "engine": report.engine_kind,
        "verdict": report.verdict,
        "reason": report.reason,
        "best": None if report.best is None else report.best.shape.label,
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
    return "\n".join(lines)


def _row(entry: ShapeFit) -> tuple[str, ...]:
    fullest = min(entry.memory, key=lambda card: card.spare_bytes)
    rates = entry.rates
    return (
        entry.shape.label,
        entry.verdict,
        f"{fullest.needed_bytes / GIB:.1f}±{entry.memory_error_bytes / GIB:.1f}/{fullest.usable_bytes / GIB:.1f} GiB",
        f"{entry.kv_capacity_tokens:,}",
        f"{rates.prefill:,.0f}",
        f"{rates.decode_single:,.1f}",
        f"{rates.decode_batched:,.0f} of {rates.batched_sequence_count}",
    )


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they need to be."""
    lines = [tuple(headers), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    raise typer.Exit(EXIT_USAGE)
