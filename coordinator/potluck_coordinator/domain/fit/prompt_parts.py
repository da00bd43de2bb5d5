"""How long the parts of one prompt take through the stages of a box, where one thread starts the kernels of all cards.

Decides by the order in which llama.cpp hands work out: a part's layers on the first card, then on the next one, then the next part. CUDA
keeps about a thousand started kernels waiting for a card; the thread that starts one more waits until the card has finished one. A stage of
many layers fills that queue, the thread waits there, and the cards before it get their next part late or not at all. It must not know
models or cards: it is given times and numbers of kernels.

Sources: the order and the parts, llama.cpp pull request 6017. The queue's length, https://forums.developer.nvidia.com/t/68937.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

LAUNCHES_WAITING_MAX: Final = 1024
PARTS_MAX: Final = 48
"""Each further part takes as long as the second half of these did on average. The first half has the time until all cards are at work, and
where the queue is filled the parts end in a rhythm of a few."""


def seconds_of_parts(steps: Sequence[float], hops: Sequence[float], launches: Sequence[int], part_count: int) -> float:
    """Seconds from the first part's start to the last part's end.

    Args:
        steps: seconds that each stage takes for one part.
        hops: seconds from each stage to the next; what comes after the last is not looked at.
        launches: kernels that each stage starts for one part.
        part_count: parts of the prompt, one or more.
    """
    counted = min(part_count, PARTS_MAX)
    begun: list[list[float]] = [[] for _ in steps]
    launcher_free = 0.0
    for part in range(counted):
        arrived = 0.0
        for stage, step in enumerate(steps):
            card_free = begun[stage][-1] + step if part else 0.0
            begun[stage].append(max(arrived, card_free, launcher_free))
            arrived = begun[stage][-1] + step + hops[stage]
            # Of this stage's kernels so many must be done before the last one of this part finds a place in the queue.
            done = (part + 1) * launches[stage] - LAUNCHES_WAITING_MAX
            if done > 0:
                whole_parts = (done - 1) // launches[stage]
                launcher_free = max(launcher_free, begun[stage][whole_parts] + step * (done / launches[stage] - whole_parts))
    last = begun[-1]
    further = (part_count - counted) * (last[-1] - last[-1 - PARTS_MAX // 2]) / (PARTS_MAX // 2) if part_count > counted else 0.0
    return last[-1] + steps[-1] + further
