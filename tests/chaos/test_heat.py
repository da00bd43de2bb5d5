"""A sample of what `tests.chaos.heat_replay` shows in full: until the first of what was taken is given back."""

from __future__ import annotations

import pytest

from tests.chaos import heat_replay
from tests.support.heat_trace import load_trace

RECOVERY_SECONDS = 300.0
"""Of the trace: two rungs."""


@pytest.mark.timed
@pytest.mark.timeout(240)
def test_a_hot_card_sheds_work_before_it_throttles_and_gets_it_back_slowly(tmp_path):
    until_seconds = load_trace(heat_replay.TRACE).phase("cool").begins_at + RECOVERY_SECONDS
    with heat_replay.heated_pool(tmp_path) as heated:
        replay = heat_replay.play(heated, until_seconds)
    assert replay.broken == ()
    assert [step.value for step in replay.rungs][-2:] == [7, 6]
