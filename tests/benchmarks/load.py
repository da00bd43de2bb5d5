"""The words that the harness and its load client share: what to ask of a target, and what came of it.

Decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

ANSWER_TOKENS: tuple[str, ...] = tuple(f" {letter}" for letter in "abcdefghijklmnopqrstuvw")
"""What the engine says, over and over. 23 tokens, so that a token lost, doubled or swapped shows in the text."""


def expected_text(token_count: int) -> str:
    """The one right answer of so many tokens."""
    return "".join(ANSWER_TOKENS[index % len(ANSWER_TOKENS)] for index in range(token_count))


@dataclass(frozen=True, slots=True)
class Load:
    """One run against one target: so many connections, each asking one request after the other."""

    streamed: bool
    connection_count: int
    requests_per_connection: int
    token_count: int
    stagger_ms: float = 0.0
    """The first requests are spread over so long, as requests that have nothing to do with each other are."""
    limit_seconds: float = 60.0
    """A run that takes longer has failed."""

    @property
    def steady(self) -> bool:
        """CPU is counted over the middle of all tokens, while every stream flows, so that no request's own cost is in it."""
        return self.streamed and self.requests_per_connection == 1

    @property
    def steady_tokens(self) -> tuple[int, int]:
        """After how many tokens of all streams together the middle begins and ends."""
        all_tokens = self.connection_count * self.token_count
        return all_tokens // 5, all_tokens * 4 // 5


@dataclass(frozen=True, slots=True)
class Target:
    """Where to ask, and the processes whose CPU time to read meanwhile, by what they are."""

    host: str
    port: int
    model: str
    authorization: str
    process_ids: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class LoadResult:
    """One run, as the client saw it. Times to first token are of every request, in milliseconds."""

    first_token_ms: tuple[float, ...]
    request_ms: tuple[float, ...]
    window_seconds: float
    window_token_count: int
    window_request_count: int
    cpu_seconds: Mapping[str, float]
    """Of the target's processes within the window, by group."""
    foreign_cpu_share: float
    """How much of the machine others used within the window, 0..1. Measurements beside a busy neighbour are provisional."""


class LoadFailedError(Exception):
    """An answer was wrong, short or late."""


def encode_command(load: Load, target: Target) -> str:
    return json.dumps({"load": asdict(load), "target": {**asdict(target), "process_ids": dict(target.process_ids)}})


def decode_command(line: str) -> tuple[Load, Target]:
    command = json.loads(line)
    target = command["target"]
    groups = {name: tuple(ids) for name, ids in target.pop("process_ids").items()}
    return Load(**command["load"]), Target(**target, process_ids=groups)


def encode_result(result: LoadResult) -> str:
    return json.dumps({"result": asdict(result)})


def encode_failure(reason: str) -> str:
    return json.dumps({"failed": reason})


def decode_result(line: str) -> LoadResult:
    """The result in the client's line; raises LoadFailedError with its reason."""
    answer = json.loads(line)
    if "failed" in answer:
        raise LoadFailedError(answer["failed"])
    result = answer["result"]
    return LoadResult(**{**result, "first_token_ms": tuple(result["first_token_ms"]), "request_ms": tuple(result["request_ms"])})
