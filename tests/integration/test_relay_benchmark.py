"""A small sample of `make bench`: real processes, every answer whole, every figure there. Never a time: the machine may be busy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks import relay
from tests.benchmarks.arithmetic import Estimate
from tests.benchmarks.marks import Verdict
from tests.benchmarks.outcome import Outcome, document
from tests.benchmarks.report import table
from tests.benchmarks.turns import OF_THE_ENGINE, WORKLOADS

pytestmark = pytest.mark.timeout(300)
# Fewer connections, fewer tokens: what each workload asks stays the same.
SMALL = {
    name: replace(load, connection_count=min(load.connection_count, 4), token_count=min(load.token_count, 15), asking_seconds=0.05)
    for name, load in WORKLOADS.items()
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> Outcome:
    plan = relay.Plan(("aiohttp relay",), round_count=1, seed=5, with_losses=False, command="a sample", workloads=SMALL)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(relay, "IDLE_SECONDS", 0.2)
        # Whatever comes short, doubled, out of order or not at all raises.
        return relay.run_benchmark(plan, tmp_path_factory.mktemp("bench"))


def test_every_contender_answers_every_workload_whole(outcome: Outcome) -> None:
    assert outcome.absent == outcome.stumbles == {}
    assert set(outcome.rounds.turns) == {"direct", "aiohttp relay", "Potluck"}
    for name, (turn,) in outcome.rounds.turns.items():
        assert set(turn.cpu) == (set(OF_THE_ENGINE) if name == "direct" else set(WORKLOADS))
        assert all(value > 0 for value in turn.times.values())


def test_what_each_process_of_the_path_spent_is_known(outcome: Outcome) -> None:
    (turn,) = outcome.rounds.turns["Potluck"]
    for workload, by_group in turn.cpu.items():
        assert set(by_group) == {"gateway", "directory", "driver", "ray", "agent", "engine"}
        # Flat out, so few tokens are there at once.
        assert workload == "flat out" or all(by_group[group] > 0 for group in ("gateway", "agent", "engine")), workload
    assert outcome.rounds.relay_groups["Potluck"] == ("gateway", "directory", "driver")
    assert all(bytes_ > 0 for bytes_ in outcome.standings["Potluck"].resident_bytes.values())


def test_the_document_is_complete_and_the_table_can_be_printed(outcome: Outcome, tmp_path: Path) -> None:
    written = json.loads(json.dumps(document(outcome)))
    assert (written["seed"], written["command"]) == (5, "a sample")
    assert {"Potluck", "aiohttp relay", "Python", "kernel", "processor"} <= set(written["versions"])
    judged = {mark["name"]: mark["met"] for mark in written["marks"]}
    assert judged["agent's CPU per token, 64 streams, to aiohttp relay"] in {True, False}
    assert judged["CPU per request, 32 at once, to LiteLLM"] is None
    assert "agent, at the node" in table(outcome)
    relay.draw(outcome, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("met", "status"), [(True, 0), (False, 1), (None, 0)])
def test_the_exit_status_says_whether_every_measured_mark_is_met(outcome: Outcome, monkeypatch, met: bool | None, status: int) -> None:
    found = None if met is None else Estimate(1.0, 1.0, 1.0 if met else 3.0)
    monkeypatch.setattr(Outcome, "verdicts", property(lambda _outcome: [Verdict("a mark", 2.0, "x", found)]))
    monkeypatch.setattr(relay.signal, "signal", lambda *_: None)
    monkeypatch.setattr(relay, "run_benchmark", lambda _plan, _folder: outcome)
    assert relay.main(["--no-losses"]) == status
