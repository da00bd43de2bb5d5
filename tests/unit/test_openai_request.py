"""Which request bodies are refused, and what is read from the rest."""

from __future__ import annotations

import json

import pytest

from potluck_coordinator.gateway.inference_request import InferenceRequest
from potluck_coordinator.gateway.openai_request import BODY_BYTES_MAX, MESSAGE_COUNT_MAX, TOKEN_CHARACTERS_MAX, parse_request
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, Endpoint, RequestId

CHAT, COMPLETIONS, EMBEDDINGS = Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS, Endpoint.EMBEDDINGS
MESSAGES = [{"role": "user", "content": "Hello"}]


def parse(endpoint: Endpoint, content: object) -> InferenceRequest:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return parse_request(endpoint, body, RequestId("req_1"), AccountId("acct_1"))


def chat(**fields: object) -> dict[str, object]:
    return {"model": "m", "messages": MESSAGES, **fields}


@pytest.mark.parametrize(
    ("endpoint", "content", "prompt_count"),
    [
        (CHAT, chat(messages=MESSAGES * 3), 1),
        (COMPLETIONS, {"model": "m", "prompt": "a", "n": 3}, 1),
        (COMPLETIONS, {"model": "m", "prompt": ["a", "b"], "n": 2}, 2),
        (COMPLETIONS, {"model": "m", "prompt": [1, 2, 3, 4, 5]}, 1),
        (EMBEDDINGS, {"model": "m", "input": "a"}, 1),
        (EMBEDDINGS, {"model": "m", "input": [1, 2, 3]}, 1),
        (EMBEDDINGS, {"model": "m", "input": [[1, 2], [3]]}, 2),
        (EMBEDDINGS, {"model": "m", "input": ["a"] * 2048}, 2048),
    ],
)
def test_prompts_are_counted(endpoint: Endpoint, content: dict[str, object], prompt_count: int) -> None:
    assert parse(endpoint, content).prompt_count == prompt_count


def test_unstreamed_body_goes_through_untouched() -> None:
    body = b' {"model" : "m", "messages":[{"role":"developer","content":"x","odd":1}], "top_k": 3, "chat_template_kwargs":{"a":[1,2]}} '
    request = parse(CHAT, body)
    assert request.body is body
    assert (request.model_id, request.stream, request.include_usage) == ("m", False, False)
    assert (request.completion_tokens_max, request.answer_count, request.prompt_bytes) == (None, 1, len(body))


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": False, "other": [1]}, "absent"])
def test_streamed_body_asks_for_usage(options: object) -> None:
    content = chat(stream=True, min_p=0.25, **({} if options == "absent" else {"stream_options": options}))
    request = parse(CHAT, content)
    expected = {**content, "stream_options": {**(options if isinstance(options, dict) else {}), "include_usage": True}}
    assert json.loads(request.body) == expected
    assert (request.stream, request.include_usage) == (True, False)


def test_streamed_body_that_asks_already_goes_through_untouched() -> None:
    body = json.dumps(chat(stream=True, stream_options={"include_usage": True})).encode()
    request = parse(CHAT, body)
    assert request.body is body
    assert request.include_usage


def test_numbers_and_texts_are_copied_as_they_stand() -> None:
    body = b'{"model":"m","prompt":"\\u00e9\xc3\xa9","stream":true,"seed":12345678901234567890123,"x":1.10,"y":1e400}'
    with pytest.raises(PotluckError):
        parse(COMPLETIONS, b'{"model":"m","prompt":"a","seed":1.5}')
    rewritten = parse(COMPLETIONS, body.replace(b'"seed":12345678901234567890123,', b'"z":12345678901234567890123,')).body
    for piece in (b'"\\u00e9\xc3\xa9"', b"12345678901234567890123", b"1.10", b"1e400"):
        assert piece in rewritten


@pytest.mark.parametrize(
    ("fields", "completion_tokens_max", "answer_count"),
    [
        ({"max_tokens": 7}, 7, 1),
        ({"max_completion_tokens": 9}, 9, 1),
        ({"max_tokens": 7, "max_completion_tokens": 5}, 7, 1),
        ({"max_tokens": 7, "n_predict": 500}, 500, 1),
        ({"max_tokens": None, "n": 3}, None, 3),
        ({"n": 1, "n_cmpl": 4}, None, 4),
    ],
)
def test_what_the_hold_must_cover(fields: dict[str, object], completion_tokens_max: int | None, answer_count: int) -> None:
    request = parse(CHAT, chat(**fields))
    assert (request.completion_tokens_max, request.answer_count) == (completion_tokens_max, answer_count)


