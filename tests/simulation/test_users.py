"""What modelled people do with what they are told: the same questions whatever the policy, and none that no node could take."""

from __future__ import annotations

from itertools import count
from random import Random

from potluck_coordinator.simulation.agenda import Agenda
from potluck_coordinator.simulation.asking import Outcome, Request
from potluck_coordinator.simulation.engine_model import EngineModel
from potluck_coordinator.simulation.scenario import NodeClass, Scenario, Users
from potluck_coordinator.simulation.users import Crowd

ENGINE = EngineModel(1000, 0.02, 0.001, kv_tokens=10_000)
CONTEXT_TOKENS = 4096
PEOPLE = Users(
    "people", people=3, turns_mean=50, think_seconds=5, prompt_tokens=300, prompt_spread=0, answer_tokens_max=1000, retries_max=2
)


def asked(answer_until: float, hours: float = 2.0, users: Users = PEOPLE) -> list[Request]:
    """What they ask a pool that answers after a second until then, and from then on refuses for an hour."""
    scenario = Scenario("s", "", hours, (NodeClass("n", 1, ENGINE, context_tokens=CONTEXT_TOKENS),), (users,))
    agenda, found = Agenda(), list[Request]()

    def ask(request: Request) -> None:
        found.append(request)
        is_down = answer_until <= agenda.now < answer_until + 3600
        request.outcome = Outcome.REFUSED if is_down else Outcome.SERVED
        request.retry_after_seconds = 10.0
        agenda.after(1.0, crowd.ended, request)

    crowd = Crowd(users, scenario, agenda, Random(1), count(1), ask)
    crowd.begin()
    agenda.run_until(scenario.seconds)
    return found


def test_a_conversation_is_over_before_it_is_longer_than_any_node_takes() -> None:
    requests = asked(answer_until=1e9)

    assert max(request.prompt_tokens for request in requests) > CONTEXT_TOKENS / 2
    assert all(request.prompt_tokens + PEOPLE.answer_tokens_max <= CONTEXT_TOKENS for request in requests)
    assert len({request.prefixes[0].key for request in requests}) > 3, "another one begins"


def test_whoever_gave_up_comes_back_to_the_same_question() -> None:
    requests = asked(answer_until=600)
    refused = [request for request in requests if request.outcome is Outcome.REFUSED]
    questions = {request.first_number for request in refused}

    # Each of the three had one question, and tried it in rounds of three with minutes between these.
    assert len(questions) == PEOPLE.people
    assert len(refused) > 3 * PEOPLE.people * (PEOPLE.retries_max + 1)
    served = [request for request in requests if request.outcome is Outcome.SERVED and request.first_number in questions]
    assert {request.first_number for request in served} == questions
    for request in served:
        (first, *_) = [one for one in refused if one.first_number == request.first_number]
        assert (request.prompt_tokens, request.answer_tokens, request.prefixes) == (
            first.prompt_tokens,
            first.answer_tokens,
            first.prefixes,
        )
