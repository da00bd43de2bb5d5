"""`python -m tests.benchmarks.fit_constants`: how well the fit's constants predict what they were not fitted to.

For each source of `tests/fixtures/fit_cases.toml` in turn: the constants are fitted to the rates of all others, and predict its own. A
constant that only its own source knows is left at what it was, and the source's line says so. Decides how constants are fitted: by the
sum of the logarithms' sizes, which one wild row does not move far, one constant after the other in steps of 8 % down to 1 %. Nothing is
written. It takes some minutes.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import exp, log
from statistics import median
from typing import Final
from unittest.mock import patch

from potluck_coordinator.domain.fit import engines, rates, stage_speed
from potluck_coordinator.domain.fit.cards import Memory
from potluck_coordinator.domain.fit.engines import LLAMACPP, VLLM
from potluck_coordinator.domain.fit.hardware import BoxLink
from potluck_coordinator.domain.fit.interconnect import HOST_STAGED_STEP_SECONDS, Link
from potluck_coordinator.domain.fit.load import Load
from potluck_coordinator.domain.fit.shapes import Shape
from tests.unit.test_fit_cases import CASES, RATE_TOLERANCE_SHARE, Case, rows_of

STEPS: Final = (1.08, 1.04, 1.02, 1.01)
GLOBALS: Final = {
    "LAYER_CYCLES": (stage_speed, engines.LAYER_CYCLES),
    "VLLM_MATMUL_SHARE_HALVED": (engines, engines.VLLM_MATMUL_SHARE_HALVED),
    "LLAMACPP_TFLOPS_PER_SM_GHZ": (engines, engines.LLAMACPP_TFLOPS_PER_SM_GHZ),
    "LLAMACPP_TFLOPS_PER_WATT_MAX": (engines, engines.LLAMACPP_TFLOPS_PER_WATT_MAX),
    "LLAMACPP_TFLOPS_PER_SM_GHZ_HBM": (engines, engines.LLAMACPP_TFLOPS_PER_SM_GHZ_HBM),
    "LLAMACPP_HALF_TFLOPS_PER_SM_GHZ": (engines, engines.LLAMACPP_HALF_TFLOPS_PER_SM_GHZ),
    "LLAMACPP_HALF_TFLOPS_PER_WATT_MAX": (engines, engines.LLAMACPP_HALF_TFLOPS_PER_WATT_MAX),
    "LLAMACPP_HALF_TFLOPS_PER_SM_GHZ_HBM": (engines, engines.LLAMACPP_HALF_TFLOPS_PER_SM_GHZ_HBM),
    "EXPERT_FILL_TOKENS": (rates, rates.EXPERT_FILL_TOKENS),
    "EXPERT_FILL_MIN": (rates, rates.EXPERT_FILL_MIN),
    "EXPERT_FILL_MAX": (rates, rates.EXPERT_FILL_MAX),
}
SHARES: Final = {
    f"{kind} {memory}": (kind, memory, engines.traits_of(kind).bandwidth_share[memory])
    for kind in (VLLM, LLAMACPP)
    for memory in (Memory.GDDR, Memory.HBM)
}
HOST_STEP: Final = "HOST_STAGED_STEP_SECONDS"
NOW: Final = (
    {name: float(value) for name, (_, value) in GLOBALS.items()}
    | {name: value for name, (*_, value) in SHARES.items()}
    | {HOST_STEP: HOST_STAGED_STEP_SECONDS}
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One published rate."""

    source: str
    label: str
    case: Case
    field: str
    published: float

    def error(self, constants: Mapping[str, float]) -> float:
        """The logarithm of predicted to published, with the constants in force."""
        case = self.case
        share = {memory: constants[f"{case.traits.kind} {memory}"] for memory in (Memory.GDDR, Memory.HBM)} | {Memory.HOST: 0.5}
        load = Load(replace(case.traits, bandwidth_share=share), case.load.context_length_tokens, case.row.sequences)
        shape = _with_step(case.answer.shape, constants[HOST_STEP])
        found = rates.rates_of(case.architecture, shape, load, case.row.sequences, BoxLink())
        return log(getattr(found, self.field) / self.published)


def _with_step(shape: Shape, seconds: float) -> Shape:
    linked = (
        replace(stage, link=replace(stage.link, step_seconds=seconds)) if stage.link.kind is Link.HOST else stage for stage in shape.stages
    )
    return replace(shape, stages=tuple(linked))


@contextmanager
def in_force(constants: Mapping[str, float]) -> Iterator[None]:
    """The modules' own constants are these for a while."""
    with ExitStack() as stack:
        for name, (module, _) in GLOBALS.items():
            stack.enter_context(patch.object(module, name, constants[name]))
        yield


def measured() -> list[Measured]:
    """Every rate of the table's rows, those of sources that share an address together."""
    urls = [source["url"] for source in CASES["source"] for _ in source["rows"]]
    found = []
    for url, row in zip(urls, rows_of("source"), strict=True):
        for field, published in (("decode_single", row.decode), ("decode_batched", row.decode_total), ("prefill", row.prefill)):
            if published is not None:
                found.append(Measured(url, row.label, Case(row), field, published))
    return found


def errors(rows: Sequence[Measured], constants: Mapping[str, float]) -> list[float]:
    """Of each row."""
    with in_force(constants):
        return [row.error(constants) for row in rows]


def fitted(rows: Sequence[Measured]) -> tuple[dict[str, float], set[str]]:
    """The constants that these rows want, and those of which none of them says anything."""
    constants = dict(NOW)
    best, silent = sum(map(abs, errors(rows, constants))), set()
    for step in STEPS:
        moved = True
        while moved:
            moved = False
            for name in NOW:
                tries = [{**constants, name: constants[name] * factor} for factor in (step, 1 / step)]
                losses = [sum(map(abs, errors(rows, tried))) for tried in tries]
                if all(abs(loss - best) < 1e-9 for loss in losses):
                    silent.add(name)
                elif min(losses) < best - 1e-6:
                    best = min(losses)
                    constants, moved = tries[losses.index(best)], True
    return constants, silent


def report(rows: Sequence[Measured], sources: Sequence[str]) -> Iterator[str]:
    """A line for each source, and one for all of them together."""
    every: list[float] = []
    shipped = errors(rows, NOW)
    yield f"{len(rows)} rates; with the constants as shipped: {_summary(shipped)}"
    for source in sources:
        own = [row for row in rows if row.source == source]
        constants, silent = fitted([row for row in rows if row.source != source])
        found = errors(own, constants)
        every += found
        # What stays unknown without the source, though the source speaks of it.
        alone = {name for name in silent if errors(own, {**constants, name: constants[name] * STEPS[0]}) != found}
        words = f"; left as shipped: {', '.join(sorted(alone))}" if alone else ""
        yield f"{source}: {_summary(found)}{words}"
    yield f"all, each predicted without its own source: {_summary(every)}"


def _summary(found: Sequence[float]) -> str:
    off = [abs(exp(error) - 1) for error in found]
    beyond = sum(error > RATE_TOLERANCE_SHARE for error in off)
    return f"{len(off)} rates, median {100 * median(off):.0f} % off, most {100 * max(off):.0f} %, {beyond} beyond 25 %"


def main() -> None:
    argparse.ArgumentParser(prog="tests.benchmarks.fit_constants", description=__doc__).parse_args()
    rows = measured()
    counts: defaultdict[str, int] = defaultdict(int)
    for row in rows:
        counts[row.source] += 1
    for line in report(rows, sorted(counts, key=lambda source: -counts[source])):
        print(line, flush=True)


if __name__ == "__main__":
    main()
