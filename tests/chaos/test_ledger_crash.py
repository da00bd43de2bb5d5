"""A sample of the ledger's crash test; `python -m tests.chaos.ledger_crash --rounds 200` runs more of it."""

from __future__ import annotations

import pytest

from tests.chaos.ledger_crash import crash, database


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_no_acknowledged_payment_is_lost_when_the_writer_or_the_server_is_killed(kind):
    with database(kind) as (url, server):
        outcome = crash(url, rounds=3, seed=1, server=server)
    assert outcome.clean, outcome
    assert (outcome.rounds, outcome.server_kills) == (3, 0 if kind == "sqlite" else 2)
    assert outcome.acknowledged >= 3
