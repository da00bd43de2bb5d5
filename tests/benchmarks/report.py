"""Turns the rounds into the marks, the printed table and the JSON document.

Decides what is shown and which figures are held against a mark. It must not know how they were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Final

from tests.benchmarks.arithmetic import Estimate, Figures, Mark, busy_neighbour_share, differences, estimate, ratios, total

BUSY_SHARE_MAX: Final = 0.10
"""Beyond this the machine was not ours alone, and the figures are provisional."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What is read of a contender's processes beside the rounds, by group."""

    resident_bytes: Mapping[str, int]
    idle_cpu_ms_per_second: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything that one run of the benchmark found. Contenders are in the order they are shown in."""

    rounds: Mapping[str, Sequence[Figures]]
    relay_groups: Mapping[str, tuple[str, ...]]
    standings: Mapping[str, Standing]
    absent: Mapping[str, str]
    """Contenders that could not be measured, and why."""
    stumbles: Mapping[str, int]
    """Turns of a peer in which it broke an answer off, and which were run again."""
    pinned: bool
    seconds: float


def _series(outcome: Outcome, name: str, value: Callable[[Figures], float]) -> list[float]:
    return [value(figures) for figures in outcome.rounds[name]]


def _relay_cost(outcome: Outcome, name: str, value: Callable[[Figures], Mapping[str, float]]) -> list[float]:
    return _series(outcome, name, lambda figures: total(value(figures), outcome.relay_groups[name]))


def _ratio(outcome: Outcome, peer: str, value: Callable[[Figures], Mapping[str, float]]) -> Estimate | None:
    if "Potluck" not in outcome.rounds or peer not in outcome.rounds:
        return None
    return estimate(ratios(_relay_cost(outcome, "Potluck", value), _relay_cost(outcome, peer, value)))


def _with_daemons(figures: Figures) -> Mapping[str, float]:
    """What Ray's own daemons spent meanwhile, put to the driver's account."""
    costs = figures.cpu_per_token
    return {**costs, "driver": costs["driver"] + costs["ray"]} if "ray" in costs else costs


def _added(outcome: Outcome, name: str, value: Callable[[Figures], float]) -> Estimate | None:
    if name not in outcome.rounds or "direct" not in outcome.rounds:
        return None
    return estimate(differences(_series(outcome, name, value), _series(outcome, "direct", value)))


def marks(outcome: Outcome) -> list[Mark]:
    """The first marks of the relay."""
    per_token = "coordinator CPU per token, 64 paced streams, to "
    return [
        Mark(per_token + "LiteLLM", 0.1, "x", _ratio(outcome, "LiteLLM", lambda figures: figures.cpu_per_token)),
        Mark(per_token + "sglang-router", 3.0, "x", _ratio(outcome, "sglang-router", lambda figures: figures.cpu_per_token)),
        Mark("added time to first token, idle", 5.0, "ms", _added(outcome, "Potluck", lambda figures: figures.first_token_ms)),
    ]


_HEADINGS: Final = ("", "us/token", "us/token", "us/request", "requests/s", "first token", "first token", "memory", "idle CPU")
_SUBHEADINGS: Final = ("CPU of", "64 streams", "1 stream", "whole", "8 at once", "idle, added", "64, added", "MiB", "ms/s")
_WIDTHS: Final = (30, 11, 10, 11, 11, 12, 12, 8, 9)


def _line(cells: Sequence[str]) -> str:
    first, *rest = cells
    return first.ljust(_WIDTHS[0]) + "".join(cell.rjust(width) for cell, width in zip(rest, _WIDTHS[1:], strict=False))


def _group_cells(outcome: Outcome, name: str, groups: Sequence[str]) -> list[str]:
    rounds, standing = outcome.rounds[name], outcome.standings[name]

    def cost(value: Callable[[Figures], Mapping[str, float]]) -> str:
        return f"{median(total(value(figures), groups) for figures in rounds):.1f}"

    return [
        cost(lambda figures: figures.cpu_per_token),
        cost(lambda figures: figures.cpu_per_token_alone),
        cost(lambda figures: figures.cpu_per_request),
        f"{total(standing.resident_bytes, groups) / 2**20:.0f}",
        f"{total(standing.idle_cpu_ms_per_second, groups):.1f}",
    ]


def _contender_line(outcome: Outcome, name: str, label: str) -> str:
    groups = outcome.relay_groups[name] or ("engine",)
    token, alone, request, memory, idle = _group_cells(outcome, name, groups)
    rate = f"{median(_series(outcome, name, lambda figures: figures.requests_per_second)):.0f}"
    first, crowded = "-", "-"
    if name != "direct":
        added = _added(outcome, name, lambda figures: figures.first_token_ms)
        added_crowded = _added(outcome, name, lambda figures: figures.first_token_crowded_ms)
        first = f"{added.median:.2f} ms" if added else "-"
        crowded = f"{added_crowded.median:.1f} ms" if added_crowded else "-"
    return _line([label, token, alone, request, rate, first, crowded, memory, idle])


def _part_line(outcome: Outcome, name: str, label: str, group: str) -> str:
    token, alone, request, memory, idle = _group_cells(outcome, name, (group,))
    return _line([f"  {label}", token, alone, request, "", "", "", memory, idle])


_PARTS: Final = (
    ("gateway", "gateway"),
    ("directory", "directory"),
    ("driver", "driver"),
    ("agent", "agent (at the node)"),
    ("ray", "Ray's own daemons"),
    ("engine", "engine (at the node)"),
)


def table(outcome: Outcome) -> str:
    """The table, the ratios and the marks, as printed."""
    lines = [_line(_HEADINGS), _line(_SUBHEADINGS), "-" * sum(_WIDTHS)]
    for name in outcome.rounds:
        if name == "direct":
            lines.append(_contender_line(outcome, name, "direct (the engine itself)"))
        elif name == "Potluck":
            lines.append(_contender_line(outcome, name, "Potluck, coordinator"))
            lines += [_part_line(outcome, name, label, group) for group, label in _PARTS]
        else:
            lines.append(_contender_line(outcome, name, name))
    lines += [f"{name}: not measured: {reason}" for name, reason in outcome.absent.items()]
    return "\n".join([*lines, "", *_ratio_lines(outcome), "", *_mark_lines(outcome), "", *_footnotes(outcome)])


def _ratio_lines(outcome: Outcome) -> list[str]:
    lines = []
    for peer in ("LiteLLM", "sglang-router"):
        for label, value in _RATIOS:
            found = _ratio(outcome, peer, value)
            if found is not None:
                lines.append(f"Potluck's coordinator to {peer}, {label}: {found.median:.3f} x  [{found.low:.3f}, {found.high:.3f}]")
    return lines


_RATIOS: Final[tuple[tuple[str, Callable[[Figures], Mapping[str, float]]], ...]] = (
    ("CPU per token, 64 streams", lambda figures: figures.cpu_per_token),
    ("the same with Ray's own daemons", _with_daemons),
    ("CPU per token, 1 stream", lambda figures: figures.cpu_per_token_alone),
    ("CPU per whole request", lambda figures: figures.cpu_per_request),
)


def _mark_lines(outcome: Outcome) -> list[str]:
    lines = []
    for mark in marks(outcome):
        verdict = {True: "MET", False: "NOT MET", None: "not measured"}[mark.met]
        found = mark.estimate
        figure = f"{found.median:.3f} {mark.unit} [{found.low:.3f}, {found.high:.3f}]" if found else "-"
        lines.append(f"{verdict:>12}  {mark.name}: {figure}, to be at most {mark.limit:g} {mark.unit}")
    return lines


def _footnotes(outcome: Outcome) -> list[str]:
    everyone = [figures for rounds in outcome.rounds.values() for figures in rounds]
    busy = busy_neighbour_share(everyone)
    count = max(len(rounds) for rounds in outcome.rounds.values())
    pinned = "relays on one core, client, engine and agent on the others" if outcome.pinned else "no core was pinned"
    lines = [
        f"Medians of {count} interleaved rounds, {outcome.seconds:.0f} s; {pinned}.",
        "Ratios and differences are of the same round; in brackets 95 % bootstrap intervals, whose worse end decides a mark.",
        "Engine paced at 12 ms a token. TLS on Potluck's link. Every answer was checked for all of its tokens, in order.",
    ]
    lines += [f"{name} broke an answer off in {count} of its turns; they were run again." for name, count in outcome.stumbles.items()]
    if busy > BUSY_SHARE_MAX:
        lines.append(f"PROVISIONAL: others used {busy:.0%} of this machine meanwhile. Run it again on an idle one.")
    return lines


def document(outcome: Outcome) -> dict[str, object]:
    """The whole outcome as JSON values."""
    everyone = [figures for rounds in outcome.rounds.values() for figures in rounds]
    return {
        "rounds": {name: [asdict(figures) for figures in rounds] for name, rounds in outcome.rounds.items()},
        "relay_groups": {name: list(groups) for name, groups in outcome.relay_groups.items()},
        "standings": {name: asdict(standing) for name, standing in outcome.standings.items()},
        "absent": dict(outcome.absent),
        "stumbles": dict(outcome.stumbles),
        "marks": [{**asdict(mark), "met": mark.met} for mark in marks(outcome)],
        "foreign_cpu_share": busy_neighbour_share(everyone),
        "provisional": busy_neighbour_share(everyone) > BUSY_SHARE_MAX,
        "pinned": outcome.pinned,
        "seconds": outcome.seconds,
    }