@pytest.mark.parametrize(("prompt", "answer_count"), [("a", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1], [2]], 2)])
def test_prompts(prompt: object, answer_count: int) -> None:
    assert parse(COMPLETIONS, {"model": "m", "prompt": prompt}).answer_count == answer_count


@pytest.mark.parametrize(
    ("endpoint", "content", "tokens_min"),
    [
        (CHAT, chat(), 1),
        (CHAT, chat(messages=MESSAGES * MESSAGE_COUNT_MAX), MESSAGE_COUNT_MAX + MESSAGE_COUNT_MAX * len("Hello") // TOKEN_CHARACTERS_MAX),
        (CHAT, chat(messages=[{"role": "user", "content": "é" * 1280}]), 11),
        (CHAT, chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a" * 640}, {"type": "image_url"}] * 2}]), 11),
        (CHAT, chat(messages=[{"role": "assistant", "tool_calls": []}]), 1),
        (COMPLETIONS, {"model": "m", "prompt": "a" * 1280}, 10),
        (COMPLETIONS, {"model": "m", "prompt": [5] * 3000}, 3000),
        (COMPLETIONS, {"model": "m", "prompt": ["a" * 1280, "b" * 12800]}, 100),
        (EMBEDDINGS, {"model": "m", "input": [[1, 2], [3] * 77]}, 77),
    ],
)
def test_no_engine_works_on_what_cannot_fit(endpoint: Endpoint, content: dict[str, object], tokens_min: int) -> None:
    assert parse(endpoint, content).prompt_tokens_min == tokens_min


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
        {"logit_bias": {"50256": -100}},
        {"logprobs": True, "top_logprobs": 20},
        {"repeat_last_n": -1, "dry_penalty_last_n": 64, "min_keep": 1},
        {"response_format": None, "logit_bias": None, "n_probs": None},
    ],
)
def test_what_openai_allows_passes(fields: dict[str, object]) -> None:
    assert json.loads(parse(CHAT, chat(**fields)).body) == chat(**fields)


@pytest.mark.parametrize(
    "fields", [{"echo": False}, {"suffix": ""}, {"suffix": None}, {"best_of": 1}, {"n": 2, "best_of": 2}, {"logprobs": 5}]
)
def test_what_changes_nothing_passes(fields: dict[str, object]) -> None:
    assert parse(COMPLETIONS, {"model": "m", "prompt": "a", **fields})


def test_embeddings() -> None:
    request = parse(EMBEDDINGS, {"model": "m", "input": ["a", "b"], "encoding_format": "base64", "stream": True})
    assert (request.stream, request.completion_tokens_max, request.answer_count) == (False, 0, 1)


