"""One stream made of several engines' streams, the text kept of it, and what the next engine is asked."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.continuing import CONTINUED_TEXT_BYTES_MAX, CONTINUING_KINDS, Delivered
from potluck_coordinator.gateway import so_far as so_far_module
from potluck_coordinator.gateway.continuation import continued_body
from potluck_coordinator.gateway.inference_request import Continued
from potluck_coordinator.gateway.so_far import SoFar
from potluck_coordinator.gateway.splice import Splice, made_end, own_usage, usage_together
from potluck_coordinator.gateway.sse import UsageWatcher
from potluck_protocol.values import Endpoint, Usage

CHAT, COMPLETIONS = Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS
DONE = b"data: [DONE]\n\n"


def event(fields, answer_id="first", **head) -> bytes:
    """As llama.cpp writes it."""
    names = {"created": 1, "id": answer_id, "model": "m", "system_fingerprint": "b0", "object": "chat.completion.chunk", **head}
    return b"data: " + json.dumps({**fields, **names}, separators=(",", ":")).encode() + b"\n\n"


def chunk(delta, finish_reason=None, answer_id="first", **more) -> bytes:
    return event({"choices": [{"finish_reason": finish_reason, "index": 0, "delta": delta, **more}]}, answer_id)


def usage_event(prompt, completion, answer_id="first", cached=0) -> bytes:
    record = {"completion_tokens": completion, "prompt_tokens": prompt, "total_tokens": prompt + completion}
    return event({"choices": [], "usage": {**record, "prompt_tokens_details": {"cached_tokens": cached}}}, answer_id)


ROLE = {"role": "assistant", "content": None}


def read(*events: bytes, token_count: int = 0) -> Delivered:
    so_far = SoFar()
    for one in events:
        so_far.add(one)
    return so_far.delivered(token_count)


def payloads(data: bytes) -> list:
    return [json.loads(line[6:]) for line in data.decode().split("\n\n") if line.startswith("data: {")]


def test_the_text_so_far_is_what_the_events_said():
    assert read(chunk(ROLE), chunk({"content": "On"}) + chunk({"content": "ce"}), chunk({}, "stop"), DONE) == Delivered("Once", 0, "stop")
    assert read(chunk(ROLE)) == Delivered(), "who speaks says nothing"
    assert read(b": ping\n\n", event({"choices": [{"index": 0, "text": "Once", "finish_reason": None}]})) == Delivered("Once")


@pytest.mark.parametrize(
    ("data", "extra"),
    [
        (chunk({"tool_calls": [{"index": 0}]}), "tool_calls"),
        (chunk({"reasoning_content": "Hm"}), "reasoning_content"),
        (chunk({"content": "a"}, logprobs={"content": []}), "logprobs"),
        (event({"choices": [{"index": 1, "delta": {"content": "a"}}]}), "choices"),
        (b"data: {no json\n\n", "what cannot be read"),
        (b'data: {"error":{"message":"m"}}\n\n', "error"),
        (chunk({"content": ["part"]}), "content"),
    ],
)
def test_whatever_else_was_said_is_named(data, extra):
    assert read(data).extras == {extra}


def test_memory_is_bounded_by_the_text_and_that_by_its_bound(monkeypatch):
    monkeypatch.setattr(so_far_module, "FOLDED_BYTES", 2048)
    so_far = SoFar()
    for _ in range(100):
        so_far.add(chunk({"content": "word "}))
        assert so_far._bytes < 2048
    assert so_far.delivered(100).text == "word " * 100
    so_far.add(chunk({"content": "x" * CONTINUED_TEXT_BYTES_MAX}))
    delivered = so_far.delivered(101)
    assert (delivered.text, delivered.too_long, delivered.anything) == ("", True, True)
    so_far.add(chunk({"content": "more"}))
    assert so_far.delivered(102).text == ""


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=1, max_size=12)


@given(TEXTS, st.data())
def test_two_engines_parts_read_as_one_answer_wherever_it_was_cut(texts, data):
    cut = data.draw(st.integers(1, len(texts)))
    so_far, watcher = SoFar(), UsageWatcher(keep_usage_event=True)
    client = b""
    for sent in (chunk(ROLE), *(chunk({"content": text}) for text in texts[:cut])):
        client += sent
        so_far.add(watcher.feed(sent))
    assert watcher.token_count == cut
    assert so_far.delivered(cut).text == "".join(texts[:cut])
    splice = Splice(so_far.head, cut, role_shown=so_far.role_shown)
    rest = [chunk(ROLE, answer_id="second"), *(chunk({"content": text}, answer_id="second") for text in texts[cut:])]
    rest += [chunk({}, "length", answer_id="second"), usage_event(20 + cut, len(texts) - cut, "second"), DONE]
    for sent in rest:
        client += splice.passed(sent)
    events = payloads(client)
    assert {one["id"] for one in events} == {"first"}
    choices = [choice for one in events for choice in one["choices"]]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "".join(texts)
    assert sum("role" in choice["delta"] for choice in choices) == 1
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    (usage,) = [one["usage"] for one in events if "usage" in one]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (20, len(texts), 20 + len(texts))
    assert client.count(DONE) == 1
    assert client.endswith(DONE)


def test_vllms_role_with_an_empty_text_is_no_second_one_either():
    splice = Splice({"id": "first"}, 1, role_shown=True)
    assert splice.passed(chunk({"role": "assistant", "content": ""}, answer_id="second")) == b""
    (passed,) = payloads(splice.passed(chunk({"role": "assistant", "content": "x"}, answer_id="second")))
    assert (passed["id"], passed["choices"][0]["delta"]) == ("first", {"content": "x"})


def test_where_nobody_was_named_yet_the_role_is_kept():
    (passed,) = payloads(Splice({"id": "first"}, 0, role_shown=False).passed(chunk(ROLE, answer_id="second")))
    assert passed["choices"][0]["delta"] == ROLE


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_attempts_tokens_sum_to_the_answers(prompt, completion, cached, before):
    told = Usage(prompt, completion, cached)
    own, together = own_usage(told, before), usage_together(told, before)
    assert together.completion_token_count == own.completion_token_count + before
    assert own.prompt_token_count == together.prompt_token_count == max(0, prompt - before)
    assert own.cached_prompt_token_count <= own.prompt_token_count


def test_the_end_that_was_not_said_is_made_of_what_is_missing():
    head = {"id": "first", "created": 1, "model": "m"}
    reason, usage = payloads(made_end(CHAT, head, finish_reason="length", usage=Usage(0, 5)))
    assert reason == {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
    assert usage == {**head, "choices": [], "usage": {"prompt_tokens": 0, "completion_tokens": 5, "total_tokens": 5}}
    assert made_end(CHAT, head, finish_reason=None, usage=None) == DONE
    assert payloads(made_end(COMPLETIONS, head, finish_reason="length", usage=None))[0]["choices"][0]["text"] == ""


USER = {"role": "user", "content": "Hello"}
CONTINUED = Continued("Once", 3, 100)


def asked(kind, endpoint=CHAT, **fields):
    body = msgspec.json.encode({"model": "m", "stream": True, "unknown": {"kept": [1.50]}, **fields})
    return json.loads(continued_body(endpoint, body, CONTINUED, kind))


@pytest.mark.parametrize("kind", sorted(CONTINUING_KINDS[CHAT]))
def test_every_kind_is_asked_to_go_on_with_what_is_left(kind):
    body = asked(kind, messages=[USER], max_tokens=10, max_completion_tokens=20, n_predict=None)
    assert body["messages"] == [USER, {"role": "assistant", "content": "Once"}]
    assert (body["max_tokens"], body["max_completion_tokens"], body["n_predict"]) == (7, 17, None)
    assert body["unknown"] == {"kept": [1.5]}
    is_told = (body.get("continue_final_message"), body.get("add_generation_prompt"))
    assert is_told == ((True, False) if kind == "vllm" else (None, None))


def test_without_a_bound_none_is_made():
    assert "max_tokens" not in asked("llamacpp", messages=[USER])


def test_a_partial_answer_of_the_clients_own_is_gone_on_with_as_its_engine_did():
    own = {"role": "assistant", "content": "So: ", "name": "bard"}
    assert asked("llamacpp", messages=[USER, own])["messages"] == [USER, {**own, "content": "So: Once"}]
    # vLLM had begun a new message behind it.
    assert asked("vllm", messages=[USER, own])["messages"] == [USER, own, {"role": "assistant", "content": "Once"}]


def test_a_completion_goes_on_behind_its_prompt():
    body = asked("vllm", COMPLETIONS, prompt="Tell: ", max_tokens=10)
    assert (body["prompt"], body["max_tokens"]) == ("Tell: Once", 7)
    assert "continue_final_message" not in body


def test_bytes_that_are_no_text_are_nothing_to_go_on_behind_and_end_nobodys_answer():
    so_far = SoFar()
    so_far.add(chunk({"content": "one"}) + chunk({"content": "two"}).replace(b"two", b"\xff\xfe") + chunk({"content": "three"}))
    assert so_far.delivered(3).extras == {"what cannot be read"}
