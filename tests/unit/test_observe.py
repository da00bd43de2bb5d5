"""What a log line looks like, and what never stands in one."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from potluck_protocol.observe import BLANK, configure_logging, redact
from potluck_protocol.values import EndReason

KEY = "sk-potluck-abcdefgh-" + "s" * 43
INVITE = "potluck1.aHR0cDovL2E.abc.def.ghi"


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[dict[str, object]]]]:
    """Reads back what was written to standard error."""
    yield lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    structlog.contextvars.clear_contextvars()


def test_a_line_has_the_event_its_level_a_utc_time_and_what_is_bound(written: Callable[[], list[dict[str, object]]]) -> None:
    configure_logging(json=True)
    structlog.contextvars.bind_contextvars(request_id="req_1")
    structlog.get_logger().info("request_served", status=200)

    (line,) = written()
    assert str(line.pop("timestamp")).endswith("Z")
    assert line == {"event": "request_served", "level": "info", "request_id": "req_1", "status": 200}


def test_levels_below_the_wanted_one_are_not_written(written: Callable[[], list[dict[str, object]]]) -> None:
    configure_logging(json=True, level="warning")
    structlog.get_logger().info("quiet")
    structlog.get_logger().warning("loud")

    assert [line["event"] for line in written()] == ["loud"]


def closed_file() -> io.StringIO:
    file = io.StringIO()
    file.close()
    return file


class Reentered(io.StringIO):
    def write(self, _text: str) -> int:
        raise RuntimeError("reentrant call")


@pytest.mark.parametrize("json_lines", [True, False])
@pytest.mark.parametrize("file", [None, closed_file(), Reentered()], ids=["none", "closed", "written to from within"])
def test_without_a_standard_error_that_takes_lines_logging_fails_nobody(
    file: io.StringIO | None, json_lines: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", file)
    configure_logging(json=json_lines)
    structlog.get_logger().warning("lost", count=1)
    logging.getLogger("a.library").warning("lost too")
    logging.getLogger("a.library").warning("%d", "no number")
    logging.getLogger().handlers[0].flush()


class Unspeakable:
    def __str__(self) -> str:
        raise ValueError("no words")

    __repr__ = __str__


def test_a_line_that_cannot_be_formed_fails_nobody_and_says_so(written: Callable[[], list[dict[str, object]]]) -> None:
    configure_logging(json=True)
    structlog.get_logger().info("node_seen", what=Unspeakable())
    structlog.get_logger().info("count", count=10**5000)
    structlog.get_logger().bind(what=Unspeakable()).error(f"bound {KEY}")
    logging.getLogger("a.library").warning("%d", "no number")

    assert [(line["event"], line["of"]) for line in written()] == [
        ("log_line_lost", "node_seen"),
        ("log_line_lost", "count"),
        ("log_line_lost", f"bound {BLANK}"),
        ("log_line_lost", "a.library"),
    ]


def test_a_log_that_nobody_can_write_to_fails_nobody(
    written: Callable[[], list[dict[str, object]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.StringIO):
        def write(self, _text: str) -> int:
            raise BlockingIOError

        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Broken())
    configure_logging(json=True)
    monkeypatch.undo()
    structlog.get_logger().warning("lost")
    logging.getLogger("a.library").warning("lost too")

    assert written() == []


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="loud"):
        configure_logging(json=True, level="loud")


def test_lines_of_libraries_look_the_same_and_are_blanked_too(written: Callable[[], list[dict[str, object]]]) -> None:
    configure_logging(json=True)
    logging.getLogger("some.library").warning("refused %s", KEY)
    logging.getLogger("some.library").info("chatter")

    (line,) = written()
    assert line["event"] == f"refused {BLANK}"
    assert line["level"] == "warning"


def test_a_traceback_is_kept_and_its_secrets_are_not(written: Callable[[], list[dict[str, object]]]) -> None:
    configure_logging(json=True)
    try:
        raise RuntimeError(f"no such key {KEY}")  # noqa: TRY301
    except RuntimeError:
        structlog.get_logger().exception("failed")

    (line,) = written()
    assert "RuntimeError: no such key [redacted]" in str(line["exception"])


@pytest.mark.parametrize(
    "name",
    [
        "prompt",
        "messages",
        "body",
        "secret",
        "token",
        "api_key",
        "authorization",
        "Authorization",
        "token_secret",
        "join_token",
        "request_body",
    ],
)
def test_fields_named_like_secrets_or_text_are_blanked_at_any_depth(name: str) -> None:
    assert redact(None, "", {name: "x", "inner": [{name: "x", "ok": 1}]}) == {name: BLANK, "inner": [{name: BLANK, "ok": 1}]}


@pytest.mark.parametrize("name", ["prompt_token_count", "token_id", "key_prefix", "completion_tokens", "request_id"])
def test_counts_and_ids_stay(name: str) -> None:
    assert redact(None, "", {name: 7}) == {name: 7}


@given(before=st.text(), after=st.from_regex(r"( .*)?", fullmatch=True), secret=st.sampled_from([KEY, INVITE]))
def test_a_key_or_invite_is_blanked_wherever_it_stands(before: str, after: str, secret: str) -> None:
    assert secret not in redact(None, "", {"event": before + secret + after})["event"]


def test_bytes_are_never_shown() -> None:
    assert redact(None, "", {"chunk": b"Once upon a time"}) == {"chunk": "[16 bytes]"}


def test_a_line_for_people_without_colours_is_structlogs_own(capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"level": "info", "timestamp": "2026-11-23T00:00:00Z", "event": "asked", "account": "a b", "b": "", "name": "x=1", "z": None}
    configure_logging(json=False)
    render = structlog.get_config()["processors"][-1]
    complete = structlog.dev.ConsoleRenderer(colors=False)
    for event in (fields, {**fields, "event": "e" * 40, "size": 1.5, "kind": EndReason.COMPLETED}, {**fields, "exception": "Traceback"}):
        assert render(None, "info", dict(event)) == complete(None, "info", dict(event))
    assert capsys.readouterr().err == ""
