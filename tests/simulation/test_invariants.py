"""The invariants hold in every world, and each of them finds a bug that is planted for it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from potluck_coordinator.simulation import books, coordinator_model, faults, lease_model, ours_pool
from potluck_coordinator.simulation.agenda import Agenda
from potluck_coordinator.simulation.asking import Outcome
from potluck_coordinator.simulation.card_model import Cards
from potluck_coordinator.simulation.engine_model import EngineModel
from potluck_coordinator.simulation.heat import HeatModel
from potluck_coordinator.simulation.invariants import Invariant, Invariants
from potluck_coordinator.simulation.lease_record import LATE_SECONDS, MARGIN_SECONDS, LeaseRecord
from potluck_coordinator.simulation.policies import NAMES
from potluck_coordinator.simulation.scenario import NodeClass, Scenario, Users
from potluck_coordinator.simulation.world import World
from potluck_protocol.values import NodeId
from tests.simulation.fault_mix import FAULTS, fault_mix, world

SEED_COUNT = 500
SEEDS_A_TEST = 25


@pytest.mark.parametrize("first", range(0, SEED_COUNT, SEEDS_A_TEST))
def test_no_seed_of_the_fault_mix_breaks_an_invariant(first: int) -> None:
    served = lost = 0
    for seed in range(first, first + SEEDS_A_TEST):
        played = world(seed)
        figures = played.run()
        assert not figures.breaks, (seed, figures.breaks)
        served += figures.served_count
        lost += figures.lost_attempt_count

    # The faults were felt, and most of what was asked for was answered all the same.
    assert lost > SEEDS_A_TEST
    assert served > 40 * SEEDS_A_TEST


@pytest.mark.parametrize("policy", NAMES)
def test_every_policy_keeps_the_books_and_the_tokens(policy: str) -> None:
    for seed in range(5):
        figures = world(seed, policy).run()
        assert not figures.breaks, (seed, figures.breaks)


def test_a_seed_always_gives_the_same_world_and_another_gives_another() -> None:
    def outcome(seed: int) -> list[tuple[float, int, Outcome]]:
        played = world(seed)
        played.run()
        return [(request.ended_at, request.delivered_tokens, request.outcome) for request in played.requests]

    assert outcome(3) == outcome(3)
    assert outcome(3) != outcome(4)


def breaks(*seeds: int, seconds: float = 90.0, **planted: object) -> set[Invariant]:
    """Which invariants some worlds break, whose coordinators have these attributes instead of their own."""
    found: set[Invariant] = set()
    for seed in seeds:
        played = world(seed, seconds=seconds)
        for name, value in planted.items():
            setattr(played.coordinator, name, value)
        played.run()
        found |= set(played.invariants.counts)
    return found


def test_a_coordinator_that_believes_ghosts_is_found() -> None:
    # The fence between a session and its ghosts is left open.
    assert Invariant.GHOST_LEASE in breaks(*range(3), seconds=600, is_current=lambda session, epoch: True)


def test_a_coordinator_that_never_gives_a_lease_up_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its sessions stay open, so that its own fence sees nothing wrong.
    monkeypatch.setattr(lease_model, "end_of_session", lambda *_: None)
    assert Invariant.GHOST_LEASE in breaks(*range(3), seconds=600)


def test_the_record_of_leases_judges_by_its_own_clock_what_counts_and_what_is_paid() -> None:
    agenda, invariants, node_id = Agenda(), Invariants(), NodeId("home")
    doubts = [0.0]
    record = LeaseRecord(agenda, invariants, 15.0, lambda: doubts[0])

    def ghosts(at: float, epoch: int) -> int:
        before = invariants.counts[Invariant.GHOST_LEASE]
        record.counted(node_id, epoch, at)
        return invariants.counts[Invariant.GHOST_LEASE] - before

    assert ghosts(0.0, 1) == 1
    record.granted(node_id, 1)
    assert ghosts(100.0, 1) == 0
    record.silent(node_id, 100.0, lambda: False)
    assert [ghosts(115.0 + LATE_SECONDS + late, 1) for late in (-0.1, 0.1)] == [0, 1]
    # A coordinator in doubt evicts nobody.
    doubts[0] = 200.0
    assert ghosts(200.0, 1) == 0
    record.renewed(node_id, 1)
    assert ghosts(300.0, 1) == 0
    record.ended(node_id, 1)
    assert ghosts(300.0, 1) == 1
    record.granted(node_id, 2)
    assert (ghosts(301.0, 1), ghosts(301.0, 2)) == (1, 0)

    # What came without a lease is paid by nobody.
    found = invariants.counts[Invariant.GHOST_LEASE]
    record.earned(node_id, 2, 7, 40, 302.0)
    record.paid(7, 40, 303.0)
    assert invariants.counts[Invariant.GHOST_LEASE] == found
    record.earned(node_id, 1, 8, 40, 302.0)
    record.paid(8, 40, 303.0)
    assert invariants.counts[Invariant.GHOST_LEASE] == found + 1


def test_a_node_that_works_on_without_a_lease_is_found_once_it_could_have_known() -> None:
    for works, heard_at, found in ((True, None, 1), (False, None, 0), (True, 10.0, 0)):
        agenda, invariants = Agenda(), Invariants()
        record = LeaseRecord(agenda, invariants, 15.0, lambda: 0.0)
        record.granted(NodeId("home"), 1)
        record.silent(NodeId("home"), 0.0, lambda works=works: works)
        if heard_at is not None:
            agenda.at(heard_at, record.renewed, NodeId("home"), 1)
        agenda.run_until(15.0 + MARGIN_SECONDS - 0.1)
        assert invariants.break_count == 0
        agenda.run_until(15.0 + MARGIN_SECONDS + 0.1)
        assert invariants.break_count == found


def skewed(skew_max: float, monkeypatch: pytest.MonkeyPatch) -> tuple[set[Invariant], list[tuple[float, ...]]]:
    """Worlds in which every clock runs wrong by so much at most and lines break for longer than a lease; what broke, and when all ended."""
    monkeypatch.setattr(faults, "SKEW_MAX", skew_max)
    scenario = replace(fault_mix(300.0), faults=replace(FAULTS, cut_seconds=20, skewed_share=1.0))
    found: set[Invariant] = set()
    ends: list[tuple[float, ...]] = []
    for seed in range(4):
        played = World(scenario, "ours", seed)
        played.run()
        found |= set(played.invariants.counts)
        ends.append(tuple(request.ended_at for request in played.requests))
    return found, ends


def test_clocks_that_run_a_twentieth_wrong_change_what_happens_and_no_node_outlives_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    skew_max = faults.SKEW_MAX
    right, wrong = skewed(0.0, monkeypatch), skewed(skew_max, monkeypatch)

    assert not right[0]
    assert not wrong[0]
    assert all(one != other for one, other in zip(right[1], wrong[1], strict=True))


def test_clocks_that_run_wronger_than_the_margin_allows_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Invariant.GHOST_LEASE in skewed(0.3, monkeypatch)[0]


@pytest.mark.parametrize(("shift", "invariant"), [(-1, Invariant.TOKEN_REPEATED), (1, Invariant.TOKEN_LOST)])
def test_an_answer_that_goes_on_at_the_wrong_token_is_found(shift: int, invariant: Invariant, monkeypatch: pytest.MonkeyPatch) -> None:
    work = coordinator_model.Work

    def shifted(attempt_id, epoch, prompt_tokens, answer_tokens, first_token_index, prefixes):
        return work(attempt_id, epoch, prompt_tokens, answer_tokens, first_token_index + (shift if first_token_index else 0), prefixes)

    monkeypatch.setattr(coordinator_model, "Work", shifted)
    assert invariant in breaks(*range(4))


def test_a_prompt_that_is_charged_with_every_attempt_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    settle = books.Books.settle
    monkeypatch.setattr(
        books.Books, "settle", lambda self, attempt_id, amount, now: settle(self, attempt_id, amount + 100, now) if amount else 0
    )
    assert Invariant.CHARGED_TWICE in breaks(1)


def test_a_hold_that_is_settled_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    settle = books.Books.settle
    monkeypatch.setattr(
        books.Books,
        "settle",
        lambda self, attempt_id, amount, now: settle(self, attempt_id, amount, now) + settle(self, attempt_id, amount, now),
    )
    # The live ledger's own rule stops it; without that rule it is found.
    assert not breaks(1)
    monkeypatch.setattr(books, "judge", lambda hold, command, epoch: None)
    assert Invariant.CHARGED_TWICE in breaks(1)


def test_postings_that_do_not_sum_to_zero_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    settlement = books.settlement

    def without_fee(hold, amount, fee):
        whole = settlement(hold, amount, fee)
        return None if whole is None else SimpleNamespace(transaction_id=whole.transaction_id, postings=whole.postings[:-1])

    monkeypatch.setattr(books, "settlement", without_fee)
    assert Invariant.SUM_NOT_ZERO in breaks(1)


def test_a_queue_that_nobody_serves_is_found() -> None:
    found = set()
    for seed in range(3):
        played = world(seed)
        # Everybody waits, and nobody's turn comes.
        played.policy.arrive = lambda request, now, policy=played.policy: waits(policy, request, now)
        played.policy.next_up = lambda now: None
        played.run()
        found |= set(played.invariants.counts)
    assert found == {Invariant.IDLE_WHILE_WAITING}


@pytest.mark.parametrize("slot_count_used", [1, 3])
def test_a_coordinator_that_uses_some_of_its_slots_only_is_found(slot_count_used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of five: each node has something to do all the time, and room for more.
    monkeypatch.setattr(ours_pool, "slots_in_pace", lambda slot_count, *_: min(slot_count, slot_count_used))
    assert breaks(*range(4)) == {Invariant.IDLE_WHILE_WAITING}


def test_a_cool_card_that_nobody_looks_at_any_more_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    hot_room = HeatModel(ambient_celsius=40, celsius_per_watt=0.16)
    node_class = NodeClass("hot", 1, EngineModel(2500, 0.02, 0.001, kv_tokens=8000), hot_room, power_is_set=False)
    scenario = Scenario("hot-room", "", 1.5, (node_class,), (Users("people", requests_per_second=2, retries_max=0),))
    # It is held back again and again, by all that its policy has, and for half an hour at last.
    figures = World(scenario, "ours", 1).run()
    assert figures.users["people"].refused_count > 9000
    assert not figures.breaks

    monkeypatch.setattr(Cards, "is_settled", lambda self: self.celsius < 46 and self.orders.slot_count == 0)
    assert World(scenario, "ours", 1).run().break_counts == {Invariant.HELD_BACK_COOL.value: 2}


def waits(policy, request, now):
    policy._pool.now = now
    words = policy._words[request] = coordinator_words(request)
    words.work = policy._pool.expectations.work(words.live)
    return policy._keep(words, words.work, now, 10.0)


def coordinator_words(request):
    from potluck_coordinator.simulation.ours_words import Words

    return Words(request)


def test_faults_are_felt_and_answers_survive_them() -> None:
    played = world(2, seconds=600)
    figures = played.run()
    survived = [request for request in played.requests if request.outcome is Outcome.SERVED and request.attempt_count > 1]
    continued = [request for request in survived if request.attempt_count > 1 and request.delivered_tokens == request.answer_tokens]

    assert figures.lost_attempt_count > 20
    assert len(continued) > 10
    assert figures.refused_frame_count > 0


def test_nothing_is_left_open_when_the_users_stop() -> None:
    calm = world(1)
    calm.scenario = replace(calm.scenario, hours=0.2)
    for crowd in calm.crowds.values():
        crowd._until = 60.0
    calm.run()

    assert all(request.outcome is not Outcome.OPEN for request in calm.requests)
    assert calm.coordinator.books.open_count == 0
    assert not calm.coordinator.attempts
