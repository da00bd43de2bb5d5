"""Whether an answer may go on elsewhere: by its request's fields, by what was said, and by what is known of them."""

from __future__ import annotations

import pytest

from potluck_coordinator.domain.continuing import CONTINUED_TEXT_BYTES_MAX, Delivered, said, why_not_continued
from potluck_coordinator.domain.requests import Said
from potluck_protocol.values import Endpoint

CHAT, COMPLETIONS = Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS
USER = {"role": "user", "content": "Hello"}
BODY = {"model": "m", "messages": [USER], "stream": True, "stream_options": {"include_usage": True}}
TEXT = Delivered("Once", 1)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "seed": 3, "stop": ["\n"], "logit_bias": {"5": 1}},
        {"max_tokens": 100, "max_completion_tokens": 100, "user": "me", "service_tier": "flex", "metadata": {"a": "b"}},
        {"n": 1, "n_cmpl": 1, "logprobs": False, "top_logprobs": None, "n_probs": 0, "frequency_penalty": 0, "presence_penalty": 0.0},
        {"response_format": {"type": "text"}, "tools": [], "functions": None, "suffix": "", "repeat_penalty": 1.1},
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"grammar": None, "anything_unknown": None},
        {"messages": [USER, {"role": "assistant", "content": "Once upon"}]},
    ],
)
def test_plain_text_is_continued(fields):
    assert why_not_continued(CHAT, BODY | fields, TEXT) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 2}, "several choices"),
        ({"n_cmpl": 2}, "several choices"),
        ({"logprobs": True}, "log probabilities"),
        ({"n_probs": 3}, "log probabilities"),
        ({"top_logprobs": 3}, "log probabilities"),
        ({"response_format": {"type": "json_object"}}, "form is prescribed"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "form is prescribed"),
        ({"tools": [{"type": "function"}]}, "may call tools"),
        ({"tools": [{"type": "function"}], "tool_choice": "auto"}, "may call tools"),
        ({"functions": [{"name": "f"}]}, "may call tools"),
        ({"frequency_penalty": 0.5}, "penalty"),
        ({"presence_penalty": -0.5}, "penalty"),
        ({"echo": True}, "repeats its prompt"),
        ({"stream_options": {"include_usage": True, "continuous_usage_stats": True}}, "usage record"),
        # What engines call guided decoding, and whatever else nobody here knows.
        *(({name: "x"}, repr(name)) for name in ("grammar", "json_schema", "guided_json", "structured_outputs", "min_tokens", "mirostat")),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "Once"}]}]}, "partial answer"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "partial answer"),
    ],
)
def test_what_another_engine_would_not_go_on_with_alike_is_not_continued(fields, words):
    assert words in why_not_continued(CHAT, BODY | fields, TEXT)


def test_what_a_reason_quotes_of_a_request_is_a_fields_name_and_never_long():
    assert len(why_not_continued(CHAT, BODY | {"secret" * 1000: 1}, TEXT)) < 150


@pytest.mark.parametrize(("prompt", "is_one_text"), [("Once", True), (["Once", "Twice"], False), ([1, 2], False), (["Once"], False)])
def test_a_completion_is_continued_behind_one_text(prompt, is_one_text):
    why_not = why_not_continued(COMPLETIONS, {"model": "m", "prompt": prompt, "stream": True}, TEXT)
    assert (why_not is None) is is_one_text


@pytest.mark.parametrize("extra", ["tool_calls", "reasoning_content", "logprobs", "choices", "what cannot be read"])
def test_what_was_said_beside_text_is_not_continued(extra):
    assert extra in why_not_continued(CHAT, BODY, Delivered("Once", 2, extras=frozenset({extra})))


def test_an_answer_longer_than_what_is_kept_is_not_continued():
    assert f"{CONTINUED_TEXT_BYTES_MAX >> 20} MiB" in why_not_continued(CHAT, BODY, Delivered(token_count=10**6, too_long=True))


@pytest.mark.parametrize(
    ("delivered", "tokens_max", "expected"),
    [
        (Delivered(), 10, Said()),
        (Delivered("Once", 1), 10, Said(anything=True)),
        (Delivered("Once", 1), None, Said(anything=True)),
        (Delivered("Once", 10), 10, Said(anything=True, whole=True)),
        (Delivered("Once", 1, "stop"), 10, Said(anything=True, whole=True)),
        (Delivered("", 0, "stop"), 10, Said(anything=True, whole=True)),
        (Delivered(too_long=True), None, Said(anything=True, why_not="it is longer than the 1 MiB that are kept")),
    ],
)
def test_an_answer_is_whole_once_its_reason_to_end_was_said_or_its_tokens_are_used_up(delivered, tokens_max, expected):
    assert said(CHAT, BODY, delivered, tokens_max) == expected


def test_of_several_choices_one_reason_to_end_says_nothing_of_the_others():
    judged = said(CHAT, BODY | {"n": 2}, Delivered("Once", 20, "stop", frozenset({"choices"})), 10)
    assert not judged.whole
    assert judged.why_not is not None


@pytest.mark.parametrize("delivered", [Delivered("Once", 2, "stop"), Delivered("Once", 10)], ids=["it has ended", "its tokens are used up"])
def test_of_several_answers_one_that_has_spoken_alone_is_not_all(delivered):
    assert said(CHAT, BODY, delivered, 10, 1).whole
    judged = said(CHAT, BODY | {"n": 2}, delivered, 10, 2)
    assert (judged.whole, judged.why_not) == (False, "it has several choices")
    of_two_prompts = said(COMPLETIONS, {"model": "tiny", "prompt": ["a", "b"]}, delivered, 10, 2)
    assert (of_two_prompts.whole, of_two_prompts.why_not) == (False, "its prompt is not one text")
