"""What became of requests with a key, on its way to the books: told until they answer, so that no outage keeps a key locked.

Decides when it is told, and who waits for that. What is told together is committed together, and a word told twice counts once: it is of
one claim. While they take none, no key is claimed here: so no more waits than was under way when they went away, and a key's next request
comes after the word on its last one. A word that the books fail on by itself is given up. It must not know answers, nor what follows from a
word.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

import structlog

from potluck_coordinator.gateway.edges import log_unexpected
from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from potluck_coordinator.domain.idempotency import KeyUse
    from potluck_coordinator.idempotency_desk import IdempotencyDesk

_log = structlog.get_logger()

TOLD_TOGETHER_COUNT_MAX: Final = 256
WAITING_COUNT_MAX: Final = 10_000
"""Words that may wait for books that are slow. Beyond it no key is claimed; what became of those that are is taken all the same."""
RETRY_SECONDS: Final = 0.5
REFUSED: Final = "The pool's books are away for now, and no request with an idempotency key can be answered without them; try again."
REFUSED_RETRY_SECONDS: Final = 2


@dataclass(frozen=True, slots=True)
class _Word:
    use: KeyUse
    charge_micro_credits: int | None
    """None: nothing came of it."""


class LastWords:
    """The one way in which the books hear what became of a claim, or of one that they may have granted.

    Args:
        desk: of the books.
    """

    def __init__(self, desk: IdempotencyDesk) -> None:
        self._desk = desk
        self._waiting: dict[str, _Word] = {}
        """By claim, in the order of their coming."""
        self._telling: asyncio.Task[None] | None = None
        """While anything waits."""
        self._is_failing = False
        self._changed = asyncio.Event()

    def finish(self, use: KeyUse, charge_micro_credits: int) -> None:
        """The claim's request was answered, in whole or in part."""
        self._say(_Word(use, charge_micro_credits))

    def release(self, use: KeyUse) -> None:
        """Nothing came of the claim's request, or of the claim itself."""
        self._say(_Word(use, None))

    async def until_told(self, use: KeyUse) -> None:
        """Returns once the books know what became of the key's earlier uses here.

        Raises:
            PotluckError: COORDINATOR_UNAVAILABLE while they take no words, of whatever key.
        """
        self._check()
        while any(word.use.key_hash == use.key_hash and word.use.account_id == use.account_id for word in self._waiting.values()):
            await self._changed.wait()
            self._check()

    async def drain(self, seconds_max: float) -> bool:
        """Waits until nothing waits any more; False if that took too long, and what is left is told to nobody."""
        try:
            async with asyncio.timeout(seconds_max):
                while (telling := self._telling) is not None:
                    await asyncio.wait((telling,))
        except TimeoutError:
            if telling is not None:
                telling.cancel()
            _log.error("idempotency_keys_not_drained", waiting=len(self._waiting), meaning="they stay taken, for a day at most")
            return False
        return True

    def _check(self) -> None:
        if self._is_failing or len(self._waiting) >= WAITING_COUNT_MAX:
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, REFUSED, retry_after_seconds=REFUSED_RETRY_SECONDS)

    def _say(self, word: _Word) -> None:
        self._waiting[word.use.claim_id] = word
        if self._telling is None:
            self._telling = asyncio.ensure_future(self._tell_all())

    async def _tell_all(self) -> None:
        """Until nothing waits any more."""
        try:
            while self._waiting:
                words = tuple(islice(self._waiting.values(), TOLD_TOGETHER_COUNT_MAX))
                are_told = await asyncio.gather(*map(self._tell, words))
                for word, is_told in zip(words, are_told, strict=True):
                    if is_told:
                        del self._waiting[word.use.claim_id]
                self._note(is_failing=not all(are_told))
                if self._is_failing:
                    await asyncio.sleep(RETRY_SECONDS)
        finally:
            self._telling = None

    async def _tell(self, word: _Word) -> bool:
        """Whether it needs not be told again."""
        use = word.use
        try:
            if word.charge_micro_credits is None:
                await self._desk.release(use)
            else:
                await self._desk.finish(use, word.charge_micro_credits)
        except PotluckError as error:
            if error.code is ErrorCode.COORDINATOR_UNAVAILABLE:
                return False
            _log.error("idempotency_key_given_up", request_id=use.request_id, code=error.code)
        except Exception as error:  # noqa: BLE001 - the others' words are to be told all the same
            log_unexpected("idempotency_key_given_up", use.request_id, error)
        return True

    def _note(self, *, is_failing: bool) -> None:
        if is_failing and not self._is_failing:
            _log.warning("idempotency_keys_not_written", waiting=len(self._waiting))
        elif self._is_failing and not is_failing:
            _log.info("idempotency_keys_written_again", waiting=len(self._waiting))
        self._is_failing = is_failing
        self._changed.set()
        self._changed = asyncio.Event()