def test_content_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:x"}}]
    assert parse(CHAT, chat(messages=[{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": []}]))


BAD_CHAT = [
    (b"", None),
    (b"{", None),
    (b"[]", None),
    (b"null", None),
    (b'{"model":"\xff","messages":[]}', None),
    (b'{"model":"m","x":' + b"[" * 100_000, None),
    ({"messages": MESSAGES}, "model"),
    ({"model": "m"}, "messages"),
    (chat(model=""), "model"),
    (chat(model=1), "model"),
    (chat(model="m" * 257), "model"),
    (chat(messages=[]), "messages"),
    (chat(messages="hi"), "messages"),
    (chat(messages=[{"content": "x"}]), "messages[0].role"),
    (chat(messages=[*MESSAGES, {"role": "robot", "content": "x"}]), "messages[1].role"),
    (chat(messages=[{"role": "user", "content": 3}]), "messages[0].content"),
    (chat(messages=[{"role": "user", "content": [{"text": "x"}]}]), "messages[0].content[0].type"),
    (chat(temperature="hot"), "temperature"),
    (chat(temperature=2.5), "temperature"),
    (chat(top_p=-0.1), "top_p"),
    (chat(max_tokens=0), "max_tokens"),
    (chat(max_tokens=1.5), "max_tokens"),
    (chat(max_tokens=True), "max_tokens"),
    (chat(max_completion_tokens="5"), "max_completion_tokens"),
    (chat(n_predict=-1), "n_predict"),
    (chat(n=5), "n"),
    (chat(n=0), "n"),
    (chat(n_cmpl=100), "n_cmpl"),
    (chat(stop=["x"] * 21), "stop"),
    (chat(stop=1), "stop"),
    (chat(stream="yes"), "stream"),
    (chat(stream_options=[]), "stream_options"),
    (chat(stream_options={"include_usage": 1}), "stream_options.include_usage"),
    (chat(tools=[{"x": 1}]), "tools[0].type"),
    (chat(messages=MESSAGES * (MESSAGE_COUNT_MAX + 1)), "messages"),
    (chat(messages=[*MESSAGES, {"role": "user", "content": None}]), "messages[1].content"),
    (chat(messages=[{"role": "tool"}]), "messages[0].content"),
    (chat(n_probs=1000), "n_probs"),
    (chat(repeat_last_n=600_000_000), "repeat_last_n"),
    (chat(dry_penalty_last_n=600_000_000), "dry_penalty_last_n"),
    (chat(min_keep=600_000_000), "min_keep"),
    (chat(logprobs=5), "logprobs"),
    (chat(top_logprobs=21), "top_logprobs"),
    (chat(response_format="json"), "response_format"),
    (chat(response_format={"type": "xml"}), "response_format.type"),
    (chat(logit_bias={"x": 1}), "logit_bias"),
    (chat(logit_bias={"1": 101}), "logit_bias[...]"),
    (chat(tools=[{"type": "function", "function": {}}]), "tools[0].function.name"),
]


@pytest.mark.parametrize(("content", "param"), BAD_CHAT)
def test_bad_chat_bodies(content: object, param: str | None) -> None:
    with pytest.raises(PotluckError) as caught:
        parse(CHAT, content)
    assert (caught.value.code, caught.value.param) == (ErrorCode.INVALID_REQUEST, param)
    assert param is None or param in caught.value.message


@pytest.mark.parametrize(
    ("endpoint", "content", "param"),
    [
        (COMPLETIONS, {"model": "m"}, "prompt"),
        (COMPLETIONS, {"model": "m", "prompt": []}, "prompt"),
        (COMPLETIONS, {"model": "m", "prompt": None}, "prompt"),
        (COMPLETIONS, {"model": "m", "prompt": ["a", 1]}, "prompt"),
        (COMPLETIONS, {"model": "m", "prompt": ["a"] * 5}, "prompt"),
        (COMPLETIONS, {"model": "m", "prompt": ["a"] * 3, "n": 2}, "prompt"),
        (COMPLETIONS, {"model": "m", "prompt": "a", "best_of": 2}, "best_of"),
        (COMPLETIONS, {"model": "m", "prompt": "a", "best_of": 0}, "best_of"),
        (COMPLETIONS, {"model": "m", "prompt": "a", "best_of": -3}, "best_of"),
        (COMPLETIONS, {"model": "m", "prompt": [[1, 2], []]}, "prompt[1]"),
        (EMBEDDINGS, {"model": "m", "input": [[]]}, "input[0]"),
        (COMPLETIONS, {"model": "m", "prompt": "a", "echo": True}, "echo"),
        (CHAT, {"model": "m", "messages": [{"role": "user", "content": "a"}], "include_reasoning": False}, "include_reasoning"),
        (COMPLETIONS, {"model": "m", "prompt": "a", "suffix": "b"}, "suffix"),
        (COMPLETIONS, {"model": "m", "prompt": "a", "logprobs": 6}, "logprobs"),
        (COMPLETIONS, {"model": "m", "prompt": "a", "logprobs": -1}, "logprobs"),
        (COMPLETIONS, {"model": "m", "prompt": "a", "logprobs": True}, "logprobs"),
        (COMPLETIONS, {"model": "m", "prompt": "a", "n_probs": 21}, "n_probs"),
        (EMBEDDINGS, {"model": "m", "input": {}}, "input"),
        (EMBEDDINGS, {"model": "m", "input": ["a"] * 2049}, "input"),
        (EMBEDDINGS, {"model": "m", "input": "a", "encoding_format": "hex"}, "encoding_format"),
    ],
)
def test_bad_other_bodies(endpoint: Endpoint, content: object, param: str) -> None:
    with pytest.raises(PotluckError) as caught:
        parse(endpoint, content)
    assert (caught.value.code, caught.value.param) == (ErrorCode.INVALID_REQUEST, param)


def test_values_are_never_repeated() -> None:
    with pytest.raises(PotluckError) as caught:
        parse(CHAT, chat(messages=[{"role": "canary in the wrong place", "content": "x"}]))
    assert "canary" not in caught.value.message


def test_too_large() -> None:
    with pytest.raises(PotluckError) as caught:
        parse(CHAT, b" " * (BODY_BYTES_MAX + 1))
    assert caught.value.code is ErrorCode.REQUEST_TOO_LARGE


@pytest.mark.parametrize("body", [b"", b" \r\n"])
def test_no_body_is_called_that(body: bytes) -> None:
    with pytest.raises(PotluckError, match="no body") as refusal:
        parse_request(Endpoint.CHAT_COMPLETIONS, body, RequestId("request"), AccountId("account"))
    assert refusal.value.code is ErrorCode.INVALID_REQUEST
