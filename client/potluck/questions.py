"""What a caller may ask with: a conversation, one question, or a text to go on from.

Decides which shapes are taken and what somebody with another one is told, before anything is sent. It must not know what the pool or an
engine makes of their content.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from potluck.errors import PoolError, pool_error
from potluck_protocol.errors import ErrorCode

ChatMessages = Sequence[Mapping[str, Any]]

_MESSAGES_WANTED: Final = 'one question as a string, or a list of messages such as [{"role": "user", "content": "Hello"}]'
_PROMPT_WANTED: Final = 'a text to go on from, such as "Once upon a time"'


def chat_messages(messages: str | ChatMessages) -> list[Mapping[str, Any]]:
    """OpenAI's message list; a bare string is one message of the user's.

    Raises:
        InvalidRequestError: it is neither.
    """
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, Iterable) or isinstance(messages, Mapping | bytes | bytearray):
        raise _unusable("messages", _MESSAGES_WANTED, type(messages).__name__)
    listed = list(messages)
    if not listed:
        raise _unusable("messages", _MESSAGES_WANTED, "an empty list")
    for index, message in enumerate(listed):
        if not isinstance(message, Mapping):
            raise _unusable("messages", _MESSAGES_WANTED, f"a list whose item {index} is of type {type(message).__name__}")
    return listed


def plain_prompt(prompt: object) -> object:
    """The prompt itself, in any form that OpenAI's API has for it.

    Raises:
        InvalidRequestError: it can be none.
    """
    if not isinstance(prompt, str | list | tuple):
        raise _unusable("prompt", _PROMPT_WANTED, type(prompt).__name__)
    return prompt


def _unusable(param: str, wanted: str, given: str) -> PoolError:
    """Names the type that was given, never its content."""
    return pool_error(ErrorCode.INVALID_REQUEST, f"`{param}` must be {wanted}. It was {given}.", param=param)
