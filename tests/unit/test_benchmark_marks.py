"""The benchmark's marks, table, document and picture, of made-up rounds."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks.arithmetic import Estimate
from tests.benchmarks.loss_traces import CUT, DOUBLED, HUNG, REFUSED, WHOLE, LossFigures, LossRow
from tests.benchmarks.marks import DETECTION_SECONDS_MAX, MARKS, OURS, Rounds, Verdict, loss_verdicts, verdicts
from tests.benchmarks.outcome import Outcome, Standing, document, outcome_of
from tests.benchmarks.peer_contenders import ROOT, STARTS
from tests.benchmarks.plot import draw
from tests.benchmarks.report import table
from tests.benchmarks.turns import OF_THE_ENGINE, WORKLOADS, Turn
from tests.benchmarks.versions import versions

_GROUPS = {
    "direct": (),
    "Potluck": ("gateway", "directory", "driver"),
    "aiohttp relay": ("relay",),
    "gRPC relay": ("relay",),
    "sglang-router": ("relay",),
    "vllm-router": ("relay",),
    "LiteLLM": ("relay",),
    "Ray Serve, HAProxy": ("haproxy", "proxy", "replica", "controller", "driver"),
}
_NOT_COUNTED = {"Potluck": ("ray", "agent", "engine"), "gRPC relay": ("agent",), "Ray Serve, HAProxy": ("ray",)}
_COSTS = {
    "Potluck": 10.0,
    "aiohttp relay": 30.0,
    "gRPC relay": 20.0,
    "sglang-router": 25.0,
    "vllm-router": 50.0,
    "LiteLLM": 1000.0,
    "Ray Serve, HAProxy": 60.0,
}
_TIMES = {"direct": 1.0, "Potluck": 2.0, "vllm-router": 1.5, "LiteLLM": 21.0, "Ray Serve, HAProxy": 2.0, "sglang-router": 1.2}


def _turn(name: str) -> Turn:
    groups = (*_GROUPS[name], *_NOT_COUNTED.get(name, ())) or ("engine",)
    workloads = OF_THE_ENGINE if name == "direct" else tuple(WORKLOADS)
    keys = ("request_ms", "first_token_ms", "delay_p50_ms", "delay_p99_ms")
    return Turn(
        times=dict.fromkeys(keys, _TIMES.get(name, 1.0)),
        cpu={workload: dict.fromkeys(groups, _COSTS.get(name, 1.0)) for workload in workloads},
        foreign_cpu_share=0.01,
    )


_UNHARMED = LossFigures({WHOLE: 16, REFUSED: 0, CUT: 0, DOUBLED: 0, HUNG: 0}, 0.5, [0.4, 0.5], 20, 0, 0.5)
_HARMED = LossFigures({WHOLE: 8, REFUSED: 1, CUT: 2, DOUBLED: 1, HUNG: 4}, 0.02, [], 20, 3, None)


def _outcome(without: str = "") -> Outcome:
    names = [name for name in _GROUPS if name != without]
    return Outcome(
        rounds=Rounds({name: [_turn(name)] * 3 for name in names}, {name: _GROUPS[name] for name in names}),
        standings={
            name: Standing(
                dict.fromkeys((*_GROUPS[name], *_NOT_COUNTED.get(name, ())), 2**20),
                dict.fromkeys((*_GROUPS[name], *_NOT_COUNTED.get(name, ())), 1.0),
            )
            for name in names
        },
        losses=[LossRow("Potluck", "engine", "SIGSTOP", True, _UNHARMED), LossRow("HAProxy", "engine", "SIGSTOP", True, _HARMED)],
        absent={without: "cannot be installed: no network"} if without else {},
        stumbles={},
        versions={"Potluck": "0 (abc)", "processor": "2 x some"},
        command="python -m tests.benchmarks.relay",
        seed=7,
        pinned=True,
        seconds=60.0,
    )


@pytest.mark.parametrize(
    ("found", "met"),
    [(Estimate(1.0, 0.9, 2.0), True), (Estimate(1.0, 0.9, 2.1), False), (Estimate(3.0, 2.9, 3.1), False), (None, None)],
)
def test_a_mark_is_met_by_the_worse_end_of_its_interval(found: Estimate | None, met: bool | None) -> None:
    assert Verdict("a cost", 2.0, "x", found).met is met


def _found(outcome: Outcome) -> dict[str, Verdict]:
    return {verdict.name: verdict for verdict in verdicts(outcome.rounds)}


def test_every_mark_names_a_peer_that_there_is_and_a_workload_that_is_run() -> None:
    assert {mark.peer for mark in MARKS} <= set(STARTS)
    rounds = _outcome().rounds
    assert all(len(mark.values(rounds, who)) == 3 for mark in MARKS for who in (OURS, mark.peer))


def test_the_documentation_names_the_same_bounds() -> None:
    text = (ROOT / "docs/benchmarks/README.md").read_text()
    rows = re.findall(r"^\| .*\| ([\d.]+)(?: s)? \|$", text.split("## The marks")[1].split("\n#")[0], re.MULTILINE)
    assert [float(bound) for bound in rows] == [*(mark.bound for mark in MARKS), 0, 0, DETECTION_SECONDS_MAX]


def test_the_marks_compare_the_coordinator_alone_and_the_agent_for_itself() -> None:
    found = {name: verdict.estimate.median for name, verdict in _found(_outcome()).items() if verdict.estimate is not None}
    assert len(found) == len(MARKS)
    # Of Potluck's six groups three count, at 10 each.
    assert found["CPU per token, 64 streams (coalesced), to sglang-router"] == pytest.approx(30 / 25)
    assert found["CPU per request, 32 at once, to LiteLLM"] == pytest.approx(30 / 1000)
    assert found["agent's CPU per token, 64 streams, to aiohttp relay"] == pytest.approx(10 / 30)


def test_the_least_that_such_a_relay_can_do_stands_beside_and_judges_nothing() -> None:
    found = _found(_outcome())
    crowd = found["CPU per request, 32 at once, to LiteLLM"]
    assert crowd.floor is not None
    assert (crowd.floor.median, crowd.met) == (pytest.approx(20 / 1000), True)
    assert "NOT MET  CPU per token, 64 streams (coalesced), to sglang-router: 1.20, at most 1.1 (gRPC relay 0.8)" in table(_outcome())
    without = _found(_outcome(without="gRPC relay"))
    assert {name: verdict.met for name, verdict in without.items()} == {name: verdict.met for name, verdict in found.items()}
    assert all(verdict.floor is None for verdict in without.values())


def test_latencies_are_compared_by_what_each_adds_to_the_engine() -> None:
    found = {name: verdict.estimate.median for name, verdict in _found(_outcome()).items() if verdict.estimate is not None}
    assert found["added latency, an idle request, to LiteLLM"] == pytest.approx(1 / 20)
    assert found["added latency, an idle request, to vllm-router"] == pytest.approx(2)
    # A token's delay is what the client waits: the engine's own part is in it.
    assert found["one-way token delay, p50, 16 streams, to vllm-router"] == pytest.approx(2.0 / 1.5)


def test_a_peer_that_could_not_run_costs_its_own_row_and_its_marks_alone() -> None:
    outcome = _outcome(without="LiteLLM")
    unmeasured = {name for name, verdict in _found(outcome).items() if verdict.met is None}
    assert unmeasured == {name for name in _found(outcome) if name.endswith("LiteLLM")}
    printed = table(outcome)
    assert "LiteLLM: not measured: cannot be installed: no network" in printed
    assert "not measured  CPU per request, 32 at once, to LiteLLM" in printed
    assert "PROVISIONAL" not in printed


@pytest.mark.parametrize("without", ["", "LiteLLM"])
def test_what_was_kept_is_shown_as_it_was_found(without: str) -> None:
    outcome = _outcome(without)
    assert table(outcome_of(json.loads(json.dumps(document(outcome))))) == table(outcome)


def test_the_kept_table_is_that_of_the_kept_figures() -> None:
    kept = ROOT / "docs/benchmarks"
    assert table(outcome_of(json.loads((kept / "relay-peers.json").read_text()))) + "\n" == (kept / "relay-peers.txt").read_text()


def test_a_loss_must_harm_nobody_and_a_freeze_be_passed_soon() -> None:
    assert [verdict.met for verdict in loss_verdicts(_outcome().losses)] == [True, True]
    late = replace(_UNHARMED, noticed_after_seconds=2.1)
    probes = replace(_UNHARMED, probe_failed_count=1)
    never = replace(_HARMED, probe_failed_count=0)
    for figures, met in ((late, [True, False]), (probes, [False, True]), (never, [False, False])):
        assert [verdict.met for verdict in loss_verdicts([LossRow("Potluck", "node", "SIGSTOP", True, figures)])] == met
    killed = loss_verdicts([LossRow("Potluck", "node", "kill -9", False, late)])
    assert [verdict.met for verdict in killed] == [True]
    assert loss_verdicts([LossRow("HAProxy", "engine", "kill -9", False, _HARMED)]) == []


def test_a_freeze_that_nobody_ever_noticed_is_no_figure_but_endless() -> None:
    _, seconds = loss_verdicts([LossRow("Potluck", "node", "SIGSTOP", True, replace(_HARMED, probe_failed_count=0))])
    assert seconds.estimate == Estimate(math.inf, math.inf, math.inf)
    outcome = replace(_outcome(), losses=[LossRow("Potluck", "node", "SIGSTOP", True, _HARMED)])
    written = json.loads(json.dumps(document(outcome), allow_nan=False))
    assert (written["marks"][-1]["estimate"]["high"], written["marks"][-1]["met"]) == (None, False)


def test_a_peer_that_adds_nothing_cannot_be_kept_up_with() -> None:
    rounds = _outcome().rounds
    free = [replace(turn, times={**turn.times, "request_ms": 0.9}) for turn in rounds.turns["vllm-router"]]
    found = _found(replace(_outcome(), rounds=replace(rounds, turns={**rounds.turns, "vllm-router": free})))
    assert found["added latency, an idle request, to vllm-router"].met is False


def test_potluck_may_break_no_answer_off() -> None:
    outcome = _outcome()
    named = {verdict.name: verdict.met for verdict in replace(outcome, stumbles={"Potluck": 1, "LiteLLM": 2}).verdicts}
    assert named["turns with an answer refused or not whole"] is False
    assert next(verdict.met for verdict in outcome.verdicts if verdict.name.startswith("turns")) is True


def test_the_table_and_the_document_tell_the_same() -> None:
    outcome = _outcome()
    printed, written = table(outcome), json.loads(json.dumps(document(outcome)))
    assert "met  added latency, an idle request, to LiteLLM: 0.05, at most 0.12" in printed
    assert "NOT MET  CPU per token, 64 streams (coalesced), to sglang-router: 1.20, at most 1.1" in printed
    assert "agent, at the node" in printed
    assert "seed 7" in printed
    assert [mark["met"] for mark in written["marks"]] == [verdict.met for verdict in outcome.verdicts]
    assert written["provisional"] is False
    assert set(written["rounds"]) == set(_GROUPS)
    assert written["losses"][1]["figures"]["ends"] == _HARMED.ends


def test_a_busy_neighbour_makes_the_figures_provisional() -> None:
    outcome = _outcome()
    busy = {name: [replace(turn, foreign_cpu_share=0.4) for turn in turns] for name, turns in outcome.rounds.turns.items()}
    assert "PROVISIONAL: others used 40%" in table(replace(outcome, rounds=replace(outcome.rounds, turns=busy)))


def test_a_run_of_losses_alone_has_no_costs_to_show() -> None:
    printed = table(replace(_outcome(), rounds=Rounds({}, {}), standings={}))
    assert "CPU in us" not in printed
    assert "HAProxy: SIGSTOP of an engine" in printed


def test_the_same_figures_give_the_same_picture(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path in paths:
        draw(_outcome(), path)
    assert paths[0].stat().st_size > 5000
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_versions_name_every_contender_and_the_machine() -> None:
    found = versions([name for name in STARTS if name != "HAProxy"])
    assert found["sglang-router"][0].isdigit()
    assert found["Ray Serve"] == found["Ray Serve, HAProxy"]
    assert {"Python", "kernel", "processor", "Potluck"} <= set(found)
    assert all(found.values())
