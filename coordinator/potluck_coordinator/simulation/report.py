"""Figures as people read them: a table with a line for each policy.

Decides the columns and their words. Several seeds of the same become one line, with the mean of each figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Final

from potluck_coordinator.simulation.figures import Figures
from potluck_coordinator.simulation.runs import Result

_Cell = Callable[[Figures], float | None]
COLUMNS: Final[tuple[tuple[str, str, _Cell], ...]] = (
    ("ASKED", "{:,.0f}", lambda figures: figures.asked_count),
    ("SERVED", "{:,.0f}", lambda figures: figures.served_count),
    ("REFUSED", "{:,.0f}", lambda figures: figures.refused_count),
    ("TOO LONG", "{:,.0f}", lambda figures: figures.too_long_count),
    ("FAILED", "{:,.0f}", lambda figures: figures.failed_count + figures.left_count),
    ("GOOD/S", "{:,.3f}", lambda figures: figures.goodput_per_second),
    ("FIRST P50", "{:.2f} s", lambda figures: figures.first_token_seconds.p50),
    ("P95", "{:.2f} s", lambda figures: figures.first_token_seconds.p95),
    ("TOKEN P95", "{:.0f} ms", lambda figures: _ms(figures.token_seconds.p95)),
    ("CACHED", "{:.0%}", lambda figures: figures.cached_share),
    ("UP", "{:.1%}", lambda figures: figures.uptime_share),
    ("DEATHS", "{:,.0f}", lambda figures: figures.engine_death_count),
    ("THROTTLED", "{:,.0f} s", lambda figures: figures.throttled_seconds),
    ("HOTTEST", "{:.1f} C", lambda figures: figures.celsius_max),
    ("BREAKS", "{:,.0f}", lambda figures: sum(figures.break_counts.values())),
)
NOTHING: Final = "-"


def table(results: Sequence[Result]) -> list[str]:
    """The lines of it, with what was found broken below."""
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[Figures]] = {}
    for result in results:
        groups.setdefault((result.run.policy, result.run.changes), []).append(result.figures)
    changed = [key for key, _ in results[0].run.changes]
    header = [*(key.upper() for key in changed), "POLICY", *(name for name, _, _ in COLUMNS)]
    rows = [header]
    for (policy, changes), figures in sorted(groups.items(), key=lambda item: item[0][1]):
        rows.append([*(value for _, value in changes), policy, *(_cell(words, of, figures) for _, words, of in COLUMNS)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    left = len(changed) + 1
    lines = ["  ".join(_padded(cell, widths[place], left=place < left) for place, cell in enumerate(row)).rstrip() for row in rows]
    return [*lines, *_breaks(results)]


def _cell(words: str, of: _Cell, figures: Sequence[Figures]) -> str:
    values = [value for each in figures if (value := of(each)) is not None]
    return words.format(fmean(values)) if values else NOTHING


def _padded(cell: str, width: int, *, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def _breaks(results: Sequence[Result]) -> list[str]:
    lines = [""]
    for result in results:
        lines += [f"{result.run.policy}, seed {result.run.seed}: {words}" for words in result.figures.breaks]
    return lines if len(lines) > 1 else []


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000
