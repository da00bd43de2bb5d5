"""One answer being read: the coordinator's messages in, text out.

Decides how an engine's bytes become text, alike for streamed and whole answers, chat and plain prompts, both clients.
It must not know channels or waiting.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from potluck.errors import PoolError, pool_error
from potluck.results import ChatResult
from potluck_protocol.codec import usage_value
from potluck_protocol.errors import ErrorCode
from potluck_protocol.v1 import inference_pb2
from potluck_protocol.values import ModelId, NodeId, RequestId

_EVENT_END: Final = b"\n\n"
_END_MARK: Final = "[DONE]"


class AnswerReader:
    """Reads the messages of one `Generate` call in order."""

    def __init__(self, placed: inference_pb2.Placed, *, stream: bool) -> None:
        self.request_id = RequestId(placed.request_id)
        self.node_id = NodeId(placed.node_id)
        self.model_id = ModelId(placed.model_id)
        self._stream = stream
        self._unread = bytearray()
        self._events: list[dict[str, Any]] = []
        self._texts: list[str] = []
        self._finish_reason: str | None = None
        self._finished: inference_pb2.Finished | None = None

    @property
    def text(self) -> str:
        """The first choice's text so far; of a whole answer, nothing before its end."""
        return "".join(self._texts)

    def read(self, message: inference_pb2.GenerateResponse) -> list[str]:
        """The pieces of text that the message adds; raises EngineFailedError where the engine reports a failure inside its stream."""
        event = message.WhichOneof("event")
        if event == "data":
            self._unread += message.data
            if self._stream:
                return [text for document in self._new_documents() for text in self._read_document(document)]
        elif event == "placed":
            self.node_id = NodeId(message.placed.node_id)
        elif event == "finished":
            self._finished = message.finished
            if not self._stream:
                self._read_document(self._document(bytes(self._unread)))
        return []

    def result(self) -> ChatResult:
        """The complete answer; raises InternalError if its end never came."""
        if self._finished is None:
            raise self.failure(pool_error(ErrorCode.INTERNAL_ERROR, "The answer ended without its end mark; it may be incomplete."))
        return ChatResult(
            text=self.text,
            finish_reason=self._finish_reason,
            usage=usage_value(self._finished.usage),
            charge_micro_credits=self._finished.charge_micro_credits,
            model_id=self.model_id,
            node_id=self.node_id,
            request_id=self.request_id,
            raw={"events": self._events} if self._stream else self._events[0],
        )

    def failure(self, error: PoolError) -> PoolError:
        """The error, with what had arrived and which request it was."""
        error.partial_text = self.text
        error.request_id = error.request_id or self.request_id
        return error

    def _new_documents(self) -> Iterator[dict[str, Any]]:
        """The JSON documents of the server-sent events that are whole by now; the rest waits."""
        if b"\r" in self._unread:
            self._unread = self._unread.replace(b"\r\n", b"\n")
        *events, rest = bytes(self._unread).split(_EVENT_END)
        self._unread = bytearray(rest)
        for event in events:
            lines = [line[5:].strip() for line in event.decode(errors="replace").split("\n") if line.startswith("data:")]
            data = "\n".join(lines)
            if data and data != _END_MARK:
                yield self._document(data.encode())

    def _document(self, text: bytes) -> dict[str, Any]:
        try:
            document = json.loads(text)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise self.failure(pool_error(ErrorCode.ENGINE_FAILED, "The engine's answer is not a JSON document."))
        return document

    def _read_document(self, document: dict[str, Any]) -> list[str]:
        """Keeps the document; the text it adds to the first choice."""
        if document.get("error") is not None:
            raise self.failure(pool_error(ErrorCode.ENGINE_FAILED, "The engine reported a failure in the middle of its answer."))
        self._events.append(document)
        texts = []
        for choice in document.get("choices") or ():
            if choice.get("index", 0) == 0:
                self._finish_reason = choice.get("finish_reason") or self._finish_reason
                part = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
                if isinstance(text := part.get("content"), str) and text:
                    texts.append(text)
        self._texts += texts
        return texts
