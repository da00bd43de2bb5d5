"""`potluck tiers`, with a pool that answers from a script."""

from __future__ import annotations

from pathlib import Path

import pytest

from potluck_protocol.v1 import pool_pb2
from tests.support.scripted_pool import API_KEY, scripted_pool
from tests.support.terminal import lonely_terminal


@pytest.mark.parametrize(
    ("window_seconds", "reset_ms", "words"),
    [
        (3600, 3_588_000, "99 of 100 requests left in 60 min, one more in 60 min;"),
        (3600, 3_540_000, "99 of 100 requests left in 60 min, one more in 59 min;"),
        (3600, 3_541_000, "99 of 100 requests left in 60 min, one more in 60 min;"),
        (3600, 61_200, "99 of 100 requests left in 60 min, one more in 62 s;"),
        (60, 200, "99 of 100 requests left in 60 s, one more in 1 s;"),
    ],
)
def test_tiers_says_times_as_people_do_and_none_that_is_too_short(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    window_seconds: int,
    reset_ms: int,
    words: str,
):
    terminal = lonely_terminal(monkeypatch, capsys, tmp_path)
    told = pool_pb2.GetTiersResponse(
        default_request_count_max=100, remaining_request_count=99, window_seconds=window_seconds, reset_ms=reset_ms, first_token_ms=5000
    )
    with scripted_pool(tmp_path) as pool:
        monkeypatch.setenv("POTLUCK_URL", pool.url)
        monkeypatch.setenv("POTLUCK_API_KEY", API_KEY)
        pool.operator_replies.append(told)
        assert terminal.run("tiers") == 0
    assert words in terminal.out
