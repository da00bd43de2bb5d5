"""What is kept of the decisions over requests: within bounds, for those who may see it, and what it says of one node."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.cost import Cost
from potluck_coordinator.domain.decisions import KEPT_SECONDS, STEPS_MAX, StepKind, told_terms
from potluck_coordinator.gateway import decisions as decisions_module
from potluck_coordinator.gateway.decisions import REFUSED_MAX, STORIES_MAX, Decisions
from potluck_protocol.values import AccountId, RequestId
from tests.support.request_path import request_by


class HandClock:
    def __init__(self):
        self.seconds = 100.0

    def monotonic_seconds(self):
        return self.seconds

    def unix_ms(self):
        return int(self.seconds * 1000)


@pytest.fixture
def clock():
    return HandClock()


@pytest.fixture
def decisions(clock):
    return Decisions(clock)


def asked(name="req_1", account="ana"):
    return replace(request_by(AccountId(account)), request_id=RequestId(name))


def anyone(_account_id):
    return True


def test_a_story_has_its_steps_in_their_order_with_the_time_of_each(decisions, clock):
    request = asked()
    decisions.arrived(request)
    clock.seconds += 2
    decisions.note(request, StepKind.WAITS, "all slots are taken")
    clock.seconds += 3
    decisions.note(request, StepKind.ANSWERED)
    story = decisions.story(request.request_id, anyone)
    assert [(step.kind, step.at_seconds - story.arrived_at_seconds) for step in story.steps] == [
        (StepKind.WAITS, 2),
        (StepKind.ANSWERED, 5),
    ]


def kept(decisions):
    return [story.request_id for story in decisions.stories]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(decisions_module, "STORIES_MAX", 6)
    monkeypatch.setattr(decisions_module, "REFUSED_MAX", 4)


def refuse(decisions, request):
    decisions.arrived(request)
    decisions.note(request, StepKind.REFUSED)


def test_a_flood_of_one_accounts_costs_another_nothing(decisions, small):
    decisions.arrived(asked("polite", "bob"))
    refuse(decisions, asked("refused", "bob"))
    for number in range(50):
        decisions.arrived(asked(f"req_{number}"))
        refuse(decisions, asked(f"no_{number}"))
    assert kept(decisions)[:2] == ["polite", "refused"]
    ours = kept(decisions)[2:]
    assert [name for name in ours if name.startswith("req")] == [f"req_{number}" for number in range(46, 50)]
    assert [name for name in ours if name.startswith("no")] == ["no_47", "no_48", "no_49"]


def test_refused_requests_are_not_kept_at_the_cost_of_answered_ones(decisions, small):
    answered = [asked(f"ok_{number}", f"person {number}") for number in range(5)]
    for request in answered:
        decisions.arrived(request)
        decisions.note(request, StepKind.PLACED)
        decisions.note(request, StepKind.ANSWERED)
    for number in range(50):
        refuse(decisions, asked(f"no_{number}", f"sybil {number}"))
    assert kept(decisions) == [*(request.request_id for request in answered), "no_46", "no_47", "no_48", "no_49"]
    lost = asked("ok_5", "person 5")
    decisions.arrived(lost)
    decisions.note(lost, StepKind.PLACED)
    decisions.note(lost, StepKind.FAILED)
    decisions.note(lost, StepKind.REFUSED)  # nobody could go on with it: that is no refusal at the door
    for number in range(50, 60):
        refuse(decisions, asked(f"no_{number}", f"sybil {number}"))
    assert "ok_5" in kept(decisions)


@given(arrivals=st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["refused", "placed", "waits"])), max_size=120))
def test_whoever_has_no_more_than_his_share_loses_nothing(arrivals):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decisions_module, "STORIES_MAX", 9)
        patch.setattr(decisions_module, "REFUSED_MAX", 4)
        decisions = Decisions(HandClock())
        names: dict[tuple[str, bool], list[str]] = {}
        for number, (account, kind) in enumerate(arrivals):
            request = asked(f"req_{number}", account)
            decisions.arrived(request)
            decisions.note(request, StepKind(kind))
            names.setdefault((account, kind == "refused"), []).append(request.request_id)
            stories = kept(decisions)
            assert len(stories) <= 9 + 4
            for (_, is_refused), own in names.items():
                # A quarter of each shelf; of the one for answers a place is kept for whoever comes next.
                assert set(own[-1 if is_refused else -2 :]) <= set(stories)


def test_a_flood_costs_no_more_at_its_end_than_at_its_beginning(decisions, monkeypatch):
    looked = []
    monkeypatch.setattr(decisions_module, "is_over", lambda story, now: looked.append(story) or False)
    for number in range(3 * STORIES_MAX):
        refuse(decisions, asked(f"no_{number}")) if number % 2 else decisions.arrived(asked(f"req_{number}"))
    assert len(looked) <= 3 * STORIES_MAX
    assert len(decisions.stories) == STORIES_MAX - 1 + REFUSED_MAX, "the newest was refused, and left its room to the next"


def test_what_a_stranger_is_told_of_a_cost_adds_up_and_hides_the_nodes_habits():
    cost = Cost(0.031, 0.5, 0.25, 2.0, 0.15, 0.017)
    assert told_terms(cost, tells_habits=True) == {
        "line": 0.031,
        "waiting": 0.5,
        "reading": 0.25,
        "writing": 2.0,
        "cache": 0.15,
        "loss": 0.017,
    }
    assert told_terms(cost, tells_habits=False) == {"waiting": 0.5, "reading": 0.25, "rest": 2.2}


_SECONDS = st.integers(0, 10_000).map(lambda thousandths: thousandths / 1024)  # sums of these are exact


@given(terms=st.tuples(*[_SECONDS] * 6), moved=st.integers(0, 1024).map(lambda part: part / 1024))
def test_no_number_that_a_stranger_sees_changes_with_the_loss_if_the_answer_takes_that_much_less(terms, moved):
    cost = Cost(*terms)
    other = cost._replace(loss_seconds=cost.loss_seconds + moved, writing_seconds=cost.writing_seconds - moved)
    assert told_terms(other, tells_habits=False) == told_terms(cost, tells_habits=False)
    rest = told_terms(cost, tells_habits=False)["rest"]
    assert rest == round(rest, 2), "nor by what is finer than a hundredth"


def test_who_may_not_see_an_account_sees_no_story_of_it(decisions):
    for account in ("ana", "bob"):
        decisions.arrived(asked(account=account))
    story = decisions.story(RequestId("req_1"), lambda account_id: account_id == AccountId("ana"))
    assert story.account_id == AccountId("ana"), "though somebody else chose the same name later"
    assert decisions.story(RequestId("req_1"), lambda _: False) is None


def test_a_name_used_again_shows_the_newest_request(decisions, clock):
    decisions.arrived(asked())
    decisions.note(asked(), StepKind.REFUSED)
    clock.seconds += 1
    decisions.arrived(asked())
    assert decisions.story(RequestId("req_1"), anyone).steps == ()


def test_stories_and_their_steps_are_bounded_and_forgotten(decisions, clock, monkeypatch):
    monkeypatch.setattr(decisions_module, "STORIES_MAX", 3)
    for number in range(5):
        decisions.arrived(asked(f"req_{number}"))
    assert [story.request_id for story in decisions.stories] == ["req_2", "req_3", "req_4"]
    decisions.note(asked("req_0"), StepKind.ANSWERED)  # of one that is forgotten, nothing comes back
    assert decisions.story(RequestId("req_0"), anyone) is None
    for _ in range(STEPS_MAX + 5):
        decisions.note(asked("req_4"), StepKind.FAILED)
    assert len(decisions.story(RequestId("req_4"), anyone).steps) == STEPS_MAX
    clock.seconds += KEPT_SECONDS + 1
    decisions.arrived(asked("req_9"))
    assert [story.request_id for story in decisions.stories] == ["req_9"]
