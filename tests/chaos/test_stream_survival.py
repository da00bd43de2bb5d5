"""A sample of what `tests.chaos.stream_survival` shows in full."""

from __future__ import annotations

import random

import pytest

from tests.chaos import stream_survival
from tests.chaos.survival_pool import TOKEN_COUNT, survival_pool
from tests.support.pool_processes import audit


@pytest.mark.timeout(400)
def test_a_stream_ends_with_the_undisturbed_text_wherever_its_agent_is_killed(tmp_path):
    with survival_pool(tmp_path) as survival:
        assert stream_survival.every_boundary(survival, [1, 30, TOKEN_COUNT]) == []
        # A machine that does other work beside has longer pauses; the bounds are the command's to show.
        pauses = {"killed": 15.0, "frozen": 15.0}
        breaches = stream_survival.under_load(survival, 2, random.Random(1), stream_count=4, gap_seconds_max=pauses)
        assert breaches == []
        survival.earned()
        assert audit(survival.pool) == ()
