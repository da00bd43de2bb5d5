"""One attempt at a request: its relayed bytes, watched by `sse`, and paid for exactly once through the `ledger_writer`.

Decides when the attempt is over and what it came to: by the engine's own usage record where the answer is complete and has one, else by
the tokens relayed of a stream; an unstreamed answer without a record costs nothing. Neither costs more tokens than its text can have had,
by `text_meter`. Of one that went on from another's text, that text is no part of its price: who said it was paid for it. Nothing reaches
the client before the hold stands; a hedge has none before it is read, so that no client has to have the price of an answer twice. It must
not know who reads it, nor what becomes of the request when it fails: `answer`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import structlog

from potluck_coordinator.domain.ledger import LedgerOutcome, SettleHold
from potluck_coordinator.domain.pricing import believable, charge, charge_for_relayed
from potluck_coordinator.domain.suspicion import AnswerKind
from potluck_coordinator.gateway.engine_errors import engine_error
from potluck_coordinator.gateway.splice import own_usage
from potluck_coordinator.gateway.sse import UsageWatcher, usage_of_document
from potluck_coordinator.gateway.text_meter import TextMeter
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.money import credits_text
from potluck_protocol.values import Endpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.ledger_writer import LedgerWriter
    from potluck_coordinator.gateway.relay import PassOn, Relay
    from potluck_protocol.values import AttemptId, NodeId, RequestId, Usage

_log = structlog.get_logger()

ERROR_BODY_BYTES_MAX: Final = 64 * 1024
DOCUMENT_BYTES_MAX: Final = 32 * 1024 * 1024
"""The largest unstreamed answer; it is kept whole, for the usage record in it."""
HTTP_ERROR_MIN: Final = 400
HOLD_SECONDS_MAX: Final = 15.0
"""How long an answer that has begun waits for its hold, as while the directory restarts."""


class Attempt:
    """One node's part in answering a request. Every attempt is closed, whatever happens to it.

    Args:
        request: what was asked.
        entry: the model, with its prices.
        node_id: who answers.
        relay: the bytes.
        deadline_at_seconds: monotonic; the request's, for all its attempts.
        hold_micro_credits: the most it can cost.
        hold: becomes the outcome of opening the hold; None: there is none before the attempt is opened.
        ledger: where the settlement goes.
        release: gives the slot back; called once.
        take: opens the hold of one that has none.
        late_after_seconds: from its dispatch; without a first token by then it may be hedged. None: never.
        engine_kind: whose answer it is.
        on_outdone: called with its error, and with the other's kind of engine, where it answered one and another node an answer.
    """

    def __init__(
        self,
        *,
        request: InferenceRequest,
        entry: CatalogueEntry,
        node_id: NodeId,
        relay: Relay,
        deadline_at_seconds: float,
        hold_micro_credits: int,
        hold: asyncio.Future[LedgerOutcome] | None,
        ledger: LedgerWriter,
        release: Callable[[], None],
        take: Callable[[], asyncio.Future[LedgerOutcome]] | None = None,
        late_after_seconds: float | None = None,
        engine_kind: str = "",
        on_outdone: Callable[[ErrorCode, str], None] = lambda _code, _kind: None,
    ) -> None:
        self._request = request
        self._entry = entry
        self._relay = relay
        self._hold_micro_credits = hold_micro_credits
        self._hold: asyncio.Future[LedgerOutcome] | None = None
        self._take = take
        self._ledger = ledger
        self._release = release
        self._on_outdone = on_outdone
        self._watcher = UsageWatcher(keep_usage_event=request.include_usage)
        self._meter = TextMeter(
            is_chat=request.endpoint is Endpoint.CHAT_COMPLETIONS, answer_count=request.answer_count, tokens_max=self.completion_tokens_max
        )
        self._pieces: deque[bytes] = deque()
        self._complete = False
        self._closed = False
        self.keep: Callable[[bytes], None] | None = None
        """Told of everything streamed, as it goes to the client; on the hot path of every token."""
        self.broken_off = False
        """By this side, and for good: no other attempt is to follow."""
        self.was_outrun = False
        """By a hedge that gave its first token first."""
        self.late_after_seconds = late_after_seconds
        if hold is not None:
            self._stand_on(hold)
        self.node_id = node_id
        self.engine_kind = engine_kind
        self.deadline_at_seconds = deadline_at_seconds
        self.document = b""
        """An unstreamed answer, once it is complete."""
        self.usage: Usage | None = None
        self.charge_micro_credits = 0
        self.marked_micro_credits = 0

    @property
    def request_id(self) -> RequestId:
        """The request answered."""
        return self._request.request_id

    @property
    def attempt_id(self) -> AttemptId:
        """Whose bytes, hold and slot."""
        return self._relay.attempt_id

    @property
    def is_whole(self) -> bool:
        """It came to its end, and its engine lived to count its tokens."""
        return self._complete and (not self._request.stream or self._watcher.usage is not None)

    @property
    def has_begun(self) -> bool:
        """Its first bytes that say something have come, whoever has read them."""
        return self._relay.first_chunk_at is not None

    @property
    def chunk_count(self) -> int:
        """Of what has come from its node: about a token each, read or not."""
        return self._relay.next_sequence

    @property
    def relayed_token_count(self) -> int:
        """Of a stream, so far, if they had text; of an unstreamed answer none."""
        return self._meter.relayed(self._watcher.token_count) if self._request.stream else 0

    @property
    def tokens_before(self) -> int:
        """What other attempts had said, and this one's engine got as a part of its prompt."""
        return 0 if self._request.continued is None else self._request.continued.token_count

    @property
    def hold_micro_credits(self) -> int:
        """The most it can cost."""
        return self._hold_micro_credits

    @property
    def completion_tokens_max(self) -> int:
        """Of all its answers together: what was asked for, within the model's context."""
        context, asked = self._entry.context_length_tokens, self._request.completion_tokens_max
        return (context if asked is None else min(asked, context)) * max(1, self._request.answer_count)

    async def open(self) -> None:
        """Waits until the engine has begun a good answer and the hold stands.

        Raises:
            PotluckError: what became of the attempt instead, INSUFFICIENT_CREDITS, or the engine's own refusal.
        """
        head = await self._relay.wait_for_head()
        hold = self._hold or self._taken()
        if not hold.done():
            # Not awaited itself: a client that goes away must not cancel what says whether there is something to settle.
            await asyncio.wait((hold,), timeout=HOLD_SECONDS_MAX)
            if not hold.done():
                # Not COORDINATOR_UNAVAILABLE: the request has run, and must not look like one that can safely be made again.
                raise PotluckError(ErrorCode.INTERNAL_ERROR, "The ledger did not answer in time.")
        outcome = hold.result()
        if outcome is not LedgerOutcome.APPLIED:
            raise _refusal(outcome, self._hold_micro_credits)
        if head.http_status >= HTTP_ERROR_MIN:
            raise engine_error(self._request.endpoint, head.http_status, await self._error_body())
        if head.http_status != HTTPStatus.OK:
            raise PotluckError(ErrorCode.ENGINE_FAILED, "The node's answer is neither an answer nor an error.")

    async def first_token(self) -> None:
        """Waits until a good answer's first bytes are there, and leaves them; raises what became of the attempt instead."""
        head = await self._relay.wait_for_head()
        await self._relay.wait_for_first_chunk()
        if head.http_status != HTTPStatus.OK:
            raise PotluckError(ErrorCode.ENGINE_FAILED, f"The engine answered with the status {head.http_status}.")

    def outrun(self) -> None:
        """A hedge has its first token. Whoever reads this attempt is woken, unless it has one too, or is over: then it has the say."""
        if not self._relay.over and not self.has_begun:
            self.was_outrun = True
            self._relay.fail(PotluckError(ErrorCode.NODE_LOST, "Another node gave the first token sooner."))

    def outdone(self, code: ErrorCode, by: Attempt) -> None:
        """Another node's attempt has begun a good answer to what became of this one that error."""
        if self._relay.answer_kind is AnswerKind.ERROR:
            self._on_outdone(code, by.engine_kind)

    async def next_data(self, pass_on: PassOn | None = None) -> bytes | None:
        """The next bytes for the client, None at the complete end; raises PotluckError where the answer breaks off.

        An unstreamed answer gives nothing before it is complete: its price stands at its end, and half of it would be free. Of a stream,
        bytes that come while this waits go to `pass_on`, if there is one, for as long as it takes more.
        """
        if not self._request.stream:
            return await self._next_of_document()
        watched = None if pass_on is None else partial(self._watch, pass_on)
        try:
            while (data := await self._relay.next_data(watched)) is not None:
                if passed := self._fed(data):
                    return passed
                watched = None  # the connection may be full by now
        except PotluckError as error:
            # After `[DONE]` the answer is complete, whatever becomes of its node; not if that could not be passed on.
            if not self._watcher.done or error.code is ErrorCode.INTERNAL_ERROR:
                raise
        if not self._watcher.done:
            # llama.cpp ends so after an error of its own in the middle of an answer.
            self._relay.fell_short = True
            raise PotluckError(ErrorCode.ENGINE_FAILED)
        self._finish()
        return None

    def charge_so_far(self) -> int:
        """Micro-credits for what has come so far, as the module says."""
        relayed = charge_for_relayed(self._entry, self.relayed_token_count)
        if self.usage is None or not (self._complete or self._watcher.done):
            return min(relayed, self._hold_micro_credits)
        return min(charge(self._entry, own_usage(self.usage, self.tokens_before)), self._hold_micro_credits)

    def break_off(self, error: PotluckError) -> None:
        """Ends the attempt, and with it the request, from this side."""
        self.broken_off = not self._relay.over
        self._relay.fail(error)

    async def close(self, *, whole: bool = False) -> None:
        """Ends the attempt if it is not over, gives the slot back and settles. Again is harmless.

        Args:
            whole: all of the answer has arrived but its end, so that a usage record that came with it holds.
        """
        self._complete = self._complete or (whole and not self._closed and self._watcher.usage is not None)
        self._settle(lambda release: release())

    def _settle(self, give_back: Callable[[Callable[[], None]], object]) -> None:
        """Once; `give_back` has the slot given back."""
        if self._closed:
            return
        self._closed = True
        try:
            self.document = b"".join(self._pieces)
            self.usage = self._counted()
            self.charge_micro_credits = self.charge_so_far()
            # An undecided hold is settled too: the writer sends its opening first. A hedge that was never read has none.
            if self._hold is not None and (not self._hold.done() or _stands(self._hold)):
                self._ledger.submit(SettleHold(self.attempt_id, self.charge_micro_credits)).add_done_callback(self._settled)
        finally:
            release, self._release, self._take = self._release, _released, None
            # It knows this attempt: kept, both would stay for the garbage collector.
            give_back(release)

    def _counted(self) -> Usage | None:
        """The engine's count, within what the answer can have had."""
        usage = self._watcher.usage if self._request.stream else usage_of_document(self.document)
        if usage is None:
            return None
        asked = min(usage.completion_token_count, self.completion_tokens_max)
        tokens_max = self._meter.counted(asked) if self._request.stream else self._meter.counted_of_document(self.document, asked)
        return believable(usage, self._request.prompt_bytes + self.tokens_before, tokens_max)

    def _fed(self, data: bytes) -> bytes:
        """What the client gets of it, which may be nothing."""
        if passed := self._watcher.feed(data):
            self._meter.add(passed)
            if self.keep is not None:
                self.keep(passed)
        return passed

    def _watch(self, pass_on: PassOn, data: bytes) -> bool:
        passed = self._fed(data)
        return pass_on(passed) if passed else True

    async def _next_of_document(self) -> bytes | None:
        if not self._complete:
            while (data := await self._relay.next_data()) is not None:
                self._keep(data)
            self._finish()
        return self._pieces.popleft() if self._pieces else None

    def _finish(self) -> None:
        self._complete = True
        # Behind the end of the answer, which its client waits for.
        self._settle(asyncio.get_running_loop().call_soon)

    def _taken(self) -> asyncio.Future[LedgerOutcome]:
        """The hold of one that had none, opened now that it is to be read."""
        if self._closed or self._take is None:
            raise PotluckError(ErrorCode.NODE_LOST)
        return self._stand_on(self._take())

    def _stand_on(self, hold: asyncio.Future[LedgerOutcome]) -> asyncio.Future[LedgerOutcome]:
        self._hold = hold
        hold.add_done_callback(self._hold_decided)
        return hold

    def _hold_decided(self, hold: asyncio.Future[LedgerOutcome]) -> None:
        """A refused hold ends the attempt at once: an engine that answers in one piece would otherwise work to its end, unpaid."""
        if hold.cancelled() or _stands(hold):
            return
        failure = hold.exception()
        self._relay.fail(failure if isinstance(failure, PotluckError) else _refusal(hold.result(), self._hold_micro_credits))

    def _settled(self, settlement: asyncio.Future[LedgerOutcome]) -> None:
        """The client was shown a price; the books must not silently say another."""
        if settlement.cancelled() or self._hold is None or self._hold.cancelled():
            return
        # Decided before: the writer keeps the order. Of a hold that was refused there is nothing to settle.
        if _stands(self._hold) and settlement.result() is not LedgerOutcome.APPLIED:
            _log.error("settlement_refused", attempt_id=self.attempt_id, charge_micro_credits=self.charge_micro_credits)

    def _keep(self, data: bytes) -> None:
        self._pieces.append(data)
        if self._relay.received_bytes > DOCUMENT_BYTES_MAX:
            self.broken_off = True  # another engine's would be, too
            words = f"The engine's answer is larger than {DOCUMENT_BYTES_MAX >> 20} MiB. Ask for less at a time, for embeddings in base64."
            raise PotluckError(ErrorCode.ENGINE_FAILED, words)

    async def _error_body(self) -> bytes:
        body = b""
        while len(body) < ERROR_BODY_BYTES_MAX and (data := await self._relay.next_data()) is not None:
            body += data
        return body


def _stands(hold: asyncio.Future[LedgerOutcome]) -> bool:
    """Of a hold that is decided."""
    return hold.exception() is None and hold.result() is LedgerOutcome.APPLIED


def _released() -> None:
    """What follows an attempt has followed."""


def _refusal(outcome: LedgerOutcome, hold_micro_credits: int) -> PotluckError:
    if outcome is LedgerOutcome.INSUFFICIENT_CREDITS:
        cost = credits_text(hold_micro_credits)
        message = f"This request could cost up to {cost} credits, and the account has fewer: see `potluck credits`, or lower max_tokens."
        return PotluckError(ErrorCode.INSUFFICIENT_CREDITS, message)
    # The ledger knows this hold otherwise, or this gateway no longer: another one has taken its place.
    return PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, retry_after_seconds=2)
