"""How many layers each stage of a pipeline takes.

Decides by speed, within what each stage's memory holds. It must not know what a layer weighs: it is given capacities.
"""

from __future__ import annotations

from collections.abc import Sequence


def share_layers(layer_count: int, speeds: Sequence[float], capacities: Sequence[int]) -> tuple[int, ...]:
    """`layer_count` layers over stages, as the speeds say, no stage above its capacity, each at least one.

    Water-filling: the level at which the layers of all stages, each its speed times the level or its capacity, sum up (Parallax,
    `layer_allocation.py`, does the same); whole layers by largest remainder. Where the capacities do not suffice, by capacity alone, so
    that the report shows by how much.

    Raises:
        ValueError: fewer layers than stages.
    """
    if layer_count < len(speeds):
        raise ValueError(f"{layer_count} layers cannot make {len(speeds)} stages")
    limits = [max(1, capacity) for capacity in capacities]
    if sum(limits) < layer_count:
        return _whole(layer_count, [layer_count * limit / sum(limits) for limit in limits], [layer_count] * len(limits))
    return _whole(layer_count, _levelled(layer_count, [max(speed, 1e-9) for speed in speeds], limits), limits)


def _levelled(layer_count: int, speeds: Sequence[float], limits: Sequence[int]) -> list[float]:
    """Shares in proportion to speed; whatever a full stage cannot take goes to the others."""
    shares = [0.0] * len(speeds)
    open_stages = set(range(len(speeds)))
    left = float(layer_count)
    while open_stages:
        level = left / sum(speeds[stage] for stage in open_stages)
        full = {stage for stage in open_stages if level * speeds[stage] >= limits[stage]}
        if not full:
            for stage in open_stages:
                shares[stage] = level * speeds[stage]
            break
        for stage in full:
            shares[stage] = float(limits[stage])
            left -= limits[stage]
        open_stages -= full
    return shares


def _whole(layer_count: int, shares: Sequence[float], limits: Sequence[int]) -> tuple[int, ...]:
    counts = [max(1, int(share)) for share in shares]
    while sum(counts) > layer_count:
        counts[max(range(len(counts)), key=lambda stage: (counts[stage] > 1, counts[stage] - shares[stage]))] -= 1
    while sum(counts) < layer_count:
        counts[max(range(len(counts)), key=lambda stage: (counts[stage] < limits[stage], shares[stage] - counts[stage]))] += 1
    return tuple(counts)
