"""How much text one answer gave its client, and how many tokens that can have been.

Decides what counts as text: what a model wrote and a client can read, in the fields where clients look for it, and nothing else that may
stand beside it. By this a node's count of its tokens is cut, so that no padding is worth anything. What engines send by two names counts
once. No tokenizer has tokens of less than a byte, apart from a few that show no text at all. It must not know events, documents' other
fields, or money.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

UNSEEN_TOKENS_ALLOWANCE: Final = 32
"""Of each answer: the end, half of a character, the marks around reasoning and channels, a stop string, which no client is shown."""
UNSEEN_TOKENS_PER_CALL_ALLOWANCE: Final = 16
"""What a server takes away around each call of a tool."""
_REASONING_NAMES: Final = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
"""One thing by the names of several engines; some send it by two."""
_PART_NAMES: Final = ("text", "thinking", "summary")
"""A part has one of them."""
_PART_DEPTH_MAX: Final = 3
TEXT_NAMES: Final = (
    "content",
    *_REASONING_NAMES,
    "refusal",
    "audio",
    "transcript",
    "tool_calls",
    "function_call",
    "function",
    "custom",
    "name",
    "text",
    "summary",
)
"""Every name that is looked for here, wherever it stands."""
OBJECT_NAMES: Final = ("arguments", "input")
"""The same; what stands there is text in any shape."""
DEPTH_MAX: Final = 6
"""Of lists and objects in one another."""


def tokens_bound(text_bytes: int, call_count: int, answer_count: int) -> int:
    """More tokens than these an answer that is whole cannot have had, whatever its engine counts."""
    return text_bytes + answer_count * UNSEEN_TOKENS_ALLOWANCE + call_count * UNSEEN_TOKENS_PER_CALL_ALLOWANCE


def text_bytes_of(value: object, depth_max: int = _PART_DEPTH_MAX) -> int:
    """Of a text, of a part that has one, or of a list of such parts; 0 of anything else."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))
    if depth_max <= 0:
        return 0
    if isinstance(value, Mapping):
        return max(text_bytes_of(value.get(name), depth_max - 1 if name == "thinking" else 0) for name in _PART_NAMES)
    if isinstance(value, list):
        return sum(text_bytes_of(part, depth_max) for part in value if isinstance(part, Mapping))
    return 0


def said_bytes(said: object) -> tuple[int, int]:
    """The text of a chat's message, or of a piece of it, and how many calls of tools it begins."""
    if not isinstance(said, Mapping):
        return 0, 0
    text_bytes = text_bytes_of(said.get("content"))
    if len(said) == 1 and text_bytes:
        return text_bytes, 0  # almost every piece of a stream
    audio = said.get("audio")
    if isinstance(audio, Mapping):
        text_bytes = max(text_bytes, text_bytes_of(audio.get("transcript"), 0))
    text_bytes += max(text_bytes_of(said.get(name)) for name in _REASONING_NAMES) + text_bytes_of(said.get("refusal"))
    calls = said.get("tool_calls")
    called_bytes, call_count = _calls_bytes([_called(call) for call in calls] if isinstance(calls, list) else [])
    if not called_bytes:
        called_bytes, call_count = _calls_bytes([said.get("function_call")])  # the older name of the same
    return text_bytes + called_bytes, call_count


def _calls_bytes(functions: list[object]) -> tuple[int, int]:
    text_bytes = call_count = 0
    for function in functions:
        if isinstance(function, Mapping):
            name_bytes = text_bytes_of(function.get("name"), 0)
            text_bytes += name_bytes + max(_arguments_bytes(function.get(name)) for name in OBJECT_NAMES)
            call_count += name_bytes > 0
    return text_bytes, call_count


def _called(call: object) -> object:
    """What a call names: a function, or a tool of another kind, which takes plain text."""
    return (call.get("function") or call.get("custom")) if isinstance(call, Mapping) else None


def _arguments_bytes(arguments: object) -> int:
    """Some servers read what the model wrote, and send the object: then nobody knows its blanks, and none counts."""
    if isinstance(arguments, Mapping | list):
        return text_bytes_of(json.dumps(arguments, ensure_ascii=False, separators=(",", ":")), 0)
    return text_bytes_of(arguments, 0)
