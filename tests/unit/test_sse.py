"""What the gateway sees in an answer, and the one event that it takes out."""

from __future__ import annotations

import pytest

from potluck_coordinator.gateway.sse import UsageWatcher, usage_of_document
from potluck_protocol.values import Usage
from tests.support.http_edge import CHAT_DOCUMENT, DONE, USAGE, chat_event, event, usage_event

ROLE = chat_event({"role": "assistant", "content": None})
TOKEN = chat_event({"content": "Hello"})
FINISH = chat_event({}, "stop")


def test_usage_event_is_dropped_unless_asked_for() -> None:
    for asked in (False, True):
        watcher = UsageWatcher(keep_usage_event=asked)
        given = b"".join(watcher.feed(piece) for piece in (ROLE, TOKEN, TOKEN + FINISH, usage_event(), DONE))
        assert given == ROLE + TOKEN + TOKEN + FINISH + (usage_event() if asked else b"") + DONE
        assert (watcher.usage, watcher.done, watcher.token_count) == (USAGE, True, 2)


def test_events_leave_as_the_same_object() -> None:
    watcher = UsageWatcher(keep_usage_event=False)
    for piece in (ROLE, TOKEN, TOKEN * 5, FINISH, DONE):
        assert watcher.feed(piece) is piece


def test_usage_event_and_done_in_one_piece() -> None:
    watcher = UsageWatcher(keep_usage_event=False)
    assert watcher.feed(ROLE + TOKEN + FINISH + usage_event() + DONE) == ROLE + TOKEN + FINISH + DONE
    assert watcher.usage == USAGE
    assert watcher.done


def test_usage_beside_a_choice_is_read_and_kept() -> None:
    last = event({"choices": [{"text": "", "index": 0, "finish_reason": "length"}], "usage": {"prompt_tokens": 1, "completion_tokens": 2}})
    watcher = UsageWatcher(keep_usage_event=False)
    assert watcher.feed(last) is last
    assert watcher.usage == Usage(1, 2)


def test_usage_of_null_in_every_event_changes_nothing() -> None:
    token = event({"choices": [{"index": 0, "delta": {"content": "a"}}], "usage": None})
    watcher = UsageWatcher(keep_usage_event=False)
    assert all(watcher.feed(token) is token for _ in range(3))
    assert (watcher.usage, watcher.token_count) == (None, 3)


def test_text_that_looks_like_marks_is_only_text() -> None:
    text = 'data: [DONE]\n\n"usage":{"prompt_tokens":9},"choices":[]'
    piece = chat_event({"content": text})
    watcher = UsageWatcher(keep_usage_event=False)
    assert watcher.feed(piece) is piece
    assert watcher.feed(piece) is piece
    assert (watcher.usage, watcher.done, watcher.token_count) == (None, False, 2)


@pytest.mark.parametrize("delta", [{"tool_calls": [{"index": 0}]}, {"reasoning_content": "hm"}, {"role": "assistant", "content": "a"}])
def test_everything_generated_counts(delta: dict[str, object]) -> None:
    watcher = UsageWatcher(keep_usage_event=False)
    watcher.feed(chat_event(delta))
    assert watcher.token_count == 1


def test_first_events_without_text_do_not_count_for_any_choice() -> None:
    watcher = UsageWatcher(keep_usage_event=False)
    for index in (0, 1):
        watcher.feed(chat_event({"role": "assistant", "content": ""}, index=index))
    assert watcher.token_count == 0


@pytest.mark.parametrize(
    "piece", [b"", b": ping\n\n", b"data: {broken\n\n", b"event: x\n\n", b"data: [1]\n\n", b'data: "\xff"\n\n', b"data:\n\n"]
)
def test_strange_events_pass_untouched(piece: bytes) -> None:
    watcher = UsageWatcher(keep_usage_event=False)
    assert watcher.feed(piece) == piece
    assert watcher.usage is None


@pytest.mark.parametrize(
    "end", [b"data:[DONE]\n\n", b"data: [DONE]\n", b"data: [DONE]\n\n: bye\n\n", b"event: end\ndata: [DONE]\n\n", b"\ndata: [DONE]\n\n"]
)
def test_the_end_is_seen_however_a_server_writes_it(end: bytes) -> None:
    watcher = UsageWatcher(keep_usage_event=False)
    assert watcher.feed(ROLE + TOKEN) == ROLE + TOKEN
    assert watcher.feed(end) == end
    assert (watcher.done, watcher.token_count) == (True, 1)


def test_usage_is_read_of_an_event_with_a_name_and_without_a_space() -> None:
    record = b"event: message\n" + usage_event().replace(b"data: ", b"data:")
    watcher = UsageWatcher(keep_usage_event=False)
    assert watcher.feed(ROLE + TOKEN) + watcher.feed(TOKEN + record + DONE) == ROLE + TOKEN + TOKEN + DONE
    assert (watcher.usage, watcher.done) == (USAGE, True)


def test_counts_below_zero_are_no_counts() -> None:
    watcher = UsageWatcher(keep_usage_event=True)
    watcher.feed(usage_event(Usage(-5, -1, -2)))
    assert watcher.usage == Usage()


def test_usage_of_a_document() -> None:
    assert usage_of_document(CHAT_DOCUMENT) == Usage(12, 3)
    for body in (
        b"",
        b"{}",
        b"[]",
        b'{"usage":null}',
        b'{"usage":[]}',
        b'{"usage":{"prompt_tokens":"1"}}',
        b"\xff",
        b'{"usage":' + b"[" * 9999,
    ):
        assert usage_of_document(body) is None


def test_pings_and_bare_newlines_are_no_tokens() -> None:
    watcher = UsageWatcher(keep_usage_event=False)
    watcher.feed(ROLE + TOKEN)
    watcher.feed(b": ping\n\n" * 10)
    watcher.feed(b"\n\n" * 1000)
    watcher.feed(TOKEN + b": ping\n\n" + TOKEN)
    assert watcher.token_count == 3


@pytest.mark.parametrize("count", [2**53 + 1, int("9" * 400)])
def test_a_record_with_a_count_beyond_all_counting_is_none(count: int) -> None:
    watcher = UsageWatcher(keep_usage_event=False)
    watcher.feed(chat_event({"content": "x"}))
    usage = b'{"prompt_tokens":1,"completion_tokens":' + str(count).encode()[:4000] + b"}"
    watcher.feed(b'data: {"choices":[],"usage":' + usage + b"}\n\ndata: [DONE]\n\n")
    assert (watcher.usage, watcher.done) == (None, True)
    assert usage_of_document(b'{"usage":' + usage + b"}") is None
