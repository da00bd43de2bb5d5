"""A sample of the ledger's crash test; `python -m tests.chaos.ledger_crash --rounds 50` runs more of it."""

from __future__ import annotations

from tests.chaos.ledger_crash import crash


def test_no_acknowledged_payment_is_lost_when_the_writer_is_killed(tmp_path):
    outcome = crash(tmp_path, rounds=3, seed=1)
    assert outcome.clean, outcome
    assert outcome.rounds == 3
    assert outcome.acknowledged >= 3
