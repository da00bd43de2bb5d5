"""How an engine is asked to go on behind a text: the body of a continued attempt, by the engine's kind.

Decides what each kind is asked. Whether an answer may be continued, and by which kinds, is `domain.continuing`. It must not know attempts
or placement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Raw

from potluck_protocol.values import Endpoint

if TYPE_CHECKING:
    from potluck_coordinator.gateway.inference_request import Continued

_BOUND_FIELDS: Final = ("max_tokens", "max_completion_tokens", "n_predict")
_ON_REQUEST: Final = {"continue_final_message": True, "add_generation_prompt": False}
"""vLLM begins a new message unless it is told so."""
_MERGING_KINDS: Final = frozenset({"llamacpp", "scripted"})
"""These go on with a last message of the assistant's by themselves, also with one that the client sent."""

_fields_decoder: Final = msgspec.json.Decoder(dict[str, Raw])
_messages_decoder: Final = msgspec.json.Decoder(list[Raw])
_encoder: Final = msgspec.json.Encoder()


def continued_body(endpoint: Endpoint, body: bytes, continued: Continued, engine_kind: str) -> bytes:
    """The body by which an engine of this kind goes on with the text, for as many tokens as are left; all else as the client sent it."""
    if not continued.text:
        return body
    fields = _fields_decoder.decode(body)
    for name in _BOUND_FIELDS:
        if name in fields and (bound := msgspec.json.decode(fields[name])) is not None:
            fields[name] = _raw(max(1, bound - continued.token_count))
    if endpoint is Endpoint.COMPLETIONS:
        fields["prompt"] = _raw(msgspec.json.decode(fields["prompt"], type=str) + continued.text)
        return _encoder.encode(fields)
    messages = _messages_decoder.decode(fields["messages"])
    last: dict[str, Any] = msgspec.json.decode(messages[-1])
    if last["role"] == "assistant" and engine_kind in _MERGING_KINDS:
        messages[-1] = _raw({**last, "content": last["content"] + continued.text})
    else:
        messages.append(_raw({"role": "assistant", "content": continued.text}))
    fields["messages"] = _raw(messages)
    if engine_kind not in _MERGING_KINDS:
        fields |= {name: _raw(value) for name, value in _ON_REQUEST.items()}
    return _encoder.encode(fields)


def _raw(value: object) -> Raw:
    return Raw(_encoder.encode(value))
