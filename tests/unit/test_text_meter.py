"""How many tokens an answer can have had, by what its client could read of it."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from typing import Any

import pytest

from potluck_coordinator.domain.delivered_text import UNSEEN_TOKENS_ALLOWANCE, UNSEEN_TOKENS_PER_CALL_ALLOWANCE
from potluck_coordinator.gateway.said_values import ITEM_COUNT_MAX, OBJECT_BYTES_MAX, READ_BYTES_MAX, VALUE_COUNT_MAX
from potluck_coordinator.gateway.text_meter import UNREAD_BYTES_MAX, TextMeter
from tests.support.http_edge import DONE, chat_event, event, usage_event

CLAIM = 100_000
PAD = "y" * 2000


def meter(*, is_chat: bool = True, answer_count: int = 1, tokens_max: int = 1_000_000) -> TextMeter:
    return TextMeter(is_chat=is_chat, answer_count=answer_count, tokens_max=tokens_max)


def counted(*pieces: bytes, **asked: Any) -> int:
    """Tokens beyond those that are allowed unseen."""
    one = meter(**asked)
    for piece in pieces:
        one.add(piece)
    return one.counted(CLAIM) - UNSEEN_TOKENS_ALLOWANCE * asked.get("answer_count", 1)


def choice_event(**fields: object) -> bytes:
    return event({"choices": [{"index": 0, **fields}]})


def call(**fields: object) -> dict[str, object]:
    return {"tool_calls": [{"index": 0, "id": PAD, "type": "function", **fields}]}


@pytest.mark.parametrize(
    ("delta", "text_bytes"),
    [
        ({"content": "Hello"}, 5),
        ({"role": "assistant", "content": "Hello"}, 5),
        ({"content": "\u00fc\U0001f600\n"}, 7),
        ({"content": [{"type": "text", "text": "Hello"}, {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]}, 7),
        ({"reasoning_content": "hm"}, 2),
        ({"reasoning_content": "hm", "reasoning": "hm"}, 2),
        ({"content": "Hello", "refusal": "no"}, 7),
        (call(function={"arguments": '{"a":1}'}), 7),
        (call(function={"name": "f", "arguments": ""}), 1 + UNSEEN_TOKENS_PER_CALL_ALLOWANCE),
        (call(custom={"name": "f", "input": "x = 1"}), 6 + UNSEEN_TOKENS_PER_CALL_ALLOWANCE),
        ({"function_call": {"name": "f", "arguments": "{}"}}, 3 + UNSEEN_TOKENS_PER_CALL_ALLOWANCE),
        # What some servers send in another shape.
        ({"content": {"type": "text", "text": "Hello"}}, 5),
        ({"content": "Hello", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}, {"summary": "so"}, {"data": PAD}]}, 9),
        ({"reasoning": "hm", "reasoning_details": [{"text": "hm"}, {"text": "hm"}], "thinking": {"thinking": "hmm"}}, 4),
        ({"content": None, "audio": {"id": PAD, "data": PAD, "transcript": "Hello"}}, 5),
        ({"content": "Hello", "audio": {"transcript": "Hello"}}, 5),
        ({"content": [{"text": "hm", "thinking": "hm", "summary": "hm"}]}, 2),
        (call(function={"name": "f", "arguments": {"a": [1, {"b": "\u00fc"}]}}), 1 + 20 + UNSEEN_TOKENS_PER_CALL_ALLOWANCE),
        (call(custom={"name": "f", "input": [1, 2]}), 1 + 5 + UNSEEN_TOKENS_PER_CALL_ALLOWANCE),
        (call(function={"name": "f", "arguments": "{}", "input": "{}"}), 3 + UNSEEN_TOKENS_PER_CALL_ALLOWANCE),
        (call(function={"name": "f"}) | {"function_call": {"name": "f"}}, 1 + UNSEEN_TOKENS_PER_CALL_ALLOWANCE),
        # None of it is text that a client is shown.
        ({"role": PAD}, 0),
        ({"content": "", "pad": PAD}, 0),
        ({"content": {"pad": PAD, "text": {"text": PAD}}}, 0),
        ({"content": [{"thinking": [{"thinking": [{"thinking": [{"text": PAD}]}]}]}]}, 0),
        ({"audio": PAD, "reasoning_details": [PAD, {"data": PAD}]}, 0),
        ({"content": [PAD, [PAD], {"pad": PAD}, {"text": [{"text": PAD}]}]}, 0),
        ({"name": PAD, "arguments": PAD, "function": {"name": PAD}}, 0),
        ({"tool_calls": PAD}, 0),
        ({"tool_calls": [PAD, {"name": PAD}, {"function": PAD}]}, 0),
    ],
)
def test_text_is_what_a_model_wrote_and_a_client_can_read(delta: dict[str, object], text_bytes: int) -> None:
    assert counted(choice_event(delta=delta)) == text_bytes
    document = meter()
    answer = json.dumps({"choices": [{"index": 0, "message": delta}], "pad": PAD}).encode()
    assert document.counted_of_document(answer, CLAIM) - UNSEEN_TOKENS_ALLOWANCE == text_bytes


@pytest.mark.parametrize(
    "padding",
    [
        event({"choices": [{"index": 0, "delta": {"content": ""}}], "pad": PAD}),
        event({"choices": [{"index": 0, "delta": {}, "logprobs": {"content": [{"token": PAD, "logprob": 0, "bytes": [1] * 99}]}}]}),
        event({"choices": [{"index": 0, "text": PAD, "message": {"content": PAD}, "delta": {}}]}),
        event({"choices": [{"index": 1, "delta": {"content": PAD}}]}),
        event({"choices": [{"index": 0, "delta": {}}, {"index": 0, "delta": {"content": PAD}}]}),
        event({"choices": [{"index": None, "delta": {"content": PAD}}]}),
        b'data: {"choices":[{"delta":{"content":"' + PAD.encode() + b'","content":""}}]}\n\n',
        b'data: {"choices":[{"delta":{"content":"' + PAD.encode() + b"\n\n",
        b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n',
        b"data: " + b"[" * 99_999 + b"\n\n",
        b": " + PAD.encode() + b"\n\n",
        b"data: {}\n\n" * 500,
        b"\n\n" * 500,
        usage_event(),
    ],
)
def test_padding_is_worth_nothing(padding: bytes) -> None:
    said = chat_event({"content": "Hello"})
    assert counted(said, padding, said, DONE) == counted(said + padding + said + DONE) == 10
    one = meter()
    one.add(padding + said + padding)
    assert one.relayed(CLAIM) == 5


def test_behind_the_end_nobody_reads() -> None:
    said, more = chat_event({"content": "Hello"}), chat_event({"content": PAD})
    assert counted(said + DONE + more) == counted(said, DONE, more) == 5
    assert counted(said, b'data: {"choices":[],"pad":"' + b"y" * (1 << 20), b'"}\n\n' + more) == 5


def test_an_event_in_pieces_is_read_as_one() -> None:
    whole = chat_event({"content": "Hello"})
    assert counted(*(whole[at : at + 7] for at in range(0, len(whole), 7))) == 5
    assert counted(whole.removesuffix(b"\n\n") + b"y") == 0


def test_blanks_and_names_that_come_twice_in_an_object_of_arguments_are_worth_nothing() -> None:
    padded = b'{"a":"%s", %s "a":1}' % (PAD.encode(), b" " * 999)
    said = b'{"tool_calls":[{"function":{"arguments":%s}}]}'
    assert counted(b'data: {"choices":[{"delta":' + said % padded + b"}]}\n\n") == len('{"a":1}')


def test_each_of_several_answers_has_its_text_and_its_end() -> None:
    pieces = [chat_event({"content": "Hello"}, index=index) for index in range(4)]
    assert counted(*pieces, answer_count=4) == 20
    assert counted(*pieces, answer_count=2) == 10
    document = {"choices": [{"index": index, "message": {"content": "Hello"}} for index in range(3)]}
    assert meter(answer_count=3).counted_of_document(json.dumps(document).encode(), CLAIM) == 15 + 3 * UNSEEN_TOKENS_ALLOWANCE


def test_plain_completions_are_texts() -> None:
    assert counted(choice_event(text="Hello", delta={"content": PAD}), is_chat=False) == 5
    document = json.dumps({"choices": [{"index": 0, "text": "Hello", "message": {"content": PAD}}]}).encode()
    assert meter(is_chat=False).counted_of_document(document, CLAIM) == 5 + UNSEEN_TOKENS_ALLOWANCE


@pytest.mark.parametrize("document", [b"", b"[]", b'{"choices":{}}', b'{"choices":[1]}', b"\xff", b"[" * 99_999])
def test_what_is_no_answer_has_no_text(document: bytes) -> None:
    assert meter().counted_of_document(document, CLAIM) == UNSEEN_TOKENS_ALLOWANCE


def test_an_honest_count_is_never_cut() -> None:
    """By events that carry one token, several, or the last bytes of one that came before."""
    one_each = meter()
    for _ in range(500):
        one_each.add(chat_event({"content": "x"}))
    one_each.add(chat_event({}, "stop") + DONE)
    assert (one_each.relayed(500), one_each.counted(501)) == (500, 501)
    together = meter()
    together.add(chat_event({"role": "assistant", "content": ""}) + chat_event({"content": " 1 2 3" * 20}) + DONE)
    assert together.counted(121) == 121
    halves = meter()
    for text in ("", "", "", "\U0001f600") * 10:
        halves.add(chat_event({"content": text}))
    assert (halves.relayed(40), halves.counted(41)) == (40, 41)


EMPTIES = b"[" + b"[]," * 700_000 + b"[]]"
OBJECTS = b"[" + b"{}," * 700_000 + b"{}]"


@pytest.mark.parametrize(
    "choices",
    [
        b'[{"message":%s}]' % EMPTIES,
        b'[{"message":{"content":"Hello","pad":%s},"logprobs":%s}]' % (EMPTIES, OBJECTS),
        b'[{"message":{"content":"Hello","reasoning_details":%s}}]' % EMPTIES,
        b'[{"message":{"content":%s}}]' % OBJECTS,
        b'[{"message":{"tool_calls":%s}}]' % OBJECTS,
        b'[{"message":{"tool_calls":[{"function":{"arguments":{"a":%s}}}]}}]' % EMPTIES,
        b'[{"message":{"tool_calls":[%s]}}]' % b",".join([b'{"function":{"arguments":[%s[]]}}' % (b"[]," * 20_000)] * 40),
        b'[{"message":{"content":[%s]}}]' % b",".join([b'{"thinking":[%s{}]}' % (b'{"text":"y"},' * 255)] * 255),
        b'[{"index":%s,"message":{"content":"Hello"}}]' % EMPTIES,
        OBJECTS,
    ],
)
def test_what_a_node_sends_in_place_of_an_answer_takes_no_memory(choices: bytes) -> None:
    document, events = b'{"choices":%s}' % choices, b'data: {"choices":%s}\n\n' % choices.replace(b'"message"', b'"delta"')
    one, other = meter(), meter()
    tracemalloc.start()
    one.counted_of_document(document, CLAIM)
    other._read_event(events.removesuffix(b"\n\n"))
    held_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held_bytes < 3 * len(document) + (4 << 20), "copies of an event's bytes, and little more, instead of 40 MB"
    assert one.counted_of_document(b"{}", CLAIM) < UNSEEN_TOKENS_ALLOWANCE + OBJECT_BYTES_MAX


def test_an_answer_in_many_parts_counts_as_far_as_it_is_read() -> None:
    parts = [{"type": "text", "text": "y"}] * (ITEM_COUNT_MAX + 1)
    assert counted(choice_event(delta={"content": parts})) == ITEM_COUNT_MAX
    assert counted(choice_event(delta={"content": [{"thinking": parts}] * 99})) < VALUE_COUNT_MAX
    whole = {"choices": [{"index": 0, "message": {"content": "y" * 50_000, "reasoning": "y" * 40_000}}]}
    assert meter().counted_of_document(json.dumps(whole).encode(), CLAIM) == 90_000 + UNSEEN_TOKENS_ALLOWANCE
    too_long = {"choices": [{"index": 0, "message": {"content": "y" * READ_BYTES_MAX}}]}
    assert meter().counted_of_document(json.dumps(too_long).encode(), CLAIM) == UNSEEN_TOKENS_ALLOWANCE


def test_only_as_much_is_kept_and_read_as_there_is_need_of(monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[str] = Counter()
    real = TextMeter._read_event

    def counting(self: TextMeter, one_event: bytes) -> None:
        read["events"] += 1
        real(self, one_event)

    monkeypatch.setattr(TextMeter, "_read_event", counting)
    piece = chat_event({"content": " word"})
    one = meter(tokens_max=10_000)
    for _ in range(100):
        one.add(piece)
    assert (read["events"], one.relayed(100), read["events"]) == (0, 100, 20)
    tracemalloc.start()
    for number in range(20_000):
        one.add(piece + b": %d\n\n" % number)
        if number % 100 == 0:
            assert one.relayed(100 + number) == min(100 + number, 10_000)
    held_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held_bytes < 4 * UNREAD_BYTES_MAX
    assert read["events"] < 5_000, "there were bytes enough for every token that was asked for"
    assert one.counted(10_000) == 10_000
