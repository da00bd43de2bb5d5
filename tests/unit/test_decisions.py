"""What is kept of the decisions over requests: within bounds, for those who may see it, and what it says of one node."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.domain.decisions import KEPT_SECONDS, STEPS_MAX, StepKind
from potluck_coordinator.gateway import decisions as decisions_module
from potluck_coordinator.gateway.decisions import Decisions
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
