"""Times the answers that have an engine to themselves, from which its rates are learned.

Decides which answers count: streamed ones, of one choice, that no other attempt on the same replica met and no slow client held up. Of an
answer's bytes only the end is looked into, and only of such an answer, once, when it is complete: the engine's usage record stands there.
`domain.solo_rates` says what the times mean. It must not know HTTP or the link.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

from potluck_node.domain.event_stream import EVENT_END, DataLines
from potluck_node.domain.solo_rates import SoloAnswer, SoloRates, after
from potluck_protocol.values import Endpoint, ReplicaId, StartAttempt

TAIL_BYTES: Final = 4096
"""Of an answer's end, which is kept: the usage record is a few hundred bytes, and comes last but for the end itself."""
_SEVERAL: Final = re.compile(rb'"(?:n|n_cmpl|best_of)"\s*:\s*(?!1\s*[,}]|null\b)\S|"prompt"\s*:\s*\[')
"""In a request that may ask for several choices or answer several prompts, which an engine works on side by side."""


class Stopwatch:
    """One answer's times. Made by `SoloAnswers.begin`.

    Args:
        now: monotonic seconds.
        names_role_first: the first event of the answer names the role and holds no token, as a chat's does.
    """

    __slots__ = ("_begun_at_seconds", "_first_at_seconds", "_last_at_seconds", "_now", "_roles_left", "_spoiled", "_tail")

    def __init__(self, now: Callable[[], float], *, names_role_first: bool) -> None:
        self._now = now
        self._begun_at_seconds = self._last_at_seconds = now()
        self._first_at_seconds: float | None = None
        self._roles_left = int(names_role_first)
        self._spoiled = False
        self._tail = b""

    def spoil(self) -> None:
        """The answer is not the engine's alone to make, so its times say nothing."""
        self._spoiled = True
        self._tail = b""

    def take(self, events: bytes, *, held_up: bool) -> None:
        """Whole events have come; `held_up`: its client does not take them as fast as they come."""
        if self._spoiled:
            return
        if held_up:
            self.spoil()
            return
        data_count = DataLines().take(events)
        if not data_count:
            return
        self._last_at_seconds = self._now()
        if self._first_at_seconds is None:
            if data_count > self._roles_left:
                self._first_at_seconds = self._last_at_seconds
            self._roles_left = 0
        self._tail = (self._tail + events)[-TAIL_BYTES:]

    def answer(self) -> SoloAnswer | None:
        """What the complete answer showed; None of a spoiled one, or one without a usage record."""
        if self._spoiled or self._first_at_seconds is None:
            return None
        usage = _usage_in(self._tail)
        details = usage.get("prompt_tokens_details")
        prompt_tokens, completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        # This node's engines are started to tell of these, and some leave the word out where there were none.
        cached_tokens = (details.get("cached_tokens") if isinstance(details, dict) else None) or 0
        if not (isinstance(prompt_tokens, int) and isinstance(completion_tokens, int) and isinstance(cached_tokens, int)):
            return None
        return SoloAnswer(
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            completion_tokens=completion_tokens,
            first_token_seconds=self._first_at_seconds - self._begun_at_seconds,
            further_tokens_seconds=self._last_at_seconds - self._first_at_seconds,
        )


class SoloAnswers:
    """The rates of a node's replicas.

    Args:
        now: monotonic seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._newest: dict[ReplicaId, Stopwatch] = {}
        self._rates: dict[ReplicaId, SoloRates] = {}

    def rates(self, replica_id: ReplicaId) -> SoloRates:
        """What the replica's engine has shown since it started."""
        return self._rates.get(replica_id, SoloRates())

    def begin(self, start: StartAttempt, *, alone: bool) -> Stopwatch:
        """The attempt goes to its engine, `alone` or beside others; whichever had it alone until now has not any more."""
        before = self._newest.get(start.replica_id)
        if before is not None:
            before.spoil()
        stopwatch = Stopwatch(self._now, names_role_first=start.endpoint is Endpoint.CHAT_COMPLETIONS)
        if not (alone and start.stream):
            stopwatch.spoil()
        self._newest[start.replica_id] = stopwatch
        return stopwatch

    def end(self, start: StartAttempt, stopwatch: Stopwatch) -> None:
        """The attempt was answered in full."""
        answer = stopwatch.answer()
        if answer is not None and _SEVERAL.search(start.body) is None:
            self._rates[start.replica_id] = after(self.rates(start.replica_id), answer)

    def forget(self, replica_id: ReplicaId) -> None:
        """Its engine is gone; the next one may have been given less, or be another version."""
        self._newest.pop(replica_id, None)
        self._rates.pop(replica_id, None)


def _usage_in(tail: bytes) -> dict[str, Any]:
    """The last usage record among the events; empty where there is none. The first event may be cut."""
    for event in reversed(tail.split(EVENT_END)):
        if event.startswith(b"data:") and b'"usage"' in event:
            try:
                content = json.loads(event[5:])
            except (ValueError, RecursionError):
                continue
            usage = content.get("usage") if isinstance(content, dict) else None
            if isinstance(usage, dict):
                return usage
    return {}
