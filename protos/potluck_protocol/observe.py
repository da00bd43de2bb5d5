"""Logging for the long-running processes: what a line looks like, and what never stands in one.

Decides the form of log lines (console or JSON, on standard error) and what is blanked in them. Blanking is the second fence: callers do not
log prompts, answers or secrets in the first place. It must not know what any event means.

Imported by the coordinator and the agent only; the SDK logs through the standard library and stays silent by default.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from json import dumps
from typing import Any, Final, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

BLANK: Final = "[redacted]"

_SECRET_KEYS: Final = frozenset(
    {
        "answer",
        "api_key",
        "authorization",
        "body",
        "choices",
        "completion",
        "content",
        "delta",
        "invite",
        "key",
        "messages",
        "password",
        "payload",
        "private_key",
        "prompt",
        "secret",
        "text",
        "token",
    }
)
"""A field of one of these names, or whose name ends in one after an underscore, is blanked. Counts and ids (`prompt_token_count`,
`token_id`, `key_prefix`) end otherwise and stay."""

_SECRET_TEXT: Final = re.compile(
    r"sk-potluck-[A-Za-z0-9_-]+"  # an API key
    r"|potluck1\.[A-Za-z0-9_.-]+"  # an invite
    r"|(?<=Bearer )\S+"
    r"|(?<=://)[^\s/:@]*:[^\s@]+(?=@)"  # who, and with which password, in a URL
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)",
    re.DOTALL,
)
_DEPTH_MAX: Final = 4
_NEEDS_MORE_LINES: Final = frozenset({"stack", "exception", "exc_info", "logger", "logger_name"})
_UNQUOTED: Final = re.compile(r"[^ \t=\r\n\"']*")


class _UnfailingFile:
    """A file whose failures end nobody: a process must outlive whoever read its log (`… 2>&1 | head`), at the price of lines.

    Also one that is closed, as in a process that ends, one that is written to again from within a write, as by a signal's handler, and
    none at all, as where Python was started without a standard error.
    """

    def __init__(self, file: TextIO | None) -> None:
        self._file = file

    def write(self, text: str) -> int:
        if self._file is not None:
            with contextlib.suppress(Exception):
                self._file.write(text)
        return len(text)

    def flush(self) -> None:
        if self._file is not None:
            with contextlib.suppress(Exception):
                self._file.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(Exception):
            return self._file is not None and self._file.isatty()
        return False


class _UnfailingHandler(logging.StreamHandler[TextIO]):
    """For libraries' lines: of one that cannot be formed it is told whose it was, and what it said is lost."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the base class's name
        self.stream.write(_lost_line(record.name))


def _unfailing_logger(level_number: int) -> type[Any]:
    """For our own lines: the same. Whoever logs has other things to do than to mend its log."""
    base: Any = structlog.make_filtering_bound_logger(level_number)

    class UnfailingLogger(base):  # type: ignore[misc]
        def _proxy_to_logger(self, method_name: str, event: str | None = None, **fields: Any) -> Any:
            with contextlib.suppress(Exception):
                return super()._proxy_to_logger(method_name, event, **fields)
            with contextlib.suppress(Exception):
                self._logger.error(_lost_line(str(event)).rstrip())
            return None

    return UnfailingLogger


def _lost_line(of: str) -> str:
    return dumps({"event": "log_line_lost", "level": "error", "of": _SECRET_TEXT.sub(BLANK, of)}) + "\n"


def configure_logging(*, json: bool, level: str = "info", first: Processor | None = None) -> None:
    """Sends this process's log lines, its libraries' included, to standard error.

    Args:
        json: one JSON object a line for machines; otherwise lines for people.
        level: the least severe level that is written: "debug", "info", "warning" or "error".
        first: sees each line of our own before all else, and may drop it.

    Raises:
        ValueError: the level is none of these.
    """
    level_number = _level_number(level)
    file = _UnfailingFile(sys.stderr)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        redact,
    ]
    renderer: Processor = structlog.processors.JSONRenderer(sort_keys=False) if json else _renderer_for_people(colors=file.isatty())
    structlog.configure(
        processors=[*([first] if first is not None else []), *shared, renderer],
        wrapper_class=_unfailing_logger(level_number),
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", file)),
        cache_logger_on_first_use=False,
    )
    handler = _UnfailingHandler(cast("TextIO", file))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # A library's debug lines quote what passes through it; ours never do.
    root.setLevel(max(level_number, logging.WARNING))


def _renderer_for_people(*, colors: bool) -> Processor:
    """Structlog's own; without colours the same line put together in a tenth of its time, for a pool writes one for each request."""
    complete = structlog.dev.ConsoleRenderer(colors=colors)
    if colors:
        return complete

    def render(logger: WrappedLogger, method: str, event: EventDict) -> str:
        if not _NEEDS_MORE_LINES.isdisjoint(event):
            return complete(logger, method, event)
        timestamp, level, words = event.pop("timestamp", ""), event.pop("level", ""), event.pop("event", "")
        fields = [f"{key}={_shown(event[key])}" for key in sorted(event)]
        return " ".join((f"{timestamp} [{level:<9}] {words:<30}", *fields)).strip(" ")

    return render


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and _UNQUOTED.fullmatch(value) else repr(value)


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Blanks fields that are named like secrets or like text of a request, and anything that looks like a key, at any depth."""
    return {key: BLANK if _names_a_secret(key) else _redacted(value, 0) for key, value in event.items()}


@lru_cache(maxsize=1024)
def _names_a_secret(key: str) -> bool:
    lowered = key.lower().replace("-", "_")
    return lowered in _SECRET_KEYS or any(lowered.endswith("_" + name) for name in _SECRET_KEYS)


def _redacted(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return _SECRET_TEXT.sub(BLANK, value)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"[{len(value)} bytes]"
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth >= _DEPTH_MAX:
        return BLANK
    if isinstance(value, Mapping):
        return {str(key): BLANK if _names_a_secret(str(key)) else _redacted(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redacted(inner, depth + 1) for inner in value]
    return _SECRET_TEXT.sub(BLANK, str(value))


def _level_number(level: str) -> int:
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"log level {level!r} is not one of debug, info, warning, error")
    return number
