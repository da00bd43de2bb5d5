"""For `llamacpp_front` only, and its `fold`: adds up the usage of an answer of several choices.

llama.cpp gives every choice a record of its own, and its totals count one choice. Decides what the one record says. It must not know
whether the answer is streamed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any


class UsageSum:
    """The usage of one answer, event by event.

    Args:
        prompt_count: prompts asked; every one has the same number of choices, in order.
    """

    def __init__(self, prompt_count: int = 1) -> None:
        self._prompt_count = prompt_count
        self._records: dict[int, dict[str, Any]] = {}
        self._texts: Counter[int] = Counter()
        self._choice_count = 1
        self._last_finished = 0

    def take(self, event: dict[str, Any]) -> bool:
        """Notes the next event and takes its usage record out of it; whether it had one."""
        for choice in event.get("choices", ()):
            index = choice["index"]
            self._choice_count = max(self._choice_count, index + 1)
            self._texts[index] += _carries_text(choice)
            if choice.get("finish_reason") is not None:
                self._last_finished = index
        record = event.pop("usage", None)
        if record is None:
            return False
        # A chat's record names no choice; it comes at once after the end of its own.
        self._records[self._last_finished] = record
        return True

    def total(self) -> dict[str, Any]:
        """The record of the whole answer; a choice without one is counted by its events with text."""
        if self._choice_count == 1 and self._records:
            return self._records[0]
        completion = sum(
            self._records[index].get("completion_tokens", 0) if index in self._records else self._texts[index]
            for index in range(self._choice_count)
        )
        first_choices = range(0, self._choice_count, max(1, self._choice_count // self._prompt_count))
        prompts = [self._records.get(index, {}) for index in first_choices]
        prompt = sum(record.get("prompt_tokens", 0) for record in prompts)
        cached = sum((record.get("prompt_tokens_details") or {}).get("cached_tokens", 0) for record in prompts)
        return {
            "completion_tokens": completion,
            "prompt_tokens": prompt,
            "total_tokens": completion + prompt,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _carries_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice.get("text")) or any(value for name, value in delta.items() if name != "role")
