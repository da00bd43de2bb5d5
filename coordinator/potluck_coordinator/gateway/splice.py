"""Makes the answers of several attempts one: what goes to the client once an attempt has taken over from another.

Decides how a later attempt's events must differ from what its engine sends: they carry the first one's names, no second role, and one usage
record for all of it; and what is said where an answer was whole but for its end. Before a failover nothing comes here. It must not know
attempts, placement or money.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from potluck_coordinator.gateway.sse import DONE, EVENT_END, payload_of
from potluck_protocol.values import Endpoint, Usage

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAME_FIELDS: Final = ("id", "created", "model", "system_fingerprint")
_decoder: Final = msgspec.json.Decoder(dict[str, Any])
_encoder: Final = msgspec.json.Encoder()


class Splice:
    """The rest of one answer.

    Args:
        head: the names that the first attempt's events had.
        role_shown: the client knows who speaks.
        tokens_before: what the attempts before this one said; its engine counts them as a part of the prompt.
    """

    def __init__(self, head: Mapping[str, Any], tokens_before: int, *, role_shown: bool) -> None:
        self._names = {name: head.get(name) for name in _NAME_FIELDS}
        self._tokens_before = tokens_before
        self._role_shown = role_shown

    def passed(self, data: bytes) -> bytes:
        """What the client gets for whole events; may be empty."""
        return b"".join(self._event(event) for event in data.split(EVENT_END) if event.strip())

    def _event(self, event: bytes) -> bytes:
        payload = payload_of(event)
        if payload is None or payload == DONE:
            return event + EVENT_END
        try:
            fields = _decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return event + EVENT_END
        had_choices = bool(fields.get("choices"))
        fields["choices"] = [choice for choice in fields.get("choices") or () if self._says_something(choice)]
        if isinstance(record := fields.get("usage"), dict):
            fields["usage"] = self._usage(record)
        elif had_choices and not fields["choices"]:
            return b""
        fields |= {name: value for name, value in self._names.items() if value is not None and name in fields}
        return b"data: " + _encoder.encode(fields) + EVENT_END

    def _says_something(self, choice: Any) -> bool:
        """False for one that only tells again who speaks; a role that is known is taken out of any."""
        if not isinstance(choice, dict) or not isinstance(delta := choice.get("delta"), dict):
            return True
        if not self._role_shown or "role" not in delta:
            return True
        del delta["role"]
        return any(delta.values()) or choice.get("finish_reason") is not None

    def _usage(self, record: dict[str, Any]) -> dict[str, Any]:
        told = Usage(_count(record.get("prompt_tokens")), _count(record.get("completion_tokens")))
        together = usage_together(told, self._tokens_before)
        counts = usage_record(together)
        if isinstance(details := record.get("prompt_tokens_details"), dict):
            cached = min(_count(details.get("cached_tokens")), together.prompt_token_count)
            counts["prompt_tokens_details"] = {**details, "cached_tokens": cached}
        return {**record, **counts}


def own_usage(usage: Usage, tokens_before: int) -> Usage:
    """What one attempt is paid for: the client's prompt, without the text that it went on from, and its own tokens."""
    prompt_tokens = max(0, usage.prompt_token_count - tokens_before)
    return Usage(prompt_tokens, usage.completion_token_count, min(usage.cached_prompt_token_count, prompt_tokens))


def usage_together(usage: Usage, tokens_before: int) -> Usage:
    """What the whole answer came to, by its last attempt's engine."""
    own = own_usage(usage, tokens_before)
    return Usage(own.prompt_token_count, own.completion_token_count + tokens_before, own.cached_prompt_token_count)


def usage_record(usage: Usage) -> dict[str, Any]:
    """As OpenAI writes it."""
    prompt_tokens, completion_tokens = usage.prompt_token_count, usage.completion_token_count
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens}


def made_end(endpoint: Endpoint, head: Mapping[str, Any], *, finish_reason: str | None, usage: Usage | None) -> bytes:
    """The end of an answer whose engine did not live to say it.

    Args:
        endpoint: what was asked.
        head: the names of its events.
        finish_reason: if the client has not got one.
        usage: if the client asked for it and has not got it.
    """
    end = b""
    if finish_reason is not None:
        said: dict[str, Any] = {"delta": {}} if endpoint is Endpoint.CHAT_COMPLETIONS else {"text": ""}
        end += _made({**head, "choices": [{"index": 0, **said, "finish_reason": finish_reason}]})
    if usage is not None:
        end += _made({**head, "choices": [], "usage": usage_record(usage)})
    return end + b"data: " + DONE + EVENT_END


def _made(fields: dict[str, Any]) -> bytes:
    return b"data: " + _encoder.encode(fields) + EVENT_END


def _count(value: object) -> int:
    return max(0, value) if isinstance(value, int) else 0
