"""Chunks of a stream add up to the whole answer."""

from __future__ import annotations

from potluck_node.engines.fold import AnswerFold

HEAD = {"id": "chatcmpl-1", "created": 5, "model": "m", "object": "chat.completion.chunk"}


def folded(*events):
    fold = AnswerFold()
    for event in events:
        fold.add(event)
    return fold


def chunk(delta=None, finish_reason=None, index=0, **more):
    return {**HEAD, "choices": [{"index": index, "finish_reason": finish_reason, "delta": delta or {}, **more}]}


def test_texts_usage_and_the_last_finish_reason():
    answer = folded(
        chunk({"role": "assistant", "content": None}),
        chunk({"reasoning_content": "hm"}),
        chunk({"content": "a"}),
        chunk({"content": "b"}),
        chunk(finish_reason="length"),
        {**HEAD, "choices": [], "usage": {"completion_tokens": 2}, "timings": {"n": 1}},
    ).answer()
    assert answer == {
        **HEAD,
        "object": "chat.completion",
        "usage": {"completion_tokens": 2},
        "timings": {"n": 1},
        "choices": [
            {
                "index": 0,
                "finish_reason": "length",
                "message": {"role": "assistant", "content": "ab", "reasoning_content": "hm"},
            }
        ],
    }


def test_several_choices_come_in_order_each_with_its_own_text_and_log_probabilities():
    answer = folded(
        chunk({"content": "B"}, index=1, logprobs={"content": [{"token": "B"}]}),
        chunk({"content": "A"}, index=0, logprobs={"content": [{"token": "A"}]}),
        chunk({"content": "b"}, index=1, logprobs={"content": [{"token": "b"}]}),
    ).answer()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["A", "Bb"]
    assert answer["choices"][1]["logprobs"] == {"content": [{"token": "B"}, {"token": "b"}]}


def test_tool_calls_are_joined_by_index():
    answer = folded(
        chunk({"tool_calls": [{"index": 0, "id": "c0", "type": "function", "function": {"name": "f", "arguments": ""}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]}),
        chunk({"tool_calls": [{"index": 1, "id": "c1", "type": "function", "function": {"name": "g", "arguments": "{}"}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}),
        chunk(finish_reason="tool_calls"),
    ).answer()
    message = answer["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"type": "function", "id": "c0", "function": {"name": "f", "arguments": '{"a":1}'}},
        {"type": "function", "id": "c1", "function": {"name": "g", "arguments": "{}"}},
    ]


def test_completions_keep_their_object():
    head = {"id": "cmpl-1", "object": "text_completion"}
    parts = [{**head, "choices": [{"index": 0, "text": text, "finish_reason": None}]} for text in ("a", "b")]
    answer = folded(*parts).answer()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "finish_reason": None, "text": "ab"}]


def test_each_choices_own_record_is_summed_and_every_prompt_counts_once():
    def end(index, prompt_tokens, completion_tokens, cached_tokens):
        usage = {
            "completion_tokens": completion_tokens,
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }
        return {"choices": [{"index": index, "text": "", "finish_reason": "stop"}], "usage": usage}

    fold = AnswerFold(prompt_count=2)
    for event in (end(1, 4, 3, 3), end(3, 11, 2, 10), end(2, 11, 7, 5), end(0, 4, 1, 0)):
        fold.add(event)
    assert fold.answer()["usage"] == {
        "completion_tokens": 13,
        "prompt_tokens": 15,
        "total_tokens": 28,
        "prompt_tokens_details": {"cached_tokens": 5},
    }


def test_record_without_choices_is_that_of_the_choice_that_ended_and_a_choice_without_one_is_counted():
    usage = folded(
        chunk({"role": "assistant", "content": None}, index=1),
        chunk({"content": "B"}, index=1),
        chunk({"content": "A"}, index=0),
        chunk({"content": "b"}, index=1),
        chunk(finish_reason="length", index=1),
        chunk(finish_reason="stop", index=0),
        {**HEAD, "choices": [], "usage": {"completion_tokens": 9, "prompt_tokens": 5}},
    ).answer()["usage"]
    assert (usage["completion_tokens"], usage["prompt_tokens"], usage["total_tokens"]) == (11, 5, 16)
