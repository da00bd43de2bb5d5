"""A sample of `tests.chaos.database_outage`, which takes the server away for longer, and in every way."""

from __future__ import annotations

import pytest

from tests.chaos.database_outage import play, pool_on_postgresql


@pytest.mark.timeout(180)
def test_answers_run_through_an_absence_of_the_database_and_nobody_pays_too_much_or_too_little(tmp_path):
    with pool_on_postgresql(tmp_path, answer_seconds=3.0) as (pool, server):
        result = play(pool, server, 0, "killed", 5.0)
    assert result.broken == []
    assert result.charged_micro_credits > 0
