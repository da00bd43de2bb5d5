"""Which shape to run, and which splits lose.

Decides by answers: a split over more cards must be worth them. It must not know how rates and memory came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from potluck_coordinator.domain.fit.report import ShapeFit, Verdict

SPLIT_GAIN_MIN: Final = 1.2
"""What a split must bring over a smaller shape, in one stream or in all together: less than the directory moves replicas for is not worth
more cards that fail together."""


def chosen(fits: Sequence[ShapeFit]) -> tuple[ShapeFit, ...]:
    """The shapes with losing splits refused, the best first."""
    judged = [_judged(fit, fits) for fit in fits]
    return tuple(sorted(judged, key=_rank))


def _judged(fit: ShapeFit, fits: Sequence[ShapeFit]) -> ShapeFit:
    if not fit.runs:
        return fit
    smaller = [other for other in fits if other.runs and other.shape.cards_per_replica < fit.shape.cards_per_replica]
    for other in smaller:
        single_gain = fit.rates.decode_single / other.rates.decode_single
        total_gain = fit.total_decode / other.total_decode
        if single_gain < SPLIT_GAIN_MIN and total_gain < SPLIT_GAIN_MIN:
            return replace(fit, verdict=Verdict.REFUSED, reason=_loss(fit, other))
    return fit


def _loss(fit: ShapeFit, other: ShapeFit) -> str:
    return (
        f"loses to {other.shape.label}: {fit.rates.decode_single:.0f} tokens/s for one stream against {other.rates.decode_single:.0f}, "
        f"{fit.total_decode:.0f} for all against {other.total_decode:.0f}"
    )


def _rank(fit: ShapeFit) -> tuple[object, ...]:
    """What runs first; of that, the most answers; within the gain that a split must bring, fewer cards and then the faster stream."""
    order = (Verdict.FITS, Verdict.TIGHT, Verdict.REFUSED, Verdict.DOES_NOT_FIT)
    return (not fit.runs, -fit.total_decode if fit.runs else order.index(fit.verdict), fit.shape.cards_per_replica)
