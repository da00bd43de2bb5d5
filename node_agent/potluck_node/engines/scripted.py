"""The engine kind `scripted`: says what a JSON script says, for tests and benchmarks of everything around an engine.

Decides that the first answer, which proves readiness, is free of the script's faults. `scripted_server` is the process.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from potluck_node.engines.base import EngineLaunch, EngineProbe
from potluck_protocol.values import Endpoint
from potluck_protocol.version import package_version


@dataclass(frozen=True, slots=True)
class ScriptedEngine:
    """See the module."""

    kind: str = "scripted"
    endpoints: tuple[Endpoint, ...] = (Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS, Endpoint.EMBEDDINGS)

    @property
    def version(self) -> str:
        return f"potluck {package_version()}"

    def arguments(self, launch: EngineLaunch) -> tuple[str, ...]:
        return (
            *("-m", "potluck_node.engines.scripted_server", "--lifeline"),
            *("--model", str(launch.model_path), "--alias", launch.model_id),
            *("--context", str(launch.context_length_tokens), "--slots", str(launch.slot_count)),
            *(("--stage",) if launch.group is not None and launch.group.rank > 0 else ()),
        )

    @property
    def variables(self) -> dict[str, str]:
        return {}

    def probe(self, launch: EngineLaunch) -> EngineProbe:
        # The script's faults are for requests; a start that is to fail says so by a file that is no script.
        sound = {"ttft_ms": 0, "fail_status": None, "break_after_tokens": None, "hang_after_tokens": None, "exit_after_tokens": None}
        body = {"model": launch.model_id, "prompt": "Hello", "max_tokens": 1, "scripted": sound}
        return EngineProbe(Endpoint.COMPLETIONS, json.dumps(body).encode())
