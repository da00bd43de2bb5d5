"""`potluck coordinator restart`: the gateways of the coordinator on this machine begin anew, one after another, and no answer is lost.

Decides what the operator sees of it. What is done is `ray_runtime`'s, in the coordinator's own process. It must not know actors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potluck_coordinator.control import ask
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.private_files import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from potluck_coordinator.settings import Settings


def restart(settings: Settings, drain_seconds_max: float, *, as_json: bool) -> Iterator[str]:
    """Line after line, as it goes on; raises COORDINATOR_UNAVAILABLE where no coordinator runs on the data folder."""
    try:
        control = Path(read_json(settings.endpoints_file)["control"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PotluckError(
            ErrorCode.COORDINATOR_UNAVAILABLE,
            f"No coordinator runs on {settings.data_dir}; start one with `potluck coordinator serve`, or name its folder with --data-dir.",
        ) from error
    before: dict[str, Any] = {}
    for step in ask(control, {"ask": "restart", "drain_seconds_max": drain_seconds_max}):
        if as_json:
            yield json.dumps(step)
        elif step != before:
            yield _words(step)
        before = step


def _words(step: dict[str, Any]) -> str:
    name, answers = f"gateway {step['gateway']}", step["answer_count"]
    match step["state"]:
        case "draining":
            return f"{name}: waits for {answers} answers to end, {step['node_count']} nodes to go"
        case "starting":
            broken_off = f"; {answers} answers were broken off, for they took too long" if answers else ""
            return f"{name}: starts again{broken_off}"
        case _:
            return f"{name}: serves"
