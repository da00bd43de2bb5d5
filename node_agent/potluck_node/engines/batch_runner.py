"""A batching engine in real time: gives the steps of a `batch_model` their time and tells whoever waits of each token.

Decides that the card keeps its own time (a machine that is busy with other things delays what is told, and not what is computed), and what
an engine's death looks like from outside: the words and the status that a real one leaves. It must not know HTTP or what the tokens say.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator
from typing import Final, NoReturn

from potluck_node.engines.batch_model import Batch, CostModel, EngineDiedError
from potluck_node.engines.metrics_page import page_of
from potluck_node.engines.metrics_words import OURS

CATCH_UP_SECONDS_MAX: Final = 0.5
"""What a busy machine delays beyond this is lost to the engine."""
_EXIT_STATUS: Final = 1


class BatchRunner:
    """One running engine; `run` is its loop.

    Args:
        cost: what its work costs.
    """

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._batch = Batch(cost)
        self._told: dict[int, asyncio.Queue[None]] = {}
        self._wanted = asyncio.Event()

    async def tokens(self, prompt_tokens: int, answer_tokens: int) -> AsyncGenerator[None, None]:
        """Gives nothing once for each token of an answer, when it is there. Closed early, the request is forgotten."""
        try:
            number = self._batch.add(prompt_tokens, answer_tokens)
        except EngineDiedError as death:
            _die(death)
        told = self._told[number] = asyncio.Queue()
        self._wanted.set()
        try:
            for _ in range(answer_tokens):
                await told.get()
                yield
        finally:
            del self._told[number]
            self._batch.remove(number)

    async def run(self) -> None:
        """Computes until cancelled, or until the engine dies, and the process with it."""
        loop = asyncio.get_running_loop()
        due_at = loop.time()
        while True:
            try:
                step = self._batch.step()
            except EngineDiedError as death:
                _die(death)
            if step is None:
                self._wanted.clear()
                await self._wanted.wait()
                due_at = loop.time()
                continue
            due_at = max(due_at, loop.time() - CATCH_UP_SECONDS_MAX) + step.seconds
            await asyncio.sleep(due_at - loop.time())
            for number in step.told:
                if number in self._told:
                    self._told[number].put_nowait(None)

    def metrics(self) -> str:
        """What it tells of itself, as engines do."""
        return page_of(
            {
                OURS.running: self._batch.running_count,
                OURS.waiting: self._batch.waiting_count,
                OURS.kv_used: self._batch.kv_used_tokens,
                OURS.kv_capacity: self._cost.kv_capacity_tokens,
                OURS.generated: self._batch.generated_tokens,
            }
        )


def _die(death: EngineDiedError) -> NoReturn:
    """As a process does that the kernel kills for its memory, or one whose card has none left."""
    if death.of_host_memory:
        print(f"scripted engine: {death}", file=sys.stderr, flush=True)  # noqa: T201 - an engine's last words
        os.kill(os.getpid(), signal.SIGKILL)
    print(f"torch.OutOfMemoryError: CUDA out of memory: {death}", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(_EXIT_STATUS)
