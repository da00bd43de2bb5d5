"""What both edges, HTTP and gRPC, hold to alike.

Decides how long a client may keep either waiting, and what the log says of a failure that nobody foresaw. It must not know HTTP or gRPC.
"""

from __future__ import annotations

import traceback
from typing import Any, Final

import structlog

from potluck_protocol.values import RequestId

BODY_SECONDS_MAX: Final = 30.0
"""How long what a client asks, an HTTP body or the one message of a gRPC call, may take to arrive."""
STALL_SECONDS_MAX: Final = 60.0
"""A client that takes nothing for so long, with something waiting for it, is gone, whatever its connection says: it would hold an engine's
slot, or at least its connection, for ever."""
STACK_FRAMES_MAX: Final = 8

_log = structlog.get_logger()


def log_unexpected(event: str, request_id: RequestId, error: Exception, **facts: Any) -> None:
    """Says where it happened, but not in the exception's own words: they may quote what must never be logged."""
    # Not `stack`: structlog takes that for a text of its own.
    frames = traceback.format_tb(error.__traceback__)[-STACK_FRAMES_MAX:]
    _log.error(event, error_id=request_id, error_type=type(error).__name__, frames=frames, **facts)
