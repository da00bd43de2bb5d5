"""What the scripted engine says, how it misbehaves, and what its work costs: the model file of the engine kind `scripted`.

Decides nothing; a script is data. A request may override any of it in its own body under "scripted", but the cost.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from potluck_node.engines.batch_model import CostModel
from potluck_protocol.private_files import read_json

_DEFAULT_TOKENS: Final = ("Every", "one", " brings", " a", " GPU", ",", " every", "one", " eats", ".")


@dataclass(frozen=True, slots=True)
class Script:
    """One scripted answer. A count of None means that the fault never happens."""

    tokens: tuple[str, ...] = _DEFAULT_TOKENS
    """Said from the start again until `token_count` are out."""
    token_count: int | None = None
    """None: each token once."""
    count_in_prompt: bool = False
    """A number at the prompt's end is the answer's count of tokens, as far as `token_count` goes: nobody before the engine can know it."""
    pace_in_prompt: bool = False
    """A number at the prompt's end is the answer's `inter_token_ms`: routers drop request fields that they do not know."""
    stamped: bool = False
    """Not `tokens` are said: each token is its number and when it left, in nanoseconds of CLOCK_MONOTONIC, as " 3:81234567890123"."""
    ttft_ms: float = 0.0
    inter_token_ms: float = 0.0
    load_ms: float = 0.0
    """How long the engine takes to start."""
    break_after_tokens: int | None = None
    """Closes the connection in the middle of the answer."""
    hang_after_tokens: int | None = None
    """Says nothing more and keeps the connection."""
    exit_after_tokens: int | None = None
    """The whole engine dies."""
    fail_status: int | None = None
    """Answers with this HTTP status and an OpenAI error body."""
    embedding_dimension_count: int = 8
    cost: CostModel | None = None
    """With one the engine batches, has a finite cache, and dies of too much; slots, and the script's times, mean nothing then."""

    @property
    def answer_token_count(self) -> int:
        """How many tokens the whole answer has."""
        return len(self.tokens) if self.token_count is None else self.token_count

    def overridden(self, values: dict[str, Any]) -> Script:
        """This script with some of its fields replaced; raises ValueError for a name or a type it does not know."""
        unknown = sorted(set(values) - {field.name for field in fields(self) if field.name != "cost"})
        if unknown:
            raise ValueError(f"a script has no field {unknown[0]!r}")
        values = {**values, "tokens": tuple(values["tokens"])} if "tokens" in values else values
        script = replace(self, **values)
        if not script.tokens or not all(isinstance(token, str) for token in script.tokens):
            raise ValueError("a script's tokens are a list of strings, at least one")
        numbers = [getattr(script, field.name) for field in fields(script) if field.name not in {"tokens", "cost"}]
        if not all(number is None or (isinstance(number, int | float) and number >= 0) for number in numbers):
            raise ValueError("a script's times and counts are numbers, not below zero")
        return script


def read_script(path: Path) -> Script:
    """The script in a JSON file; raises OSError or ValueError."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} holds no JSON object")  # noqa: TRY004 - a wrong file, not a wrong call
    cost = CostModel.from_values(values.pop("cost")) if "cost" in values else None
    return replace(Script().overridden(values), cost=cost)
