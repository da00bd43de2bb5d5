"""The words that the harness and its load client share: what to ask of a target, and what came of it.

Decides what the prompt says: its last word is the pace, because some relays drop request fields that they do not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

_SENTENCE: Final = "Tell me in plain words why a pot luck dinner feeds more people than any one cook could. "
_WORD_CHARACTERS: Final = 400
"""Of the long prompt's words: few and long, so that counting them costs the engine little."""


@dataclass(frozen=True, slots=True)
class Load:
    """One run against one target: so many connections, each asking one request after the other."""

    streamed: bool
    connection_count: int
    token_count: int
    requests_per_connection: int = 1
    pace_ms: int = 0
    """Between two tokens of one answer."""
    prompt_bytes: int = 0
    """How long the prompt is at least; 0 is a short one."""
    stagger_ms: float = 0.0
    """The first requests are spread over so long, as requests that have nothing to do with each other are."""
    asking_seconds: float = 60.0
    """Nothing more is asked after so long; each connection asks once at least."""
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


def prompt(load: Load) -> str:
    """The prompt, with the pace as its last word."""
    if load.prompt_bytes == 0:
        return f"{_SENTENCE * 6}{load.pace_ms}"
    word = "p" * (_WORD_CHARACTERS - 1) + " "
    return f"{word * -(-load.prompt_bytes // _WORD_CHARACTERS)}{load.pace_ms}"


@dataclass(frozen=True, slots=True)
class Target:
    """Where to ask, and the processes whose CPU time to read meanwhile, by what they are."""

    host: str
    port: int
    model: str
    authorization: str
    process_ids: Mapping[str, tuple[int, ...]]
    own_process_ids: tuple[int, ...]
    """All that the benchmark started: what the machine does for others is what is left."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """One run, as the client saw it. Times are in milliseconds, of every request; delays, of every token."""

    first_token_ms: tuple[float, ...]
    request_ms: tuple[float, ...]
    delay_ms: tuple[float, ...]
    """From the engine's stamp in a token to the client's reading of it; empty where answers are not streamed."""
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
    own = tuple(target.pop("own_process_ids"))
    return Load(**command["load"]), Target(**target, process_ids=groups, own_process_ids=own)


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
    return LoadResult(**{**result, **{name: tuple(result[name]) for name in ("first_token_ms", "request_ms", "delay_ms")}})
