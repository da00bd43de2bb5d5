"""An open load: when which account asks what, whatever becomes of the requests before; and what came of each.

Decides the mix of prompts and answers, and arrivals by Poisson's law from a seed, so that every contender gets the same trace. The answer's
length stands at the end of the prompt, where only the engine reads it: whoever admits the request knows no more than `max_tokens`. It must
not know what is measured.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

ANSWER_TOKENS: Final[tuple[str, ...]] = tuple(f" {letter}" for letter in "abcdefghijklmnopqrstuvw")
"""What the engine says, over and over. 23 tokens, so that a token lost, doubled or swapped shows in the text."""
ANSWER_TOKENS_MAX: Final = 400
"""What every request names as `max_tokens`, as clients do who do not know how much they will get."""


def expected_text(token_count: int) -> str:
    """The one right answer of so many tokens."""
    return "".join(ANSWER_TOKENS[index % len(ANSWER_TOKENS)] for index in range(token_count))


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request: lengths are drawn between these."""

    share: float
    prompt_tokens: tuple[int, int]
    answer_tokens: tuple[int, int]


MIX: Final = (
    Kind(0.5, (20, 100), (20, 60)),  # chat
    Kind(0.3, (400, 800), (40, 120)),  # a document and a question on it
    Kind(0.2, (100, 200), (160, 320)),  # write me a story
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to be made."""

    at_seconds: float
    account: int
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class OpenLoad:
    """One run against one target."""

    seed: int
    requests_per_second: float
    seconds: float
    drain_seconds_max: float
    """How long after the last arrival the run goes on for answers that are still on their way."""


@dataclass(frozen=True, slots=True)
class OpenTarget:
    """Where to ask."""

    host: str
    port: int
    model: str
    authorizations: tuple[str, ...]
    """One for each account."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What became of one request. Times are seconds; those of the answer are since it was sent."""

    at_seconds: float
    late_seconds: float
    """How much later it was sent than it should have been: the load client's own fault."""
    account: int
    answer_tokens: int
    status: int
    """0: no answer had begun."""
    first_token_seconds: float | None
    over_seconds: float | None
    """None: it was still on its way when the run ended."""
    token_seconds: float | None
    """From one token to the next, in the mean."""
    failure: str
    """Why it is no whole, right answer; empty where it is one."""


@dataclass(frozen=True, slots=True)
class OpenResult:
    """One run as the client saw it."""

    asked: tuple[Asked, ...]
    busy_share: float
    """How much of the machine was busy with anything, 0..1."""
    client_cpu_share: float
    """How much of one core the load client took."""


def mean_tokens() -> tuple[float, float]:
    """Of a prompt and of an answer."""
    prompts = sum(kind.share * sum(kind.prompt_tokens) / 2 for kind in MIX)
    return prompts, sum(kind.share * sum(kind.answer_tokens) / 2 for kind in MIX)


def trace(load: OpenLoad, account_count: int) -> tuple[Arrival, ...]:
    """The arrivals of a load, by the account that makes them; the same load has the same."""
    draw = random.Random(load.seed)
    arrivals = []
    at_seconds = draw.expovariate(load.requests_per_second)
    while at_seconds < load.seconds:
        kind = draw.choices(MIX, [kind.share for kind in MIX])[0]
        arrivals.append(
            Arrival(at_seconds, draw.randrange(account_count), draw.randint(*kind.prompt_tokens), draw.randint(*kind.answer_tokens))
        )
        at_seconds += draw.expovariate(load.requests_per_second)
    return tuple(arrivals)


def prompt_of(arrival: Arrival, draw: random.Random) -> str:
    """So many words, no two prompts alike, with the answer's length as the last of them."""
    words = [f"w{draw.randrange(100_000)}" for _ in range(arrival.prompt_tokens - 1)]
    return " ".join([*words, str(arrival.answer_tokens)])


def encode_command(load: OpenLoad, target: OpenTarget) -> str:
    return json.dumps({"load": asdict(load), "target": asdict(target)})


def decode_command(line: str) -> tuple[OpenLoad, OpenTarget]:
    command = json.loads(line)
    target = command["target"]
    return OpenLoad(**command["load"]), OpenTarget(**{**target, "authorizations": tuple(target["authorizations"])})


def encode_result(result: OpenResult) -> str:
    return json.dumps(asdict(result))


def decode_result(line: str) -> OpenResult:
    values = json.loads(line)
    return OpenResult(**{**values, "asked": _asked(values["asked"])})


def _asked(values: Sequence[Mapping[str, object]]) -> tuple[Asked, ...]:
    return tuple(Asked(**one) for one in values)  # type: ignore[arg-type]
