"""Log lines that come once a node, replica or attempt, held to so many a second: where a thousand nodes come back, one line says so.

Decides which events those are and how many are written as they are. The others of a second are counted, and told in one line at its end. It
must not know what any of them means. The line of a request itself is never held back; what became of its attempts may be, and `potluck
explain` tells it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import structlog

LINES_PER_SECOND_MAX: Final = 10
"""Of one event."""
OF_NODES: Final = frozenset(
    {
        "node_joined",
        "node_connected",
        "node_gone",
        "session_ended",
        "close_session_failed",
        "certificate_renewed",
        "certificate_not_renewed",
        "certificate_asked_for_another_key",
        "node_certificate_renewed",
        "replica_standing_changed",
        "replica_pace_changed",
        "replica_probed",
        "probe_broke",
        "engine_died",
        "deserted_engine_died",
        "lone_death_not_heard",
        "lethal_request_not_told",
        "attempt_lost",
        "attempt_stalled",
        "answer_not_passed_on",
    }
)
"""Events of one node, one of its replicas, or one attempt there: when many nodes are lost together, all of theirs come at once."""
_CALL: Final = "grpc_call"
_CALLS_OF_NODES: Final = frozenset({"NodeService/Link"})

_log = structlog.get_logger()


class LogSurges:
    """A processor of one process's lines.

    Args:
        now: monotonic seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._second = 0
        self._counts: Counter[str] = Counter()

    def __call__(self, _logger: Any, _method: str, event: Any) -> Any:
        """The line, or `DropEvent` for one that is only counted."""
        name = str(event.get("event"))
        if not (name in OF_NODES or (name == _CALL and event.get("method") in _CALLS_OF_NODES)):
            return event
        self.tell()
        self._counts[name] += 1
        if self._counts[name] > LINES_PER_SECOND_MAX:
            raise structlog.DropEvent
        return event

    def tell(self) -> None:
        """Says what was held back in a second that is over; called now and then."""
        second = int(self._now())
        if second == self._second:
            return
        self._second, counts, self._counts = second, self._counts, Counter()
        held_back = {name: count - LINES_PER_SECOND_MAX for name, count in counts.items() if count > LINES_PER_SECOND_MAX}
        if held_back:
            _log.info("lines_held_back", **held_back)
