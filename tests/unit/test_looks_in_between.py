"""Looks that clients wait for: soon, and few of them, however many links break at once."""

from __future__ import annotations

import asyncio
import time

from potluck_coordinator.domain.nodes import LivenessLimits
from potluck_coordinator.gateway import judging
from potluck_coordinator.gateway.judging import Elsewhere, Judging
from potluck_coordinator.gateway.suspicions import Suspicions


class Looks:
    """A judgement of nobody, which notes when it looks."""

    def __init__(self) -> None:
        self.at: list[float] = []
        nowhere = Elsewhere(can_take=False, has_room=False)
        self.judging = Judging(LivenessLimits(), lambda *_: nowhere, Suspicions(time.monotonic), lambda _: None, self.look)

    def look(self) -> None:
        self.at.append(time.monotonic())
        self.judging.look({}, self.at[-1])


async def test_a_thousand_links_that_break_together_cost_a_few_looks_and_the_last_is_looked_at_in_time():
    looks, began = Looks(), time.monotonic()
    for number in range(1000):
        looks.judging.look_in(0.05 + number * 0.0001, began)
    await asyncio.sleep(0.4)
    assert looks.at[0] >= began + 0.05
    assert looks.at[-1] >= began + 0.05 + 999 * 0.0001, "the last one was looked at after its time"
    assert len(looks.at) <= 0.4 / judging.LOOK_PAUSE_SECONDS


async def test_one_that_is_wanted_sooner_does_not_wait_for_the_others():
    looks, began = Looks(), time.monotonic()
    looks.judging.look_in(30.0, began)
    looks.judging.look_in(0.01, began)
    await asyncio.sleep(0.2)
    assert len(looks.at) == 1


async def test_while_in_doubt_looks_in_between_keep_to_the_others_pace(monkeypatch):
    monkeypatch.setattr(judging, "LOOK_SECONDS", 0.15)
    looks = Looks()
    looks.look()
    looks.judging.in_doubt = True
    began = time.monotonic()
    looks.judging.look_in(0.01, began)
    await asyncio.sleep(0.3)
    assert looks.at[1] >= looks.at[0] + 0.15
