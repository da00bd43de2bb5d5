"""Requests by gRPC: the SDK's edge of the request service.

Decides nothing: `openai_request` reads the body into the one request both edges share, this writes what the answer yields. A client that
hangs up closes the generator, which closes the answer; what then becomes of one under an idempotency key, the client has said. Like the
HTTP edge it must not know how nodes are chosen or what a token costs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from potluck_coordinator.domain.idempotency import WhenGone
from potluck_coordinator.gateway.answer import Answer
from potluck_coordinator.gateway.gate import caller_of
from potluck_coordinator.gateway.inference_request import InferenceRequest
from potluck_coordinator.gateway.interceptors import caller, current_call
from potluck_coordinator.gateway.kept_answer import KeptAnswer
from potluck_coordinator.gateway.keyed_requests import KeyedRequests
from potluck_coordinator.gateway.openai_request import parse_request
from potluck_coordinator.gateway.rate_windows import rate_headers
from potluck_coordinator.gateway.requests import ModelView, RequestService
from potluck_coordinator.metrics import Metrics
from potluck_protocol import codec, engine_codec
from potluck_protocol.clock import Clock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.metadata import IDEMPOTENCY_KEY, WHEN_GONE
from potluck_protocol.v1 import inference_pb2, inference_pb2_grpc
from potluck_protocol.values import ModelId, Usage


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Serves `InferenceService`."""

    def __init__(self, requests: RequestService, keyed: KeyedRequests, metrics: Metrics, clock: Clock) -> None:
        self._requests = requests
        self._keyed = keyed
        self._metrics = metrics
        self._clock = clock

    async def Generate(  # noqa: N802 - the contract's name
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """One request: where it runs, its bytes, and, after a complete answer only, what it came to."""
        endpoint = engine_codec.endpoint_from_number(request.endpoint)
        account_id = caller().account_id
        current_call().more_trailers = lambda: rate_headers(self._requests.allowance(account_id))
        inference = parse_request(
            endpoint,
            request.body_json,
            current_call().request_id,
            account_id,
            caller_of(caller()),
            trusted_only=request.trusted_only,
        )
        started_at = self._clock.monotonic_seconds()
        answer = await self._begin(inference, request.body_json, context)
        first_data_seconds: float | None = None
        sent_bytes = 0
        try:
            placed = _placed(answer, inference.model_id)
            yield inference_pb2.GenerateResponse(placed=placed)
            while (data := await answer.next_data()) is not None:
                if answer.node_id != placed.node_id:
                    placed = _placed(answer, inference.model_id)
                    yield inference_pb2.GenerateResponse(placed=placed)
                if first_data_seconds is None:
                    first_data_seconds = self._clock.monotonic_seconds() - started_at
                sent_bytes += len(data)
                yield inference_pb2.GenerateResponse(data=data)
            usage = codec.usage_message(answer.usage or Usage())
            finished = inference_pb2.Finished(usage=usage, charge_micro_credits=answer.charge_micro_credits)
            yield inference_pb2.GenerateResponse(finished=finished)
        finally:
            # Also when the client has gone: before the end this frees the engine and settles what was relayed.
            await answer.close()
            is_replay = isinstance(answer, KeptAnswer) and not answer.is_first
            if not is_replay:
                self._metrics.observe_answer(inference.model_id, answer.usage, sent_bytes, first_data_seconds)
            current_call().facts.update(
                **({"is_replay": True} if is_replay else {}),
                endpoint=endpoint.value,
                model_id=inference.model_id,
                node_id=answer.node_id,
                prompt_token_count=answer.usage.prompt_token_count if answer.usage else None,
                completion_token_count=answer.usage.completion_token_count if answer.usage else None,
                charge_micro_credits=answer.charge_micro_credits,
                sent_bytes=sent_bytes,
            )

    async def _begin(self, inference: InferenceRequest, body: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Answer | KeptAnswer:
        metadata = dict(context.invocation_metadata() or ())
        key = metadata.get(IDEMPOTENCY_KEY)
        if key is None:
            return await self._requests.begin(inference)
        try:
            when_gone = WhenGone(str(metadata.get(WHEN_GONE, WhenGone.FINISH)))
        except ValueError:
            words = " or ".join(WhenGone)
            raise PotluckError(ErrorCode.INVALID_REQUEST, f"`{WHEN_GONE}` is {words}.", param=WHEN_GONE) from None
        return await self._keyed.begin(inference, str(key), body, when_gone)

    async def ListModels(  # noqa: N802 - the contract's name
        self, request: inference_pb2.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inference_pb2.ListModelsResponse:
        """The catalogue, with what is ready now."""
        del context
        views = self._requests.models(with_offers=request.with_offers)
        return inference_pb2.ListModelsResponse(models=[_model_message(view) for view in views])


def _placed(answer: Answer | KeptAnswer, model_id: ModelId) -> inference_pb2.Placed:
    return inference_pb2.Placed(request_id=answer.request_id, node_id=answer.node_id, model_id=model_id, service_tier=answer.tier)


def _model_message(view: ModelView) -> inference_pb2.Model:
    entry = view.entry
    return inference_pb2.Model(
        model_id=entry.model_id,
        context_length_tokens=entry.context_length_tokens,
        prompt_price_micro_credits_per_token=entry.prompt_price_micro_credits,
        completion_price_micro_credits_per_token=entry.completion_price_micro_credits,
        ready_replica_count=view.ready_replica_count,
        created_at_unix_seconds=entry.created_at_unix_seconds,
        licence=entry.licence,
        endpoints=[engine_codec.ENDPOINT_NUMBER[endpoint] for endpoint in entry.endpoints],
        offered_repository=entry.repository,
    )
