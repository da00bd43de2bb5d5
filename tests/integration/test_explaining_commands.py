"""`potluck explain REQUEST_ID`, `why-queued` and `why-not-my-node`, as a terminal shows them; what the coordinator says is scripted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import pool_pb2
from tests.support.scripted_pool import API_KEY, ScriptedPool, scripted_pool
from tests.support.terminal import Terminal, lonely_terminal

CHOSEN = pool_pb2.PlacementCandidate(
    node_id="den",
    replica_id="den/m",
    replica_count=1,
    chosen=True,
    reason="chosen (warm)",
    cost_seconds=1.25,
    terms=[pool_pb2.CostTerm(name="reading", seconds=0.25), pool_pb2.CostTerm(name="writing", seconds=1.0)],
)
BUSY = pool_pb2.PlacementCandidate(replica_count=7, reason="busy")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Terminal:
    return lonely_terminal(monkeypatch, capsys, tmp_path)


@pytest.fixture
def pool(tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedPool]:
    with scripted_pool(tmp_path) as running:
        monkeypatch.setenv("POTLUCK_URL", running.url)
        monkeypatch.setenv("POTLUCK_API_KEY", API_KEY)
        yield running


def story() -> pool_pb2.ExplainRequestResponse:
    return pool_pb2.ExplainRequestResponse(
        request_id="req_1",
        account_id="ana",
        model_id="m",
        arrived_at_unix_ms=1_700_000_000_000,
        steps=[
            pool_pb2.RequestStep(elapsed_ms=0, kind="waits", words="all slots are taken"),
            pool_pb2.RequestStep(elapsed_ms=1500, kind="placed", node_id="den", candidates=[CHOSEN, BUSY]),
            pool_pb2.RequestStep(elapsed_ms=4000, kind="answered", node_id="den"),
        ],
    )


def test_a_story_has_a_line_for_each_step_and_the_cost_of_each_candidate(pool: ScriptedPool, terminal: Terminal):
    pool.operator_replies.extend([story(), story()])
    assert terminal.run("explain", "req_1") == 0
    first, waits, placed, header, won, lost, answered = terminal.out.splitlines()
    assert first == "req_1: m, arrived 2023-11-14 22:13 UTC"
    assert waits.split() == ["0.000", "s", "waits:", "all", "slots", "are", "taken"]
    assert placed.split() == ["1.500", "s", "placed", "den"]
    assert header.split() == ["CANDIDATE", "COST", "MADE", "OF", "WHY"]
    assert " ".join(won.split()) == "* den 1.250 s reading 0.250, writing 1.000 chosen (warm)"
    assert " ".join(lost.split()) == "7 replicas - - busy"
    assert answered.split() == ["4.000", "s", "answered", "den"]
    assert terminal.run("explain", "req_1", "--json") == 0
    shown = json.loads(terminal.out)
    assert shown["steps"][1]["candidates"][0]["terms_seconds"] == {"reading": 0.25, "writing": 1.0}
    assert shown["steps"][1]["candidates"][1]["cost_seconds"] is None


def test_a_request_with_a_name_of_its_own_is_asked_for_as_a_request(pool: ScriptedPool, terminal: Terminal):
    pool.operator_replies.append(story())
    assert terminal.run("explain", "my-job-7", "--request") == 0
    assert isinstance(pool.operator_requests[-1], pool_pb2.ExplainRequestRequest)


def test_a_waiting_request_says_its_place_and_what_it_waits_for(pool: ScriptedPool, terminal: Terminal):
    pool.operator_replies.append(
        pool_pb2.ExplainWaitingResponse(
            waiting=True,
            words="req_1 waits in the flex tier: slots.",
            position=3,
            waiting_count=9,
            waited_ms=2500,
            predicted_wait_ms=4000,
            deadline_ms=30_000,
            candidates=[BUSY],
        )
    )
    assert terminal.run("why-queued", "req_1") == 0
    assert terminal.out.splitlines()[:3] == [
        "req_1 waits in the flex tier: slots.",
        "Position 3 of 9; waited 2.5 s, still to wait: 4.0 s.",
        "Refused if it has no turn within 30 s of its arrival.",
    ]


def test_one_that_does_not_wait_says_so_and_no_more(pool: ScriptedPool, terminal: Terminal):
    pool.operator_replies.append(pool_pb2.ExplainWaitingResponse(words="req_1 does not wait: answered."))
    assert terminal.run("why-queued", "req_1") == 0
    assert terminal.out == "req_1 does not wait: answered.\n"


def test_a_nodes_share_has_a_line_for_each_replica(pool: ScriptedPool, terminal: Terminal):
    losses = [pool_pb2.LossReason(reason="slower", count=5), pool_pb2.LossReason(reason="busy", count=1)]
    verdict = pool_pb2.ReplicaVerdict(
        replica_id="den/m", model_id="m", slot_count=4, running_count=1, considered_count=8, chosen_count=2, losses=losses
    )
    paused = pool_pb2.ReplicaVerdict(replica_id="den/n", model_id="n", hurdle="paused", slot_count=2)
    pool.operator_replies.append(pool_pb2.ExplainNodeResponse(replicas=[verdict, paused], watched_seconds=60, placement_count=12))
    assert terminal.run("why-not-my-node", "den") == 0
    first, header, *rows = terminal.out.splitlines()
    assert first == "12 requests for its models were placed in the last 60 s."
    assert header.split() == ["REPLICA", "NOW", "SLOTS", "CONSIDERED", "CHOSEN", "LOST", "BY"]
    assert [" ".join(row.split()) for row in rows] == ["den/m takes requests 1/4 8 2 5 slower; 1 busy", "den/n paused 0/2 0 0 -"]


@pytest.mark.parametrize("code", [ErrorCode.PERMISSION_DENIED, ErrorCode.NOT_FOUND, ErrorCode.MODEL_NOT_FOUND])
def test_whoever_asks_for_a_request_as_for_a_model_is_told_how_to_ask(pool: ScriptedPool, terminal: Terminal, code: ErrorCode):
    pool.unary_refusals.append(PotluckError(code, "This is why not."))
    assert terminal.run("explain", "hello-1") != 0
    said = " ".join(terminal.err.split())
    assert said.startswith("error: This is why not. 'hello-1' was taken for a model; of a request: `potluck explain hello-1 --request`.")
    pool.operator_replies.append(story())
    assert terminal.run("explain", "hello-1", "--request") == 0


@pytest.mark.parametrize("arguments", [["explain", "req_1"], ["why-queued", "req_1"], ["why-not-my-node", "den"]])
def test_a_refusal_is_said(pool: ScriptedPool, terminal: Terminal, arguments: list[str]):
    pool.unary_refusals.append(PotluckError(ErrorCode.NOT_FOUND, "what and how to fix it"))
    assert terminal.run(*arguments) == 1
    assert terminal.err.startswith("error: what and how to fix it")
