"""Hostile model folders through the node's own store: none may come out of it, and each refusal must name its reason.

    python -m tests.chaos.hostile_models --count 200

prints a line for each kind of harm, and exits 1 if a model was loaded, if a refusal does not read as it should, or if the sound model that
all of them are made from was refused.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import structlog.testing

from potluck_node.model_store.download import FetchFailedError
from potluck_node.model_store.store import ModelStore
from potluck_node.model_store.verification import FileMismatchError
from potluck_protocol.values import ModelFile
from tests.support.hostile_models import HostileCase, good_model, hostile_cases

REASON_CHARACTERS_MAX = 600


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the store made of one case; an empty reason stands for a model that would have been loaded."""

    case: HostileCase
    reason: str
    owners_reason: str
    """What only the log of the node says: the coordinator is not told how a file of the owner's differs."""

    @property
    def fault(self) -> str:
        if not self.reason:
            return "LOADED"
        one_line = "\n" not in self.reason and len(self.reason) <= REASON_CHARACTERS_MAX
        as_it_should = re.fullmatch(self.case.reason, self.reason) and (self.owners_reason or "does not match" not in self.reason)
        return "" if one_line and as_it_should else f"not refused for {self.case.reason!r}"


async def outcome(store: ModelStore, case: HostileCase) -> Outcome:
    with structlog.testing.capture_logs() as logs:
        reason = await refusal(store, case.model)
    return Outcome(case, reason, next((log["reason"] for log in logs if log["event"] == "folder_model_not_its_pin"), ""))


async def refusal(store: ModelStore, model: ModelFile) -> str:
    """Why the store gives no path for this model; empty where it does."""
    try:
        await store.ensure(model, keep=frozenset(), on_progress=lambda _: None)
    except (FetchFailedError, FileMismatchError, ValueError) as error:
        return str(error)
    return ""


async def run(folder: Path, count: int, seed: int) -> list[Outcome]:
    """The control, which must be loaded, and then the cases; raises AssertionError where the control is not."""
    store = ModelStore(folder / "cache", disk_budget_bytes=None, environment=os.environ)
    control = await refusal(store, good_model(folder / "good"))
    assert not control, f"the sound model was refused: {control}"
    return [await outcome(store, case) for case in hostile_cases(folder / "cases", count, seed)]


def report(outcomes: list[Outcome]) -> str:
    """A line for each kind, with one of its reasons."""
    lines = []
    for kind in sorted({outcome.case.kind for outcome in outcomes}):
        of_kind = [outcome for outcome in outcomes if outcome.case.kind == kind]
        loaded = sum(not outcome.reason for outcome in of_kind)
        lines.append(f"{kind:32} {len(of_kind):4} tried {loaded:3} loaded   {(of_kind[0].owners_reason or of_kind[0].reason)[:120]}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.chaos.hostile_models", description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="potluck-hostile-") as folder:
        outcomes = asyncio.run(run(Path(folder), options.count, options.seed))
    print(report(outcomes))
    faults = [outcome for outcome in outcomes if outcome.fault]
    for outcome in faults:
        print(f"BROKEN {outcome.case.kind}: {outcome.fault}\n       {outcome.reason}")
    loaded = sum(not outcome.reason for outcome in outcomes)
    print(f"{len(outcomes)} hostile models, {loaded} loaded, {time.monotonic() - started:.0f} s")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
