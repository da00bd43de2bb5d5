"""What an answer lets through, counts and costs, whether its reader waits, reads, or has left a function behind."""

from __future__ import annotations

import asyncio

import pytest

from potluck_coordinator.domain.suspicion import AnswerKind
from potluck_coordinator.gateway.openai_request import parse_request
from potluck_coordinator.gateway.relay import AnswerHead, Relay
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, AttemptId, Endpoint, EndReason, RequestId, Usage
from tests.support.http_edge import DONE, chat_body, chat_event, usage_event
from tests.support.relayed_edge import RelayedEdge

TOKENS = [chat_event({"content": text}) for text in ("one", " two", " three")]


def without_tier(data: bytes) -> bytes:
    """As its engine sent it. The tier is put into what is asked for first."""
    return data.replace(b'"service_tier":"default",', b"", 1)


class Reader:
    """Reads an answer to its end: asks for each piece, or waits and takes what comes."""

    def __init__(self, *, passes: bool) -> None:
        self.edge, self.passes, self.received = RelayedEdge(), passes, b""
        self.relay = Relay(AttemptId("attempt"), 64 * 1024, 0.0, lambda _id, _sequence: None)
        self.relay.head = AnswerHead(200, "text/event-stream")

    def take(self, data: bytes) -> bool:
        assert data, "an empty piece would end a chunked answer"
        self.received += data
        return True

    async def read(self, *, include_usage: bool, chunks: list[bytes], reason: EndReason = EndReason.COMPLETED) -> None:
        options = {"stream_options": {"include_usage": include_usage}}
        body = chat_body(stream=True, **options)
        request = parse_request(Endpoint.CHAT_COMPLETIONS, body, RequestId("request"), AccountId("account"))
        self.answer = self.edge.answer(request, self.relay)
        await self.answer.open()
        node = asyncio.ensure_future(self._send(chunks, reason))
        try:
            while (data := await self.answer.next_data(self.take if self.passes else None)) is not None:
                assert not self.passes, "a reader that takes everything is given nothing"
                self.received += data
        finally:
            await node
            await self.answer.close()

    async def _send(self, chunks: list[bytes], reason: EndReason) -> None:
        for number, chunk in enumerate(chunks):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            self.relay.receive(number, chunk, 0.0)
        await asyncio.sleep(0)
        self.relay.end(len(chunks), reason, "")


@pytest.fixture(params=[True, False], ids=["passed on", "asked for"])
def reader(request: pytest.FixtureRequest) -> Reader:
    return Reader(passes=request.param)


@pytest.mark.parametrize("include_usage", [True, False])
async def test_the_usage_event_goes_to_who_asked_for_it_and_is_metered_for_all(reader: Reader, include_usage: bool) -> None:
    usage = Usage(12, 3, 4)
    await reader.read(include_usage=include_usage, chunks=[*TOKENS, chat_event({}, "stop"), usage_event(usage), DONE])
    shown = usage_event(usage) if include_usage else b""
    assert without_tier(reader.received) == b"".join(TOKENS) + chat_event({}, "stop") + shown + DONE
    assert reader.answer.usage == usage
    assert reader.edge.charges == [12 * 1 + 3 * reader.edge.price]


async def test_without_a_usage_record_what_was_relayed_is_charged(reader: Reader) -> None:
    await reader.read(include_usage=False, chunks=[*TOKENS, DONE])
    assert without_tier(reader.received) == b"".join(TOKENS) + DONE
    assert reader.edge.charges == [3 * reader.edge.price]


@pytest.mark.parametrize("reason", [EndReason.COMPLETED, EndReason.ENGINE_FAILED])
async def test_an_end_without_done_is_a_failure_charged_by_what_was_relayed(reader: Reader, reason: EndReason) -> None:
    with pytest.raises(PotluckError) as failure:
        await reader.read(include_usage=False, chunks=TOKENS, reason=reason)
    assert failure.value.code is ErrorCode.ENGINE_FAILED
    assert reader.relay.answer_kind is (AnswerKind.ERROR if reason is EndReason.COMPLETED else None)
    assert without_tier(reader.received) == b"".join(TOKENS)
    assert reader.edge.charges == [3 * reader.edge.price]


async def test_after_done_the_answer_is_complete_whatever_the_node_says(reader: Reader) -> None:
    await reader.read(include_usage=False, chunks=[*TOKENS, DONE], reason=EndReason.ENGINE_FAILED)
    assert without_tier(reader.received) == b"".join(TOKENS) + DONE


async def test_a_done_that_could_not_be_passed_on_completes_nothing() -> None:
    reader = Reader(passes=True)

    def take(data: bytes) -> bool:
        if data == DONE:
            raise RuntimeError("the connection broke")
        return True

    reader.take = take  # type: ignore[method-assign]
    with pytest.raises(PotluckError) as failure:
        await reader.read(include_usage=False, chunks=[*TOKENS, DONE])
    assert failure.value.code is ErrorCode.INTERNAL_ERROR


async def test_a_full_connection_is_given_nothing_more_behind_a_dropped_event() -> None:
    reader = Reader(passes=True)
    reader.take = lambda data: Reader.take(reader, data) and len(reader.received) < len(TOKENS[0])  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="is given nothing"):
        await reader.read(include_usage=False, chunks=[TOKENS[0], usage_event(), TOKENS[1], DONE])
    assert without_tier(reader.received) == TOKENS[0]
