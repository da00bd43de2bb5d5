"""The figures as a picture.

Decides what is drawn. It must not know how anything was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from tests.benchmarks.arithmetic import estimate
from tests.benchmarks.marks import ENGINE, OURS, Rounds
from tests.benchmarks.outcome import Outcome

_DOT: Final = "#7a7a7a"
_OUR_DOT: Final = "#2166ac"


def _cost(workload: str) -> Callable[[Rounds, str], list[float]]:
    return lambda rounds, name: rounds.cost(name, workload)


PANELS: Final[Sequence[tuple[str, Callable[[Rounds, str], list[float]]]]] = (
    ("CPU per token, 64 streams of 50 tokens a second, µs", _cost("paced")),
    ("CPU per request, 32 at once, µs", _cost("crowd")),
    ("CPU per request with 220 KB of prompt, µs", _cost("long prompt")),
    ("added latency of an idle request, ms", lambda rounds, name: rounds.added(name, "request_ms")),
    ("one-way delay of a token, 16 streams, p50, ms", lambda rounds, name: rounds.times(name, "delay_p50_ms")),
)


def draw(outcome: Outcome, path: Path) -> None:
    """Writes the picture, a .png. Raises OSError."""
    rounds = outcome.rounds
    names = [name for name in rounds.turns if name != ENGINE]
    figure = Figure(figsize=(9, 0.8 + len(PANELS) * (0.6 + 0.24 * len(names))), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Potluck {outcome.versions[OURS]}, {outcome.versions['processor']}, {outcome.round_count} rounds", fontsize=9)
    axes = figure.subplots(len(PANELS), 1, squeeze=False)[:, 0]
    for axis, (words, values) in zip(axes, PANELS, strict=True):
        found = {name: estimate(values(rounds, name)) for name in names}
        for place, name in enumerate(sorted(names, key=lambda name: -found[name].median)):
            each, colour = found[name], _OUR_DOT if name == OURS else _DOT
            axis.plot([each.low, each.high], [place, place], color=colour, linewidth=2, alpha=0.5)
            axis.plot([each.median], [place], "o", color=colour, markersize=5)
            axis.annotate(
                f"  {name}  {each.median:,.3g}" if each.median < 1000 else f"  {name}  {each.median:,.0f}",
                (each.high, place),
                fontsize=7,
                va="center",
                color=colour,
            )
        axis.set_xscale("log")
        axis.margins(x=0.25, y=0.15)
        axis.set_title(words, fontsize=8, loc="left")
        axis.set_yticks([])
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(visible=True, axis="x", alpha=0.3)
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})
