"""Questions to the books that come at about the same time, asked together.

Decides only which go together: while one lot is being answered the next one gathers, so that a lone question waits for nobody and a
thousand cost hardly more than one. It must not know what is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Mapping
from typing import Final, Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Said = TypeVar("_Said")
_Answer = TypeVar("_Answer")

LOT_MAX: Final = 256
"""As many units as the store commits together."""


class Gathering(Generic[_Key, _Said, _Answer]):
    """One kind of question.

    Args:
        answer_all: answers a lot; whoever is missing in its answers gets None. What it raises, all of the lot get.
    """

    def __init__(self, answer_all: Callable[[Mapping[_Key, _Said]], Awaitable[Mapping[_Key, _Answer]]]) -> None:
        self._answer_all = answer_all
        self._waiting: list[tuple[_Key, _Said, asyncio.Future[_Answer | None]]] = []
        self._answering: asyncio.Task[None] | None = None

    async def ask(self, key: _Key, said: _Said) -> _Answer | None:
        """The answer; of two questions with the same key the second goes with a later lot."""
        future: asyncio.Future[_Answer | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((key, said, future))
        if self._answering is None:
            self._answering = asyncio.ensure_future(self._answer())
        return await future

    async def _answer(self) -> None:
        try:
            await self._answer_waiting()
        finally:
            # At once: whoever asks before this task counts as done would wait for the next one who asks.
            self._answering = None

    async def _answer_waiting(self) -> None:
        while self._waiting:
            lot: dict[_Key, tuple[_Said, asyncio.Future[_Answer | None]]] = {}
            later = []
            for key, said, future in self._waiting:
                if key in lot or len(lot) == LOT_MAX:
                    later.append((key, said, future))
                elif not future.done():
                    lot[key] = said, future
            self._waiting = later
            try:
                answers = await self._answer_all({key: said for key, (said, _) in lot.items()})
            except Exception as error:  # noqa: BLE001 - whatever it is, it is theirs who asked
                for _, future in lot.values():
                    if not future.done():
                        future.set_exception(error)
                continue
            for key, (_, future) in lot.items():
                if not future.done():
                    future.set_result(answers.get(key))
