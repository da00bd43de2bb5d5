"""Figures as pictures: how each policy's pool fared over the scenario's time.

Decides what is drawn. It imports matplotlib, which nothing else needs, when it is asked to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Final

from potluck_coordinator.simulation.figures import Look
from potluck_coordinator.simulation.runs import Result
from potluck_protocol.errors import ErrorCode, PotluckError

FORMATS: Final = ("png", "svg")
COLOURS: Final = {
    "round-robin": "#b2182b",
    "least-connections": "#ef8a62",
    "power-of-two": "#8073ac",
    "oracle": "#999999",
    "ours": "#2166ac",
}
PANELS: Final[tuple[tuple[str, Callable[[Look], float]], ...]] = (
    ("hottest card, °C", lambda look: look.celsius_max),
    ("power leaves of reading, %", lambda look: 100 * look.clock_share_min),
    ("nodes with a live engine", lambda look: look.up_count),
    ("requests in engines and waiting", lambda look: look.running_count + look.waiting_in_engines_count + look.waiting_count),
)


def prepare(folder: Path) -> None:
    """Before the first run, so that none is lost: makes the folder, and sees whether something can be drawn into it.

    Raises:
        PotluckError: INVALID_REQUEST where matplotlib is not installed, or the folder cannot be written.
    """
    _matplotlib()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Writes one picture in every format into a folder that is prepared; of several seeds the first is drawn.

    Raises:
        PotluckError: INVALID_REQUEST where the folder cannot be written any more.
    """
    new_canvas, new_figure = _matplotlib()
    scenario = results[0].run.scenario
    figure = new_figure(figsize=(9, 10), layout="constrained")
    new_canvas(figure)
    figure.suptitle(_plain(f"{scenario.name}: {scenario.about}"), fontsize=10, wrap=True)
    axes = figure.subplots(len(PANELS), 1, sharex=True)
    for policy, looks in _first_of_each(results).items():
        minutes = [look.at_seconds / 60 for look in looks]
        for axis, (_, of) in zip(axes, PANELS, strict=True):
            axis.plot(minutes, [of(look) for look in looks], label=_plain(policy), color=COLOURS.get(policy), linewidth=1.2)
    for axis, (words, _) in zip(axes, PANELS, strict=True):
        axis.set_ylabel(words, fontsize=8)
        axis.grid(visible=True, alpha=0.3)
        axis.set_ylim(bottom=0)
    axes[0].axhline(scenario.nodes[0].heat.throttle_celsius, color="black", linestyle=":", linewidth=0.8)
    axes[0].set_ylim(bottom=20)
    axes[0].legend(loc="lower right", fontsize=8)
    axes[-1].set_xlabel("minutes")
    try:
        paths = [folder / f"{scenario.name}.{suffix}" for suffix in FORMATS]
        for path in paths:
            # Without the day of drawing, so that the same run gives the same file.
            figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    except OSError as error:
        raise _unwritable(folder, error) from error
    return paths


def _plain(words: str) -> str:
    """Between two dollars matplotlib would look for a formula."""
    return words.replace("$", r"\$")


def _matplotlib() -> tuple[Any, Any]:
    """The canvas and the figure of it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - only who draws needs it
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise PotluckError(ErrorCode.INVALID_REQUEST, "Plots need matplotlib. Run: pip install 'potluck[simulation]'") from error
    return FigureCanvasAgg, Figure


def _unwritable(folder: Path, error: OSError) -> PotluckError:
    return PotluckError(ErrorCode.INVALID_REQUEST, f"Plots cannot be written to {folder}: {error.strerror or error}.")


def _first_of_each(results: Sequence[Result]) -> dict[str, tuple[Look, ...]]:
    found: dict[str, tuple[Look, ...]] = {}
    for result in results:
        words = " ".join(f"{key}={value}" for key, value in result.run.changes)
        found.setdefault(f"{result.run.policy} {words}".strip(), result.figures.looks)
    return found
