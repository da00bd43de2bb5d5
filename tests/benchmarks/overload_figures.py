"""What an overload run came to: goodput, refusals, drain and deaths, and which bounds they keep.

Decides when an answer is good (whole, its first token in time, its tokens at a readable pace), what counts as a refusal, and the verdicts.
It must not know how anything was measured, nor by which contender.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from tests.benchmarks.arithmetic import percentile
from tests.benchmarks.open_load import Asked

FIRST_TOKEN_SECONDS_MAX: Final = 2.0
TOKEN_SECONDS_MAX: Final = 0.1
OVERLOAD_FACTOR: Final = 5.0
WARM_UP_SECONDS: Final = 5.0
"""Of each run, left out of its goodput: engines fill, and hardly an answer is over."""

GOODPUT_SHARE_MIN: Final = 0.8
REFUSAL_SECONDS_MAX: Final = 0.05
EMPTY_SECONDS_MAX: Final = 10.0

REFUSED: Final = frozenset({429, 503})
LATE_SECONDS_MAX: Final = 0.025
"""Of the client's 99th percentile. Beyond it the client, or the machine, was not up to the load."""
BUSY_SHARE_MAX: Final = 0.9
"""Beyond this the machine had no room, and waiting was for processors and not for engines."""


@dataclass(frozen=True, slots=True)
class Spell:
    """One run of one contender at one rate."""

    requests_per_second: float
    seconds: float
    asked: Sequence[Asked]
    busy_share: float
    engine_death_count: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What a spell came to."""

    requests_per_second: float
    asked_count: int
    goodput: float
    """Good answers a second, of those that were over while the load lasted."""
    good_count: int
    slow_count: int
    """Whole answers that came too late, or too slowly."""
    refused_count: int
    broken_count: int
    """Answers that broke off or were wrong, and failures that are no refusal."""
    unfinished_count: int
    refusal_p50_seconds: float | None
    refusal_p99_seconds: float | None
    first_token_p50_seconds: float | None
    first_token_p99_seconds: float | None
    empty_seconds: float | None
    """After the last arrival, until nobody waited for a first token or a refusal any more; None: not before the run ended."""
    over_seconds: float | None
    """The same, until every answer was over."""
    engine_death_count: int
    late_p99_seconds: float
    busy_share: float
    fairness: float
    """Jain's index of good answers over the accounts, which all ask for the same."""
    failures: Mapping[str, int]


def is_good(asked: Asked) -> bool:
    """Whole, begun in time, and readable."""
    return (
        not asked.failure
        and asked.first_token_seconds is not None
        and asked.first_token_seconds <= FIRST_TOKEN_SECONDS_MAX
        and (asked.token_seconds or 0.0) <= TOKEN_SECONDS_MAX
    )


def is_refused(asked: Asked) -> bool:
    """Told at once, or later, that there is no room."""
    return asked.status in REFUSED and asked.over_seconds is not None


def figures_of(spell: Spell) -> Figures:
    """Of the spell's requests, all of them."""
    good = [asked for asked in spell.asked if is_good(asked)]
    whole = [asked for asked in spell.asked if not asked.failure]
    refused = [asked for asked in spell.asked if is_refused(asked)]
    unfinished = [asked for asked in spell.asked if asked.over_seconds is None]
    refusal_seconds = [asked.over_seconds for asked in refused if asked.over_seconds is not None]
    first_seconds = [asked.first_token_seconds for asked in spell.asked if asked.first_token_seconds is not None]
    return Figures(
        requests_per_second=spell.requests_per_second,
        asked_count=len(spell.asked),
        goodput=sum(WARM_UP_SECONDS <= (_after(one, one.over_seconds) or 0.0) <= spell.seconds for one in good)
        / (spell.seconds - WARM_UP_SECONDS),
        good_count=len(good),
        slow_count=len(whole) - len(good),
        refused_count=len(refused),
        broken_count=len(spell.asked) - len(whole) - len(refused) - len(unfinished),
        unfinished_count=len(unfinished),
        refusal_p50_seconds=percentile(refusal_seconds, 50),
        refusal_p99_seconds=percentile(refusal_seconds, 99),
        first_token_p50_seconds=percentile(first_seconds, 50),
        first_token_p99_seconds=percentile(first_seconds, 99),
        empty_seconds=_until(spell, [_decided_at(asked) for asked in spell.asked]),
        over_seconds=_until(spell, [_after(asked, asked.over_seconds) for asked in spell.asked]),
        engine_death_count=spell.engine_death_count,
        late_p99_seconds=percentile([asked.late_seconds for asked in spell.asked], 99) or 0.0,
        busy_share=spell.busy_share,
        fairness=_fairness(good),
        failures=dict(Counter(asked.failure for asked in spell.asked if asked.failure)),
    )


def _after(asked: Asked, seconds: float | None) -> float | None:
    return None if seconds is None else asked.at_seconds + asked.late_seconds + seconds


def _decided_at(asked: Asked) -> float | None:
    return _after(asked, asked.over_seconds if asked.first_token_seconds is None else asked.first_token_seconds)


def _until(spell: Spell, moments: Sequence[float | None]) -> float | None:
    known = [moment for moment in moments if moment is not None]
    return None if len(known) < len(moments) else max(0.0, max(known, default=0.0) - spell.seconds)


def _fairness(good: Sequence[Asked]) -> float:
    counts = Counter(asked.account for asked in good).values()
    return sum(counts) ** 2 / (len(counts) * sum(count * count for count in counts)) if counts else 0.0


