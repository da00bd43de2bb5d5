"""Errors in OpenAI's words."""

from __future__ import annotations

import json

import pytest

from potluck_coordinator.gateway.openai_errors import error_event, http_error
from potluck_protocol.errors import CATALOGUE, ErrorCode, PotluckError


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_code_has_openai_shape(code: ErrorCode) -> None:
    answer = http_error(PotluckError(code, param="model"))
    content = json.loads(answer.body)["error"]
    assert answer.status == CATALOGUE[code].http_status
    assert set(content) == {"message", "type", "param", "code"}
    assert (content["message"], content["param"]) == (CATALOGUE[code].public_text, "model")
    assert isinstance(content["code"], str)
    assert (b"content-type", b"application/json") in answer.headers


@pytest.mark.parametrize(
    ("given_seconds", "seconds", "milliseconds"),
    [(None, b"1", b"1000"), (0.2, b"1", b"200"), (1.5, b"2", b"1500"), (9999, b"120", b"120000")],
)
def test_retry_after(given_seconds: float | None, seconds: bytes, milliseconds: bytes) -> None:
    headers = dict(http_error(PotluckError(ErrorCode.QUEUE_FULL, retry_after_seconds=given_seconds)).headers)
    assert (headers[b"retry-after"], headers[b"retry-after-ms"]) == (seconds, milliseconds)


def test_only_what_may_succeed_later_says_when() -> None:
    saying = {code for code in ErrorCode if b"retry-after" in dict(http_error(PotluckError(code)).headers)}
    assert saying == {code for code, spec in CATALOGUE.items() if spec.retry_is_safe}


def test_no_retry_without_credits_nor_of_what_kills_engines_nor_once_billed() -> None:
    for code in (ErrorCode.INSUFFICIENT_CREDITS, ErrorCode.REQUEST_REFUSED):
        assert dict(http_error(PotluckError(code)).headers)[b"x-should-retry"] == b"false"
    billed = dict(http_error(PotluckError(ErrorCode.NODE_LOST, retry_after_seconds=1), billed=True).headers)
    assert billed[b"x-should-retry"] == b"false"
    assert b"retry-after" not in billed
    assert b"x-should-retry" not in dict(http_error(PotluckError(ErrorCode.NODE_LOST)).headers)


def test_error_event() -> None:
    event = error_event(PotluckError(ErrorCode.NODE_LOST))
    assert event.startswith(b'data: {"error":{')
    assert event.endswith(b"}}\n\n")
    assert event.count(b"\n") == 2
