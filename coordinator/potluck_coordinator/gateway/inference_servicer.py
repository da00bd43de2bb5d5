"""Requests by gRPC: the SDK's edge of the request service.

Decides nothing: `openai_request` reads the body into the one request both edges share, this writes what the answer yields. A client that
hangs up closes the generator, which closes the answer. Like the HTTP edge it must not know how nodes are chosen or what a token costs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from potluck_coordinator.gateway.interceptors import caller, current_call
from potluck_coordinator.gateway.openai_request import parse_request
from potluck_coordinator.gateway.requests import ModelView, RequestService
from potluck_coordinator.metrics import Metrics
from potluck_protocol import codec, engine_codec
from potluck_protocol.clock import Clock
from potluck_protocol.v1 import inference_pb2, inference_pb2_grpc
from potluck_protocol.values import Usage


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Serves `InferenceService`."""

    def __init__(self, requests: RequestService, metrics: Metrics, clock: Clock) -> None:
        self._requests = requests
        self._metrics = metrics
        self._clock = clock

    async def Generate(  # noqa: N802 - the contract's name
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """One request: where it runs, its bytes, and, after a complete answer only, what it came to."""
        del context
        endpoint = engine_codec.endpoint_from_number(request.endpoint)
        inference = parse_request(endpoint, request.body_json, current_call().request_id, caller().account_id)
        started_at = self._clock.monotonic_seconds()
        answer = await self._requests.begin(inference)
        first_data_seconds: float | None = None
        sent_bytes = 0
        try:
            placed = inference_pb2.Placed(request_id=inference.request_id, node_id=answer.node_id, model_id=inference.model_id)
            yield inference_pb2.GenerateResponse(placed=placed)
            while (data := await answer.next_data()) is not None:
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
            self._metrics.observe_answer(inference.model_id, answer.usage, sent_bytes, first_data_seconds)
            current_call().facts.update(
                endpoint=endpoint.value,
                model_id=inference.model_id,
                node_id=answer.node_id,
                prompt_token_count=answer.usage.prompt_token_count if answer.usage else None,
                completion_token_count=answer.usage.completion_token_count if answer.usage else None,
                charge_micro_credits=answer.charge_micro_credits,
                sent_bytes=sent_bytes,
            )

    async def ListModels(  # noqa: N802 - the contract's name
        self, request: inference_pb2.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inference_pb2.ListModelsResponse:
        """The catalogue, with what is ready now."""
        del context
        views = self._requests.models(with_offers=request.with_offers)
        return inference_pb2.ListModelsResponse(models=[_model_message(view) for view in views])


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