def peak_of(moderate: Sequence[Figures]) -> float:
    """The most good answers a second at any of these rates."""
    return max((figures.goodput for figures in moderate), default=0.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One contender's whole run."""

    moderate: Sequence[Figures]
    overload: Figures

    @property
    def peak(self) -> float:
        """The most good answers a second at a moderate load."""
        return peak_of(self.moderate)

    @property
    def share(self) -> float:
        """What of the peak is left under overload."""
        return self.overload.goodput / self.peak if self.peak else 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """One bound, and whether it is kept."""

    name: str
    kept: bool
    words: str


def verdicts(outcome: Outcome) -> tuple[Verdict, ...]:
    """The bounds that Potluck has to keep."""
    overload = outcome.overload
    p99, empty = overload.refusal_p99_seconds, overload.empty_seconds
    return (
        Verdict(f"goodput at least {GOODPUT_SHARE_MIN:.0%} of peak", outcome.share >= GOODPUT_SHARE_MIN, f"{outcome.share:.0%}"),
        Verdict(
            f"refusals p99 at most {REFUSAL_SECONDS_MAX * 1000:.0f} ms",
            p99 is not None and p99 <= REFUSAL_SECONDS_MAX,
            "nobody was refused" if p99 is None else f"{p99 * 1000:.1f} ms",
        ),
        Verdict("no engine death", overload.engine_death_count == 0, f"{overload.engine_death_count}"),
        Verdict(
            f"queues empty at most {EMPTY_SECONDS_MAX:.0f} s after the burst",
            empty is not None and empty <= EMPTY_SECONDS_MAX,
            "not before the run ended" if empty is None else f"{empty:.1f} s",
        ),
        Verdict("no answer breaks off", overload.broken_count == 0, f"{overload.broken_count}"),
    )


def doubts(outcome: Outcome) -> tuple[str, ...]:
    """Why the figures say less than they seem to; none where the machine was up to it."""
    found = []
    for figures in (*outcome.moderate, outcome.overload):
        at = f"at {figures.requests_per_second:.1f} requests/s"
        if figures.late_p99_seconds > LATE_SECONDS_MAX:
            found.append(f"{at} the client sent up to {figures.late_p99_seconds * 1000:.0f} ms late (p99)")
        if figures.busy_share > BUSY_SHARE_MAX:
            found.append(f"{at} the machine was {figures.busy_share:.0%} busy")
    return tuple(found)


_COUNTS: Final = ("good", "slow", "refused", "broken", "open")
_HEADINGS: Final = ("", "peak", "goodput", "of peak", *_COUNTS, "refusal ms", "TTFT s", "deaths", "empty s")
_WIDTHS: Final = (15, 7, 9, 9, 7, 7, 9, 8, 6, 14, 14, 8, 9)


def _line(cells: Sequence[str]) -> str:
    first, *rest = cells
    return first.ljust(_WIDTHS[0]) + "".join(cell.rjust(width) for cell, width in zip(rest, _WIDTHS[1:], strict=True))


def _pair(first: float | None, second: float | None, scale: float, digits: int) -> str:
    return "-" if first is None or second is None else f"{first * scale:.{digits}f}/{second * scale:.{digits}f}"


def _row(name: str, outcome: Outcome) -> str:
    overload = outcome.overload
    return _line(
        [
            name,
            f"{outcome.peak:.2f}",
            f"{overload.goodput:.2f}",
            f"{outcome.share:.0%}",
            str(overload.good_count),
            str(overload.slow_count),
            str(overload.refused_count),
            str(overload.broken_count),
            str(overload.unfinished_count),
            _pair(overload.refusal_p50_seconds, overload.refusal_p99_seconds, 1000, 1),
            _pair(overload.first_token_p50_seconds, overload.first_token_p99_seconds, 1, 1),
            str(overload.engine_death_count),
            "-" if overload.empty_seconds is None else f"{overload.empty_seconds:.1f}",
        ]
    )


def table(outcomes: Mapping[str, Outcome], absent: Mapping[str, str]) -> str:
    """The printed page: every contender in overload, its peak beside it, then Potluck's verdicts and what speaks against the figures."""
    lines = [_line(_HEADINGS), *(_row(name, outcome) for name, outcome in outcomes.items())]
    lines += [f"{name}: {reason}" for name, reason in absent.items()]
    lines += ["", "Rates are requests a second; refusal and TTFT are p50/p99; `open` had no end yet when the run ended."]
    if (ours := outcomes.get("Potluck")) is not None:
        lines += [f"{'KEPT' if verdict.kept else 'BROKEN':7}{verdict.name}: {verdict.words}" for verdict in verdicts(ours)]
    lines += [f"PROVISIONAL: {name}: {doubt}" for name, outcome in outcomes.items() for doubt in doubts(outcome)]
    return "\n".join(lines)


def document(outcomes: Mapping[str, Outcome], absent: Mapping[str, str]) -> dict[str, Any]:
    """Everything, for scripts."""
    return {
        "contenders": {
            name: {
                "peak_requests_per_second": outcome.peak,
                "goodput_share_of_peak": outcome.share,
                "moderate": [asdict(figures) for figures in outcome.moderate],
                "overload": asdict(outcome.overload),
                "verdicts": [asdict(verdict) for verdict in verdicts(outcome)],
                "doubts": list(doubts(outcome)),
            }
            for name, outcome in outcomes.items()
        },
        "absent": dict(absent),
    }


def exit_status(outcomes: Mapping[str, Outcome]) -> int:
    """0 only where Potluck took part and kept every bound."""
    ours = outcomes.get("Potluck")
    return 0 if ours is not None and all(verdict.kept for verdict in verdicts(ours)) else 1
