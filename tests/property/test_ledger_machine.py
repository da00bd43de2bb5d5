"""A sample of the ledger's state machine; `python -m tests.property.ledger_soak --operations 20000` runs all of it."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from tests.property.ledger_machine import LedgerMachine
from tests.property.ledger_race import race

TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(
    max_examples=15, stateful_step_count=30, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_sixteen_threads_spend_a_balance_exactly_once(tmp_path):
    outcome = race(f"sqlite:///{tmp_path / 'race.db'}", thread_count=16, spend_count=20, balance=100)
    assert (outcome.spent, outcome.refused, outcome.available_after, outcome.findings) == (100, 220, 0, ())
    assert outcome.exact, outcome
