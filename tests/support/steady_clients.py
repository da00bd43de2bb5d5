"""Clients that ask again and again, each as soon as its answer has ended, and note whatever they see go wrong."""

from __future__ import annotations

import threading
import time
import urllib.error
from dataclasses import dataclass, field
from typing import Any, Self

from tests.support.pool_processes import ChatStream, Pool


@dataclass
class Answer:
    """One answer as its client saw it."""

    first_node_id: str = ""
    began_at: float = 0.0
    ended_at: float | None = None
    arrivals: list[float] = field(default_factory=list)
    """When each token came, by the clock of `time.time`."""
    trouble: str = ""

    @property
    def gap_seconds_max(self) -> float:
        return max((later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)), default=0.0)

    def was_under_way(self, at: float) -> bool:
        return self.began_at <= at and (self.ended_at is None or at < self.ended_at)


class SteadyClients:
    """So many at a time, until the block ends; then each reads its last answer to the end."""

    def __init__(self, pool: Pool, count: int, **fields: Any) -> None:
        self._pool = pool
        self._fields = fields
        self._enough = threading.Event()
        self.answers: list[Answer] = []
        self._threads = [threading.Thread(target=self._ask_on, name=f"client {number}") for number in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join(120)

    @property
    def troubles(self) -> list[str]:
        return [answer.trouble for answer in self.answers if answer.trouble]

    def under_way(self, node_id: str, at: float | None = None) -> list[Answer]:
        """Answers that began on the node and have not ended."""
        moment = time.time() if at is None else at
        return [answer for answer in self.answers if answer.first_node_id == node_id and answer.arrivals and answer.was_under_way(moment)]

    def _ask_on(self) -> None:
        while not self._enough.is_set():
            answer = Answer(began_at=time.time())
            self.answers.append(answer)
            try:
                self._read(answer)
            except urllib.error.HTTPError as error:
                answer.trouble = f"status {error.code}: {error.read()[:300]!r}"
            except Exception as error:  # noqa: BLE001 - whatever a client meets is what is looked for
                answer.trouble = f"{type(error).__name__}: {error}"
            answer.ended_at = time.time()
            if answer.trouble:
                time.sleep(0.2)

    def _read(self, answer: Answer) -> None:
        stream: ChatStream = self._pool.stream(**self._fields)
        answer.first_node_id = stream.node_id
        count = 0
        for _ in stream.events():
            if stream.token_count > count:
                count = stream.token_count
                answer.arrivals.append(time.time())
        if stream.error is not None or not stream.done:
            answer.trouble = f"after {count} tokens: {stream.error or 'no [DONE]'}"
