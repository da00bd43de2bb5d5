"""What engines' errors mean. The answers are the ones that real engines gave (llama.cpp by xllamacpp 2026.10, vLLM's documents)."""

from __future__ import annotations

import json

import pytest

from potluck_coordinator.gateway.engine_errors import engine_error
from potluck_protocol.errors import ErrorCode
from potluck_protocol.values import Endpoint


def llama(status: int, message: str, kind: str = "invalid_request_error") -> tuple[int, bytes]:
    return status, json.dumps({"error": {"code": status, "message": message, "type": kind}}).encode()


TOO_LONG = "request (1231 tokens) exceeds the available context size (256 tokens), try increasing it"
VLLM_TOO_LONG = "This model's maximum context length is 256 tokens. However, you requested 1231 tokens in the messages, Please reduce"


@pytest.mark.parametrize(
    ("answer", "code", "text"),
    [
        (llama(400, TOO_LONG, "exceed_context_size_error"), ErrorCode.CONTEXT_LENGTH_EXCEEDED, "1231 tokens"),
        ((400, json.dumps({"object": "error", "message": VLLM_TOO_LONG}).encode()), ErrorCode.CONTEXT_LENGTH_EXCEEDED, "256 tokens"),
        ((400, json.dumps({"error": {"message": VLLM_TOO_LONG, "code": 400}}).encode()), ErrorCode.CONTEXT_LENGTH_EXCEEDED, "256 tokens"),
        (llama(400, "All non-assistant messages must contain 'content'"), ErrorCode.INVALID_REQUEST, "must contain 'content'"),
        (llama(500, "image input is not supported - hint: mmproj", "server_error"), ErrorCode.INVALID_REQUEST, "image input"),
        (
            llama(500, 'Failed to parse tools: Missing tool type: {"x":1}', "server_error"),
            ErrorCode.INVALID_REQUEST,
            "Failed to parse tools",
        ),
        (llama(501, "This server does not support embeddings.", "not_supported_error"), ErrorCode.INVALID_REQUEST, "embeddings"),
        (llama(503, "Loading model", "unavailable_error"), ErrorCode.NO_CAPACITY, "no requests right now"),
        (llama(500, "std::bad_alloc", "server_error"), ErrorCode.ENGINE_FAILED, "failed before it answered"),
        (llama(404, "File Not Found", "not_found_error"), ErrorCode.ENGINE_FAILED, "failed before it answered"),
        ((502, b"<html>bad gateway</html>"), ErrorCode.ENGINE_FAILED, "failed before it answered"),
        ((400, b"\xff\xfe"), ErrorCode.INVALID_REQUEST, "The request is not valid."),
        ((400, b'{"error":"a text"}'), ErrorCode.INVALID_REQUEST, "The request is not valid."),
    ],
)
def test_engine_errors(answer: tuple[int, bytes], code: ErrorCode, text: str) -> None:
    error = engine_error(Endpoint.CHAT_COMPLETIONS, *answer)
    assert error.code is code
    assert text in error.message
    assert "increas" not in error.message


@pytest.mark.parametrize(
    "message",
    [
        "parse error at line 1, column 15: invalid literal; last read: '\"messages\": [canary'",
        'Failed to parse tools: Missing tool type: {"canary":1}; tools = [\n {\n "canary": 1 } ]',
        "[{'type': 'literal_error', 'loc': ('body',), 'msg': 'bad', 'input': 'canary in a prompt'}]",
        "Unexpected 'a long quotation of a prompt with a canary in it' here",
        "x" * 300 + "canary",
    ],
)
def test_engine_words_never_quote_the_prompt(message: str) -> None:
    error = engine_error(Endpoint.CHAT_COMPLETIONS, 400, json.dumps({"error": {"message": message}}).encode())
    assert error.code is ErrorCode.INVALID_REQUEST
    assert "canary" not in error.message
    assert len(error.message) < 400


@pytest.mark.parametrize(
    ("endpoint", "param"), [(Endpoint.CHAT_COMPLETIONS, "messages"), (Endpoint.COMPLETIONS, "prompt"), (Endpoint.EMBEDDINGS, "input")]
)
def test_what_is_too_long_is_called_as_the_endpoint_calls_it(endpoint: Endpoint, param: str) -> None:
    assert engine_error(endpoint, *llama(400, TOO_LONG, "exceed_context_size_error")).param == param
