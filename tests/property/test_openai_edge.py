"""Properties of what the http edge reads: answers passing by, and bodies from anybody."""

from __future__ import annotations

import json
from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st

from potluck_coordinator.gateway.engine_errors import engine_error
from potluck_coordinator.gateway.openai_request import parse_request
from potluck_coordinator.gateway.sse import UsageWatcher, usage_of_document
from potluck_protocol.errors import PotluckError
from potluck_protocol.values import AccountId, Endpoint, RequestId, Usage
from tests.support.http_edge import DONE, chat_event, usage_event

TEXT = st.text(max_size=20) | st.sampled_from(['"usage":{', "data: [DONE]\n\n", '"finish_reason":"', '{"choices":[],"usage":{}}'])
COUNT = st.integers(min_value=0, max_value=2**40)


@given(
    texts=st.lists(TEXT.filter(bool), max_size=30),
    usage=st.none() | st.builds(Usage, COUNT, COUNT, COUNT),
    keep=st.booleans(),
    pings=st.sets(st.integers(min_value=0, max_value=30)),
    cuts=st.sets(st.integers(min_value=0, max_value=40)),
)
def test_output_is_input_without_the_usage_event_however_it_is_cut(
    texts: list[str], usage: Usage | None, keep: bool, pings: set[int], cuts: set[int]
) -> None:
    events = [chat_event({"role": "assistant", "content": None}), *(chat_event({"content": text}) for text in texts)]
    for place in sorted(pings, reverse=True):
        events.insert(min(place, len(events)), b": ping\n\n")
    events.append(chat_event({}, "stop"))
    expected = [*events, *([usage_event(usage)] if usage is not None and keep else []), DONE]
    events += [*([usage_event(usage)] if usage is not None else []), DONE]

    watcher = UsageWatcher(keep_usage_event=keep)
    given_on: list[bytes] = []
    piece = b""
    for place, event in enumerate(events):
        piece += event
        if place in cuts:
            given_on.append(watcher.feed(piece))
            piece = b""
    given_on.append(watcher.feed(piece))

    assert b"".join(given_on) == b"".join(expected)
    assert watcher.usage == usage
    assert watcher.done
    # Comments may be taken for tokens, but nothing generated is ever missed.
    assert len(texts) <= watcher.token_count <= len(texts) + len(pings)


@given(st.lists(st.binary(max_size=200), max_size=10), st.booleans())
def test_any_bytes_pass(pieces: list[bytes], keep: bool) -> None:
    watcher = UsageWatcher(keep_usage_event=keep)
    for piece in pieces:
        assert watcher.feed(b"data: " + piece + b"\n\n").startswith(b"data: ")
        assert watcher.feed(piece) == piece or b'"usage"' in piece
        usage_of_document(piece)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
FIELD = st.sampled_from(
    [
        "model",
        "messages",
        "prompt",
        "input",
        "stream",
        "stream_options",
        "n",
        "n_cmpl",
        "max_tokens",
        "stop",
        "temperature",
        "tools",
        "seed",
    ]
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]) | JSON, "content": st.text(max_size=20) | JSON})
BODY = st.dictionaries(FIELD | st.text(max_size=5), JSON, max_size=6).flatmap(
    lambda odd: st.fixed_dictionaries(
        {}, optional={"model": st.text(max_size=5), "messages": st.lists(MESSAGE, max_size=3), "prompt": TEXT, "stream": st.booleans()}
    ).map(lambda good: {**odd, **good})
)


@settings(max_examples=300)
@given(
    st.sampled_from(list(Endpoint)),
    BODY.map(lambda body: json.dumps(body).encode()) | st.binary(max_size=300) | JSON.map(lambda v: json.dumps(v).encode()),
)
def test_a_body_is_refused_in_order_or_understood(endpoint: Endpoint, body: bytes) -> None:
    with suppress(PotluckError):
        request = parse_request(endpoint, body, RequestId("r"), AccountId("a"))
        content = json.loads(request.body)
        assert content["model"] == request.model_id
        assert request.answer_count in range(1, 5)
        assert request.prompt_bytes >= len(json.loads(body).get("prompt") or "")
        if request.stream:
            assert content["stream_options"]["include_usage"] is True
            del content["stream_options"]
            original = json.loads(body)
            original.pop("stream_options", None)
            assert repr(content) == repr(original)


@given(st.integers(min_value=400, max_value=599), st.binary(max_size=200) | JSON.map(lambda value: json.dumps({"error": value}).encode()))
def test_any_engine_answer_is_some_error(status: int, body: bytes) -> None:
    assert engine_error(Endpoint.COMPLETIONS, status, body).message
