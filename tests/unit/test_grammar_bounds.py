"""Request bombs: what an answer may be held to, and that saying no is quick."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.tiers import AskedTier
from potluck_coordinator.gateway.grammar_bounds import (
    CHOICE_COUNT_MAX,
    GRAMMAR_CHARACTERS_MAX,
    PATTERN_CHARACTERS_MAX,
    REPEAT_MAX,
    SCHEMA_BYTES_MAX,
    SCHEMA_DEPTH_MAX,
    SCHEMA_NODES_MAX,
    TOOL_COUNT_MAX,
)
from potluck_coordinator.gateway.openai_request import BODY_BYTES_MAX, STOP_CHARACTERS_MAX, STOP_COUNT_MAX, parse_request
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, Endpoint, RequestId

CHAT = Endpoint.CHAT_COMPLETIONS


def body(**fields) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()


def parse(raw: bytes):
    return parse_request(CHAT, raw, RequestId("r"), AccountId("a"))


def nested(depth: int):
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def formatted(schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


WIDE = {"enum": list(range(SCHEMA_NODES_MAX + 1))}
LARGE = {"description": "x" * SCHEMA_BYTES_MAX}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

BOMBS = [
    (formatted(nested(SCHEMA_DEPTH_MAX)), "response_format.json_schema.schema"),
    (formatted(WIDE), "response_format.json_schema.schema"),
    (formatted(LARGE), "response_format.json_schema.schema"),
    (formatted({"maxLength": REPEAT_MAX + 1}), "response_format.json_schema.schema"),
    (formatted({"pattern": "a" * (PATTERN_CHARACTERS_MAX + 1)}), "response_format.json_schema.schema"),
    (formatted({"pattern": "((a{1000}){1000}){1000}"}), "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_object", "schema": WIDE}}, "response_format.schema"),
    ({"json_schema": WIDE}, "json_schema"),
    ({"guided_json": WIDE}, "guided_json"),
    ({"guided_json": json.dumps(WIDE)}, "guided_json"),
    ({"guided_regex": "a" * (PATTERN_CHARACTERS_MAX + 1)}, "guided_regex"),
    ({"guided_regex": "a{,99999}"}, "guided_regex"),
    ({"guided_choice": ["a"] * (CHOICE_COUNT_MAX + 1)}, "guided_choice"),
    ({"guided_grammar": "a" * (GRAMMAR_CHARACTERS_MAX + 1)}, "guided_grammar"),
    ({"grammar": "root ::= [a-z]{1,100000}"}, "grammar"),
    ({"structured_outputs": {"json": WIDE}}, "structured_outputs.json"),
    ({"structured_outputs": {"regex": "a{3000}"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"structural_tag": WIDE}}, "structured_outputs.structural_tag"),
    ({"regex": "(a{2000}){2000}b{2}"}, "regex"),
    ({"ebnf": "a" * (GRAMMAR_CHARACTERS_MAX + 1)}, "ebnf"),
    ({"tools": [TOOL] * (TOOL_COUNT_MAX + 1)}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": WIDE}}]}, "tools[0].function.parameters"),
    ({"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 60_000}}] * 5}, "tools"),
    ({"tools": [{"type": "custom", "custom": WIDE}]}, "tools[0].custom"),
    ({"stop": ["x"] * (STOP_COUNT_MAX + 1)}, "stop"),
    ({"stop": "x" * (STOP_CHARACTERS_MAX + 1)}, "stop"),
    ({"n": 100}, "n"),
    ({"max_tokens": 2**40}, "max_tokens"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"chat_template": "{% for i in range(10**9) %}x{% endfor %}"}, "chat_template"),
    ({"bad_words": ["x"] * 1000}, "bad_words"),
    ({"service_tier": "priority"}, "service_tier"),
]


@pytest.mark.parametrize(("fields", "param"), BOMBS)
def test_what_would_keep_an_engine_busy_for_ever_is_refused_by_name(fields, param):
    with pytest.raises(PotluckError) as refused:
        parse(body(**fields))
    assert (refused.value.code, refused.value.param) == (ErrorCode.INVALID_REQUEST, param)


@pytest.mark.timed
def test_saying_no_is_quick_however_large_the_bomb_is():
    """Process time, so that a busy machine does not matter; the bound is the issue's."""
    raws = [body(**fields) for fields, _ in BOMBS]
    most = BODY_BYTES_MAX - 1000
    raws.append(body(guided_json={"enum": ["x" * 90] * (most // 100)}))
    raws.append(b'{"model":"m","messages":[{"role":"user","content":"hi"}],"json_schema":' + b"[" * (most // 2) + b"]" * (most // 2) + b"}")
    raws.append(b'{"model":"m","messages":[{"role":"user","content":"hi"}],"guided_json":' + b"[" * 200 + b"]" * 200 + b"}")
    seconds = []
    for raw in raws * 3:
        began = time.process_time()
        with pytest.raises(PotluckError):
            parse(raw)
        seconds.append(time.process_time() - began)
    assert sorted(seconds)[int(0.99 * len(seconds))] < 0.05


@pytest.mark.parametrize(
    "fields",
    [
        formatted({"type": "object", "properties": {"name": {"type": "string", "maxLength": 100, "pattern": "[a-z]{1,20}"}}}),
        {"tools": [TOOL] * 20},
        {"grammar": 'root ::= "yes" | "no"'},
        {"guided_choice": ["yes", "no"]},
        {"structured_outputs": {"regex": r"\d{4}-\d{2}-\d{2}"}},
        {"guided_json": '{"type": "object"}'},
        {"guided_json": "not json at all"},
    ],
)
def test_what_people_ask_for_passes(fields):
    assert json.loads(parse(body(**fields)).body) == json.loads(body(**fields))


@pytest.mark.parametrize(
    ("asked", "tier"), [(None, AskedTier.AUTO), ("auto", AskedTier.AUTO), ("default", AskedTier.DEFAULT), ("flex", AskedTier.FLEX)]
)
def test_the_tier_is_read_and_no_engine_sees_it(asked, tier):
    raw = body(stream=True, service_tier=asked, temperature=0.5) if asked else body(stream=True, temperature=0.5)
    request = parse(raw)
    assert request.asked_tier is tier
    sent = json.loads(request.body)
    assert "service_tier" not in sent
    assert sent["temperature"] == 0.5
    assert sent["stream_options"] == {"include_usage": True}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**6) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["items", "maxItems", "pattern", "properties", "x"]), inner, max_size=4)
    ),
    max_leaves=60,
)


@given(JSON)
def test_any_schema_is_passed_on_as_it_is_or_refused_by_name(schema):
    try:
        request = parse(body(guided_json=schema))
    except PotluckError as error:
        assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, "guided_json")  # noqa: PT017 - either outcome is fine
    else:
        assert json.loads(request.body).get("guided_json") == schema
