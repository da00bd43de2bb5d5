"""Padding is never paid for, and an honest count is never cut."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.delivered_text import UNSEEN_TOKENS_ALLOWANCE
from potluck_coordinator.gateway.text_meter import TextMeter

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), min_size=1, max_size=30)
FIELDS = st.sampled_from(["content", "reasoning_content", "refusal"])
ANYTHING = st.recursive(
    st.none() | st.integers() | st.text(st.characters(exclude_categories=["Cs"]), max_size=300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["pad", "content", "text", "delta"]), inner, max_size=3),
    max_leaves=5,
)
PADS = st.dictionaries(st.sampled_from(["pad", "logprobs", "id", "token_ids", "message", "timings"]), ANYTHING, max_size=3)
EMPTY_EVENTS = st.sampled_from([b": pad\n\n", b"data: {}\n\n", b'data: {"choices":[{"index":0,"delta":{"content":""}}]}\n\n', b"\n\n"])


def event(fields: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def meter(answer_count: int = 1) -> TextMeter:
    return TextMeter(is_chat=True, answer_count=answer_count, tokens_max=1 << 30)


@given(TEXTS, FIELDS, st.data())
def test_padding_never_raises_what_is_paid(texts, name, data):
    plain, padded = meter(), meter()
    for text in texts:
        delta = {name: text}
        plain.add(event({"choices": [{"index": 0, "delta": delta}]}))
        in_event, in_choice, in_delta = data.draw(PADS), data.draw(PADS), data.draw(PADS)
        padded.add(event({**in_event, "choices": [{**in_choice, "index": 0, "delta": {**in_delta, **delta}}]}))
        padded.add(data.draw(EMPTY_EVENTS))
    text_bytes = len("".join(texts).encode())
    for claim in (text_bytes, 10**9):
        assert padded.relayed(claim) == plain.relayed(claim) == text_bytes
        assert padded.counted(claim) == plain.counted(claim) <= text_bytes + UNSEEN_TOKENS_ALLOWANCE
    whole = {"choices": [{"index": 0, "message": {name: "".join(texts)}, **data.draw(PADS.filter(lambda pad: "message" not in pad))}]}
    assert meter().counted_of_document(json.dumps({**data.draw(PADS), **whole}).encode(), 10**9) == text_bytes + UNSEEN_TOKENS_ALLOWANCE


@given(TEXTS, FIELDS, st.integers(0, UNSEEN_TOKENS_ALLOWANCE), st.data())
def test_an_honest_count_is_never_cut(texts, name, unseen_count, data):
    """Of any tokenizer: each token is some bytes of the text, wherever they are cut, or one of a few that show nothing."""
    text = "".join(texts)
    text_bytes = len(text.encode())
    seen_count = data.draw(st.integers(min(1, text_bytes), text_bytes))
    claim = seen_count + unseen_count
    whole = json.dumps({"choices": [{"index": 0, "message": {name: text}}]}).encode()
    streamed, by_any_pieces = meter(), meter()
    for piece in texts:
        streamed.add(event({"choices": [{"index": 0, "delta": {name: piece}}]}))
        by_any_pieces.add(event({"choices": [{"index": 0, "delta": {"role": "assistant", name: piece}, "logprobs": None}]}))
        # Whoever marks what has been delivered asks again and again.
        by_any_pieces.relayed(data.draw(st.integers(0, 5)))
    assert streamed.counted(claim) == by_any_pieces.counted(claim) == meter().counted_of_document(whole, claim) == claim
    assert streamed.relayed(seen_count) == seen_count
