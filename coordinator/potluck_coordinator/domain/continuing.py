"""Whether an answer may go on elsewhere from the text that has reached its client.

Decides by the fields of the request's body, of which only those are let pass that are known to mean the same for the rest of an answer as
for the whole, and by what was relayed. It is asked when an attempt has failed, never before. It must not know how bodies are written or
events read: `gateway.so_far` reads, `gateway.continuation` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from potluck_coordinator.domain.requests import Said
from potluck_protocol.values import Endpoint

CONTINUED_TEXT_BYTES_MAX: Final = 1024 * 1024
"""Of an answer: what is longer is not kept, and cannot be continued."""

CONTINUING_KINDS: Final[Mapping[Endpoint, frozenset[str]]] = {
    Endpoint.CHAT_COMPLETIONS: frozenset({"llamacpp", "vllm", "scripted"}),
    Endpoint.COMPLETIONS: frozenset({"llamacpp", "vllm"}),
}
"""The engines that can be asked to go on behind a text. Of an attached server nobody knows what it is, and of others it was not tried."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """What one client has got of its streamed answer, from all its attempts."""

    text: str = ""
    token_count: int = 0
    finish_reason: str | None = None
    extras: frozenset[str] = frozenset()
    """What else was said, by its field's name: tool calls, reasoning, log probabilities, a second choice."""
    too_long: bool = False
    """The text is not kept."""

    @property
    def anything(self) -> bool:
        """More than the head."""
        return bool(self.text or self.token_count or self.extras or self.finish_reason or self.too_long)


_Holds = Callable[[Any], bool]


def _nothing(value: object) -> bool:
    return not value


def _one(value: object) -> bool:
    return value == 1


def _plain_text(value: object) -> bool:
    return isinstance(value, Mapping) and value.get("type") == "text"


def _usage_only(value: object) -> bool:
    return isinstance(value, Mapping) and value.keys() <= {"include_usage"}


_ALWAYS: Final = frozenset(
    {
        *("model", "messages", "prompt", "stream", "max_tokens", "max_completion_tokens", "n_predict"),
        # How the next token is drawn from its probabilities, and what ends an answer: nothing of it looks back at the answer alone.
        *("temperature", "top_p", "top_k", "min_p", "typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold", "logit_bias"),
        *("dynatemp_range", "dynatemp_exponent", "samplers", "seed", "min_keep", "stop", "stop_token_ids", "ignore_eos"),
        # These look back at the prompt, too, and so at the text in it.
        *("repetition_penalty", "repeat_penalty", "repeat_last_n"),
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "cache_prompt", "priority"),
        *("chat_template_kwargs", "skip_special_tokens", "spaces_between_special_tokens", "parallel_tool_calls", "tool_choice"),
    }
)
_WHERE: Final[Mapping[str, tuple[_Holds, str]]] = {
    "stream_options": (_usage_only, "it asks for more than the usage record"),
    "response_format": (_plain_text, "its form is prescribed"),
    "n": (_one, "it has several choices"),
    "n_cmpl": (_one, "it has several choices"),
    "logprobs": (_nothing, "it has log probabilities"),
    "top_logprobs": (_nothing, "it has log probabilities"),
    "n_probs": (_nothing, "it has log probabilities"),
    "frequency_penalty": (_nothing, "a penalty counts what was generated"),
    "presence_penalty": (_nothing, "a penalty counts what was generated"),
    "tools": (_nothing, "it may call tools"),
    "functions": (_nothing, "it may call tools"),
    "suffix": (_nothing, "it has a suffix"),
    "echo": (_nothing, "it repeats its prompt"),
}


def why_not_continued(endpoint: Endpoint, body: Mapping[str, Any], delivered: Delivered) -> str | None:
    """Why the text so far cannot be continued by another engine, in words for the client; None: it can.

    Args:
        endpoint: what was asked.
        body: the request's, decoded.
        delivered: what has reached the client.
    """
    if delivered.too_long:
        return f"it is longer than the {CONTINUED_TEXT_BYTES_MAX >> 20} MiB that are kept"
    if delivered.extras:
        return f"it holds more than text ({', '.join(sorted(delivered.extras))})"
    why_not = _why_not_by_input(endpoint, body)
    if why_not is not None:
        return why_not
    for name, value in body.items():
        # A list of tools that may not be called changes nothing.
        if value is None or name in _ALWAYS or (name in {"tools", "functions"} and body.get("tool_choice") == "none"):
            continue
        if name not in _WHERE:
            return f"what the field {name[:40]!r} means for the rest of an answer is not known"
        holds, words = _WHERE[name]
        if not holds(value):
            return words
    return None


def _why_not_by_input(endpoint: Endpoint, body: Mapping[str, Any]) -> str | None:
    if endpoint is Endpoint.COMPLETIONS:
        return None if isinstance(body.get("prompt"), str) else "its prompt is not one text"
    messages = body.get("messages")
    if not isinstance(messages, Sequence) or not messages or not isinstance(messages[-1], Mapping):
        return "it has no messages"
    last = messages[-1]
    if last.get("role") == "assistant" and (not isinstance(last.get("content"), str) or last.get("tool_calls")):
        return "its last message is a partial answer that is not one text"
    return None


def said(
    endpoint: Endpoint, body: Mapping[str, Any], delivered: Delivered, completion_tokens_max: int | None, answer_count: int = 1
) -> Said:
    """What a failed attempt's request is judged by.

    Args:
        endpoint: what was asked.
        body: the request's, decoded.
        delivered: what has reached the client.
        completion_tokens_max: as the client asked, for each answer; None: no bound.
        answer_count: how many the request gets, over all its prompts.
    """
    if not delivered.anything:
        return Said()
    used_up = completion_tokens_max is not None and delivered.token_count >= completion_tokens_max
    # What was said of one says nothing of the others, and those that have not spoken yet are not seen at all.
    several = answer_count > 1 or "choices" in delivered.extras
    return Said(
        anything=True,
        whole=not several and (delivered.finish_reason is not None or used_up),
        why_not=why_not_continued(endpoint, body, delivered),
    )
