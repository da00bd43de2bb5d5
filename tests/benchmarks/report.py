"""The table that people read.

Decides what is shown. It must not know how it was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Final

from tests.benchmarks.arithmetic import total
from tests.benchmarks.loss_traces import CUT, DOUBLED, HUNG, REFUSED, WHOLE, LossFigures, LossRow
from tests.benchmarks.marks import ENGINE, FLOOR, OURS, Verdict
from tests.benchmarks.outcome import Outcome

_HEADINGS: Final = ("CPU in us of", *["a token"] * 3, *["a request"] * 2, "latency", "first", "delay", "memory", "idle")
_SUBHEADINGS: Final = ("", "8 paced", "64 paced", "flat out", "32 at once", "220 KB", "added ms", "added ms", "p50/99 ms", "MiB", "ms/s")
_WIDTHS: Final = (32, 9, 10, 10, 12, 11, 10, 10, 13, 8, 7)
_CPU: Final = ("few", "paced", "flat out", "crowd", "long prompt")
_PARTS: Final[Mapping[str, Sequence[tuple[str, str]]]] = {
    OURS: (
        ("gateway", "gateway"),
        ("directory", "directory"),
        ("driver", "driver"),
        ("ray", "Ray's daemons (not counted)"),
        ("agent", "agent, at the node"),
    ),
    FLOOR: (("agent", "agent, at the node"),),
    "Ray Serve": (("proxy", "proxy"), ("replica", "replica"), ("controller", "controller"), ("ray", "Ray's daemons (not counted)")),
    "Ray Serve, HAProxy": (
        ("haproxy", "HAProxy"),
        ("replica", "replica"),
        ("controller", "controller"),
        ("ray", "Ray's daemons (not counted)"),
    ),
}


def table(outcome: Outcome) -> str:
    """The table, the losses, the marks and what must be said beside them."""
    parts = [_cost_lines(outcome), _loss_lines(outcome.losses), _mark_lines(outcome.verdicts), _footnotes(outcome)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = cells
    return (first.ljust(widths[0]) + "".join(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=False))).rstrip()


def _cost_lines(outcome: Outcome) -> list[str]:
    if not outcome.rounds.turns:
        return []
    lines = [_line(_HEADINGS, _WIDTHS), _line(_SUBHEADINGS, _WIDTHS), "-" * sum(_WIDTHS)]
    for name, groups in outcome.rounds.relay_groups.items():
        if name == ENGINE:
            times = ["", "", "", "", "", *_times(outcome, name)]
            lines.append(_line(["direct: the engine's own times", *times], _WIDTHS))
            continue
        label = "Potluck, coordinator" if name == OURS else name
        lines.append(_line([label, *_costs(outcome, name, groups), *_times(outcome, name), *_standing(outcome, name, groups)], _WIDTHS))
        lines += [
            _line([f"  {words}", *_costs(outcome, name, (group,)), "", "", "", *_standing(outcome, name, (group,))], _WIDTHS)
            for group, words in _PARTS.get(name, ())
        ]
    return lines + [f"{name}: not measured: {reason}" for name, reason in outcome.absent.items()]


def _costs(outcome: Outcome, name: str, groups: Sequence[str]) -> list[str]:
    return [f"{median(total(turn.cpu[workload], groups) for turn in outcome.rounds.turns[name]):.1f}" for workload in _CPU]


def _times(outcome: Outcome, name: str) -> list[str]:
    rounds = outcome.rounds
    delay = "/".join(f"{median(rounds.times(name, key)):.2f}" for key in ("delay_p50_ms", "delay_p99_ms"))
    keys = ("request_ms", "first_token_ms")
    if name == ENGINE:
        return [*(f"({median(rounds.times(name, key)):.2f})" for key in keys), delay]
    return [*(f"{median(rounds.added(name, key)):.2f}" for key in keys), delay]


def _standing(outcome: Outcome, name: str, groups: Sequence[str]) -> list[str]:
    standing = outcome.standings[name]
    memory, idle = total(standing.resident_bytes, groups), total(standing.idle_cpu_ms_per_second, groups)
    return [f"{memory / 2**20:.0f}", f"{idle:.1f}"]


_LOSS_HEADINGS: Final = ("16 streams, one of two is lost", "whole", "failed", "cut", "doubled", "hung", "requests", "gap s", "noticed s")
_LOSS_WIDTHS: Final = (42, 7, 8, 6, 9, 6, 15, 8, 11)


def _loss_lines(losses: Sequence[LossRow]) -> list[str]:
    if not losses:
        return []
    lines = [_line(_LOSS_HEADINGS, _LOSS_WIDTHS), "-" * sum(_LOSS_WIDTHS)]
    for row in losses:
        figures = row.figures
        ends = [str(figures.ends[word]) for word in (WHOLE, REFUSED, CUT, DOUBLED, HUNG)]
        probes = f"{figures.probe_failed_count} of {figures.probe_count}"
        label = f"{row.contender}: {row.blow} of an {row.lost}" if row.lost == "engine" else f"{row.contender}: {row.blow} of a {row.lost}"
        lines.append(_line([label, *ends, probes, f"{figures.longest_gap_seconds:.2f}", _noticed(figures)], _LOSS_WIDTHS))
    return [
        *lines,
        _LOSS_WORDS,
    ]


_LOSS_WORDS: Final = "requests: short ones that failed after the loss; noticed: until all streams went on or had ended, and none failed"


def _noticed(figures: LossFigures) -> str:
    seconds = figures.noticed_after_seconds
    return "never" if seconds is None else f"{seconds:.2f}"


def _mark_lines(found: Sequence[Verdict]) -> list[str]:
    return [
        f"{_WORDS[verdict.met]:>12}  {verdict.name}: {_figure(verdict)}, at most {verdict.bound:g}{_beside(verdict)}" for verdict in found
    ]


def _beside(verdict: Verdict) -> str:
    """How far the least that such a relay can do is from the same peer."""
    return "" if verdict.floor is None else f" ({FLOOR} {verdict.floor.median:.3g})"


_WORDS: Final = {True: "met", False: "NOT MET", None: "not measured"}


def _figure(verdict: Verdict) -> str:
    found = verdict.estimate
    if found is None:
        return "-"
    if found.low == found.high:
        return f"{found.median:g}" if verdict.unit == "" else f"{found.median:.2f}"
    return f"{found.median:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _footnotes(outcome: Outcome) -> list[str]:
    pinned = "relays on one core, client, engine and agent on the others" if outcome.pinned else "no core was pinned"
    lines = [
        f"{outcome.command}: {outcome.round_count} rounds in ABBA order of seed {outcome.seed}, {outcome.seconds:.0f} s; {pinned}.",
        "Medians. Ratios are of one round each; in brackets 95 % bootstrap intervals, whose worse end decides a mark.",
        "TLS on Potluck's link, a database on disk, every request paid for. Every answer was checked for all of its tokens, in order.",
    ]
    lines.append(f"{', '.join(f'{name} {version}' for name, version in outcome.versions.items())}.")
    lines += [
        f"{name} refused an answer or broke it off in {count} turns; they were run again." for name, count in outcome.stumbles.items()
    ]
    if outcome.is_provisional:
        lines.append(f"PROVISIONAL: others used {outcome.foreign_cpu_share:.0%} of this machine meanwhile. Run it again on an idle one.")
    return lines
