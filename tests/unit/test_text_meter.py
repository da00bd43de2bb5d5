"""How many tokens an answer can have had, by what its client could read of it."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from typing import Any

import pytest

from potluck_coordinator.domain.delivered_text import UNSEEN_TOKENS_ALLOWANCE, UNSEEN_TOKENS_PER_CALL_ALLOWANCE
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
        # None of it is text that a client is shown.
        ({"role": PAD}, 0),
        ({"content": "", "pad": PAD}, 0),
        ({"content": {"text": PAD}}, 0),
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
