"""What attempts notice of the engines they wait for: how long each has been silent, how fast it is, and which requests it died of.

Decides whose words are waited for, and who was there at a death: those that wait for the engine, and those that gave up since it last said
something. `domain.silence` judges the one, `potluck_protocol.culprits` the other; `solo_answers` times answers. It must not know how an
engine is ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from potluck_node.domain.silence import Verdict, judge
from potluck_node.engines.standstill import Ear, Standstill
from potluck_node.solo_answers import SoloAnswers
from potluck_protocol.culprits import Culprits, Fingerprint
from potluck_protocol.values import ReplicaId, StartAttempt

LEAVERS_MAX: Final = 64
"""Of those who gave up on one engine, so many are remembered."""


@dataclass(slots=True)
class _Watch:
    """One engine, while it is the same process."""

    streams: Standstill
    documents: Standstill
    leavers: deque[tuple[int, Fingerprint]] = field(default_factory=lambda: deque(maxlen=LEAVERS_MAX))
    """With the count of words at that time."""

    @property
    def word_count(self) -> int:
        return self.streams.word_count + self.documents.word_count


class EngineWatches:
    """One watch for each replica that has had attempts.

    Args:
        now: monotonic seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._watches: dict[ReplicaId, _Watch] = {}
        self.frozen: set[ReplicaId] = set()
        """Those whose engines stand still as a whole, as `frozen_engines` found."""
        self.solo = SoloAnswers(now)
        self._culprits = Culprits(now)

    def listen(self, start: StartAttempt) -> Ear:
        """The attempt is with its engine from now on."""
        watch = self._watches.get(start.replica_id)
        if watch is None:
            watch = self._watches[start.replica_id] = _Watch(Standstill(self._now), Standstill(self._now))
        return (watch.streams if start.stream else watch.documents).listen(len(start.body))

    def left(self, start: StartAttempt) -> None:
        """Nobody waits for the attempt any more; its engine may still be at it, or be lost in it."""
        watch = self._watches.get(start.replica_id)
        if watch is not None:
            watch.leavers.append((watch.word_count, self._fingerprint(start)))

    def verdicts(self) -> Iterator[tuple[ReplicaId, Verdict, float]]:
        """What each engine's silence means, and its seconds."""
        for replica_id, watch in tuple(self._watches.items()):
            streams, documents = watch.streams.silence, watch.documents.silence
            verdict = judge(streams, documents)
            yield replica_id, verdict, (streams if verdict is Verdict.HUNG else documents).silent_seconds

    def silences(self) -> Iterator[tuple[ReplicaId, float]]:
        """For how long somebody has waited in vain for a word of each engine, for whatever kind of answer; only where somebody waits."""
        for replica_id, watch in tuple(self._watches.items()):
            waited = [each.silent_seconds for each in (watch.streams.silence, watch.documents.silence) if each.listening_count]
            if waited:
                yield replica_id, min(waited)

    def heard(self, replica_id: ReplicaId) -> None:
        """The engine showed otherwise that it is at work."""
        watch = self._watches.get(replica_id)
        if watch is not None:
            watch.documents.heard()

    def excuse_all(self, absence_seconds: float) -> None:
        """This process was not there to hear anything in so many of the last seconds."""
        for watch in self._watches.values():
            watch.streams.excuse(absence_seconds)
            watch.documents.excuse(absence_seconds)

    def died(self, replica_id: ReplicaId, waiting: Iterable[StartAttempt], *, may_be_their_fault: bool) -> None:
        """The engine is gone; the next one of this replica is watched anew."""
        self.solo.forget(replica_id)
        self.frozen.discard(replica_id)
        watch = self._watches.pop(replica_id, None)
        if watch is None or not may_be_their_fault:
            return
        leavers = {leaver for word_count, leaver in watch.leavers if word_count == watch.word_count}
        self._culprits.died({*map(self._fingerprint, waiting), *leavers})

    def answered(self, start: StartAttempt) -> None:
        """The attempt was answered in full."""
        if self._culprits.has_any:
            self._culprits.clear(self._fingerprint(start))

    def refuses(self, start: StartAttempt) -> bool:
        """Engines of this node died of this request."""
        return self._culprits.has_any and self._culprits.is_refused(self._fingerprint(start))

    def _fingerprint(self, start: StartAttempt) -> Fingerprint:
        return self._culprits.fingerprint(start.endpoint, start.body)
