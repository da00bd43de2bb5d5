"""A sample of the ledger's state machine; `python -m tests.property.ledger_soak --operations 20000` runs all of it."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.property.ledger_machine import LedgerMachine
from tests.property.ledger_race import race

SAMPLE = settings(max_examples=15, stateful_step_count=30, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
TestLedger = LedgerMachine.TestCase
TestLedger.settings = SAMPLE


def test_the_ledger_on_postgresql_answers_as_its_model_does(postgresql):
    machine = type("OnPostgresql", (LedgerMachine,), {"fresh_database": staticmethod(postgresql.fresh_url)})
    run_state_machine_as_test(machine, settings=settings(SAMPLE, max_examples=8))


def test_sixteen_threads_spend_a_balance_exactly_once(database_url):
    outcome = race(database_url, thread_count=16, spend_count=25, balance=100)
    assert (outcome.spent, outcome.refused, outcome.available_after, outcome.findings) == (100, 300, 0, ())
    assert outcome.exact, outcome


def test_sessions_that_know_nothing_of_each_other_spend_a_balance_exactly_once(postgresql):
    """Without the lock that makes a coordinator the only one: the rows' own locks have to do."""
    with postgresql.fresh_url() as url:
        outcome = race(url, thread_count=8, spend_count=50, balance=100, each_its_session=True)
    assert (outcome.spent, outcome.refused, outcome.available_after, outcome.findings) == (100, 300, 0, ())
    assert outcome.exact, outcome
