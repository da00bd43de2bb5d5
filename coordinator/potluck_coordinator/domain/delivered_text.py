"""How much text one answer gave its client, and how many tokens that can have been.

Decides what counts as text: what a model wrote and a client can read, in the fields where clients look for it, and nothing else that may
stand beside it. By this a node's count of its tokens is cut, so that no padding is worth anything. No tokenizer has tokens of less than a
byte, apart from a few that show no text at all. It must not know events, documents' other fields, or money.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

UNSEEN_TOKENS_ALLOWANCE: Final = 32
"""Of each answer: the end, half of a character, the marks around reasoning and channels, a stop string, which no client is shown."""
UNSEEN_TOKENS_PER_CALL_ALLOWANCE: Final = 16
"""What a server takes away around each call of a tool."""
_REASONING_NAMES: Final = ("reasoning_content", "reasoning", "thinking")
"""One thing by the names of several engines; some send it by two."""
_PART_DEPTH_MAX: Final = 3


def tokens_bound(text_bytes: int, call_count: int, answer_count: int) -> int:
    """More tokens than these an answer that is whole cannot have had, whatever its engine counts."""
    return text_bytes + answer_count * UNSEEN_TOKENS_ALLOWANCE + call_count * UNSEEN_TOKENS_PER_CALL_ALLOWANCE


def text_bytes_of(value: object, depth_max: int = _PART_DEPTH_MAX) -> int:
    """Of a text, or of a list of parts that have one; 0 of anything else."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))
    if isinstance(value, list) and depth_max > 0:
        return sum(
            text_bytes_of(part.get("text"), 0) + text_bytes_of(part.get("thinking"), depth_max - 1)
            for part in value
            if isinstance(part, Mapping)
        )
    return 0


def said_bytes(said: object) -> tuple[int, int]:
    """The text of a chat's message, or of a piece of it, and how many calls of tools it begins."""
    if not isinstance(said, Mapping):
        return 0, 0
    text_bytes = text_bytes_of(said.get("content"))
    if len(said) == 1 and text_bytes:
        return text_bytes, 0  # almost every piece of a stream
    text_bytes += max(text_bytes_of(said.get(name)) for name in _REASONING_NAMES) + text_bytes_of(said.get("refusal"))
    calls = said.get("tool_calls")
    functions = [_called(call) for call in calls] if isinstance(calls, list) else []
    functions.append(said.get("function_call"))
    call_count = 0
    for function in functions:
        if isinstance(function, Mapping):
            name_bytes = text_bytes_of(function.get("name"), 0)
            text_bytes += name_bytes + text_bytes_of(function.get("arguments"), 0) + text_bytes_of(function.get("input"), 0)
            call_count += name_bytes > 0
    return text_bytes, call_count


def _called(call: object) -> object:
    """What a call names: a function, or a tool of another kind, which takes plain text."""
    return (call.get("function") or call.get("custom")) if isinstance(call, Mapping) else None
