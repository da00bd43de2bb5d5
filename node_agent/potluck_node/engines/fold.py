"""For `llamacpp_front` only: folds the events of a streamed answer into the whole one that an OpenAI server gives without streaming.

Decides how chunks add up: texts and tool arguments are joined, lists of log probabilities are put end to end, usage is summed, the last of
everything else wins. It must not know where the events come from.
"""

from __future__ import annotations

from typing import Any

from potluck_node.engines.usage_sum import UsageSum

_WHOLE_OBJECT = {"chat.completion.chunk": "chat.completion"}


class AnswerFold:
    """One answer being put together.

    Args:
        prompt_count: prompts that it answers.
    """

    def __init__(self, prompt_count: int = 1) -> None:
        self._usage = UsageSum(prompt_count)
        self._fields: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}

    def add(self, event: dict[str, Any]) -> None:
        """Takes the next event, decoded."""
        self._usage.take(event)
        for name, value in event.items():
            if name != "choices":
                self._fields[name] = value
        for choice in event.get("choices", ()):
            self._add_choice(choice)

    def _add_choice(self, part: dict[str, Any]) -> None:
        choice = self._choices.setdefault(part["index"], {"finish_reason": None, "index": part["index"]})
        for name, value in part.items():
            if name == "delta":
                _add_delta(choice.setdefault("message", {"role": "assistant", "content": None}), value)
            elif name == "text":
                choice["text"] = choice.get("text", "") + value
            elif name == "logprobs" and value is not None:
                _join_lists(choice.setdefault("logprobs", {}), value)
            elif value is not None:
                choice[name] = value

    def answer(self) -> dict[str, Any]:
        """The whole answer so far."""
        kind = self._fields.get("object", "")
        choices = [self._choices[index] for index in sorted(self._choices)]
        return {**self._fields, "object": _WHOLE_OBJECT.get(kind, kind), "choices": choices, "usage": self._usage.total()}


def _add_delta(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, value in delta.items():
        if name == "tool_calls":
            _add_tool_calls(message.setdefault("tool_calls", []), value)
        elif name != "role" and isinstance(value, str):
            message[name] = (message.get(name) or "") + value
        elif value is not None:
            message[name] = value


def _add_tool_calls(calls: list[dict[str, Any]], parts: list[dict[str, Any]]) -> None:
    for part in parts:
        index = part.get("index", 0)
        while len(calls) <= index:
            calls.append({"type": "function", "id": "", "function": {"name": "", "arguments": ""}})
        call = calls[index]
        call["id"] += part.get("id") or ""
        for name, value in (part.get("function") or {}).items():
            call["function"][name] = call["function"].get(name, "") + (value or "")


def _join_lists(whole: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        if isinstance(value, list):
            whole.setdefault(name, []).extend(value)
        else:
            whole[name] = value
