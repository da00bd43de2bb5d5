"""Looks that clients wait for: soon, and few of them, however many links break at once."""

from __future__ import annotations

import heapq
import itertools
from types import SimpleNamespace

import pytest

from potluck_coordinator.domain.nodes import LivenessLimits
from potluck_coordinator.gateway import judging
from potluck_coordinator.gateway.judging import Elsewhere, Judging
from potluck_coordinator.gateway.suspicions import Suspicions


class Looks:
    """A judgement of nobody, which notes when it looks, on a loop whose time is moved."""

    def __init__(self) -> None:
        self.now = 100.0
        self.at: list[float] = []
        self._timers: list[tuple[float, int, SimpleNamespace]] = []
        self._numbers = itertools.count()
        nowhere = Elsewhere(can_take=False, has_room=False)
        self.judging = Judging(LivenessLimits(), lambda *_: nowhere, Suspicions(lambda: self.now), lambda _: None, self.look)

    def look(self) -> None:
        self.at.append(self.now)
        self.judging.look({}, self.now)

    def call_later(self, seconds: float, callback: object) -> SimpleNamespace:
        timer = SimpleNamespace(callback=callback, is_cancelled=False)
        timer.cancel = lambda: setattr(timer, "is_cancelled", True)
        heapq.heappush(self._timers, (self.now + seconds, next(self._numbers), timer))
        return timer

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while self._timers and self._timers[0][0] <= until:
            self.now, _, timer = heapq.heappop(self._timers)
            if not timer.is_cancelled:
                timer.callback()
        self.now = until


@pytest.fixture
def looks(monkeypatch):
    made = Looks()
    monkeypatch.setattr(judging, "asyncio", SimpleNamespace(get_running_loop=lambda: made))
    return made


def test_a_thousand_links_that_break_together_cost_a_few_looks_and_the_last_is_looked_at_in_time(looks):
    began = looks.now
    for number in range(1000):
        looks.judging.look_in(0.05 + number * 0.0001, began)
    looks.pass_time(0.4)
    assert looks.at[0] >= began + 0.05
    assert looks.at[-1] >= began + 0.05 + 999 * 0.0001, "the last one was looked at after its time"
    assert len(looks.at) <= 0.4 / judging.LOOK_PAUSE_SECONDS


def test_one_that_is_wanted_sooner_does_not_wait_for_the_others(looks):
    looks.judging.look_in(30.0, looks.now)
    looks.judging.look_in(0.01, looks.now)
    looks.pass_time(0.2)
    assert len(looks.at) == 1


def test_while_in_doubt_looks_in_between_keep_to_the_others_pace(looks, monkeypatch):
    monkeypatch.setattr(judging, "LOOK_SECONDS", 0.15)
    looks.look()
    looks.judging.in_doubt = True
    looks.judging.look_in(0.01, looks.now)
    looks.pass_time(0.3)
    assert looks.at[1] >= looks.at[0] + 0.15
