"""What an engine is to the supervisor: a command to run, and a question that proves it answers.

Decides what a kind of engine must tell. Each kind has an `Engine` here, named in `registry`, and may have a server process of its own
beside it. It must not know when an engine is started or stopped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from potluck_node.domain.step_down import UTILIZATION_PERCENT_NOTCHES
from potluck_protocol.values import Endpoint, EngineShape, GroupPlace, ModelId

FAILURE_CHARACTERS_MAX: Final = 2_000
"""A failure travels in every heartbeat until it is mended."""
WHOLE: Final = EngineShape()
"""An engine that takes the machine as it finds it."""


@dataclass(frozen=True, slots=True)
class EngineLaunch:
    """What one engine is to serve."""

    model_id: ModelId
    model_path: Path
    """The model's one file, or the folder that holds its several files and nothing else."""
    slot_count: int
    context_length_tokens: int
    """Of one slot: prompt and answer together."""
    shape: EngineShape = WHOLE
    memory_utilization_percent: int = UTILIZATION_PERCENT_NOTCHES[0]
    """Of each card, or of `shape.memory_bytes` without cards; lower after a start that ran out of memory."""
    group: GroupPlace | None = None
    attached_name: str = ""
    """What an attached engine calls its model, to the letter: as a path, "./a" would be "a"."""


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where an engine answers, on loopback."""

    url: str
    """Its root, such as "http://127.0.0.1:40123"."""
    api_key: str = field(default="", repr=False)
    """Sent as a bearer's, where the engine asks for one."""

    @property
    def headers(self) -> dict[str, str]:
        """What every request to the engine carries."""
        return {"content-type": "application/json", **({"authorization": f"Bearer {self.api_key}"} if self.api_key else {})}


@dataclass(frozen=True, slots=True)
class EngineProbe:
    """A request that only an engine at work can answer: it asks for one token."""

    endpoint: Endpoint
    body: bytes
    limit_seconds: float = 120.0
    """For the answer; some engines compile for their first one."""


def one_token_probe(launch: EngineLaunch) -> EngineProbe:
    """Asks for one token. Not a chat: a base model without a chat template must become ready as well."""
    return EngineProbe(Endpoint.COMPLETIONS, json.dumps({"model": launch.model_id, "prompt": "Hello", "max_tokens": 1}).encode())


class Engine(Protocol):
    """One kind of engine."""

    @property
    def kind(self) -> str:
        """The catalogue's word for it."""
        ...

    @property
    def version(self) -> str:
        """Of the engine's own software."""
        ...

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """What it can be asked."""
        ...

    def arguments(self, launch: EngineLaunch) -> tuple[str, ...]:
        """The arguments after `python` that start it.

        It then prints one line of JSON, {"url": "http://127.0.0.1:PORT"}, with an "api_key" beside it where it asks for one. A group's
        member that does not lead has no url: {"url": ""}. The arguments ask for `lifeline`, so that the engine ends with the agent.
        """
        ...

    @property
    def variables(self) -> dict[str, str]:
        """Of its environment, beside what every engine sees of the agent's: what is nobody's to read among its arguments."""
        ...

    def probe(self, launch: EngineLaunch) -> EngineProbe:
        """What readiness is asked with."""
        ...
