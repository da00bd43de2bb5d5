"""The next frame to a gateway on whose nodes requests of this one run: everything that waits goes out together.

Decides how values become the parts of a frame, and how many requests one frame carries. `remote_node` fills it, `peer_link` writes it. It
must not know why anything is sent.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from potluck_coordinator.gateway.outbox import STARTS_BYTES_MAX
from potluck_protocol import codec
from potluck_protocol.v1 import gateway_pb2

if TYPE_CHECKING:
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.measures import Counted
    from potluck_protocol.values import AttemptId, NodeId, StartAttempt


class ForwardOutbox:
    """Belongs to one link between gateways. What is put into it leaves at the loop's next turn, or behind the frame on its way."""

    __slots__ = ("_acknowledged", "_filled", "_finishes", "_numbers", "_start_count", "_starts")

    def __init__(self) -> None:
        self._starts: dict[AttemptId, gateway_pb2.ForwardedStart] = {}
        """In the order of their coming; what does not fit one frame goes with the next."""
        self._finishes: list[gateway_pb2.ForwardedFinish] = []
        self._acknowledged: dict[AttemptId, int] = {}
        self._filled = asyncio.Event()
        self._numbers: dict[AttemptId, int] = {}
        """Of those that have left and are not over, the how manieth each was: the other gateway's view tells how many of them are in it."""
        self._start_count = 0

    def start(self, start: StartAttempt, node_id: NodeId, request: InferenceRequest, tried: frozenset[NodeId]) -> None:
        """An attempt for a node of the other gateway."""
        message = gateway_pb2.ForwardedStart(
            start=codec.start_attempt_message(start),
            node_id=node_id,
            request_id=request.request_id,
            account_id=request.account_id,
            model_id=request.model_id,
            prompt_bytes=request.prompt_bytes,
            prompt_tokens_min=request.prompt_tokens_min,
            completion_tokens_max=request.completion_tokens_max,
            answer_count=request.answer_count,
            prompt_count=request.prompt_count,
            continues=request.continued is not None,
            tried_node_ids=tried,
            trusted_only=request.trusted_only,
        )
        if request.work is not None:
            message.expected_prompt_tokens, message.expected_answer_tokens = request.work.prompt_tokens, request.work.answer_tokens
        self._starts[start.attempt_id] = message
        self._filled.set()

    def finish(self, attempt_id: AttemptId, counted: Counted) -> None:
        """Nobody waits for an attempt any more; what it came to."""
        self._starts.pop(attempt_id, None)
        self._numbers.pop(attempt_id, None)
        finish = gateway_pb2.ForwardedFinish(attempt_id=attempt_id, token_count=counted.token_count, was_outrun=counted.was_outrun)
        if counted.usage is not None:
            finish.usage.CopyFrom(codec.usage_message(counted.usage))
        self._finishes.append(finish)
        self._acknowledged.pop(attempt_id, None)
        self._filled.set()

    def is_among(self, attempt_id: AttemptId, starts_seen: int) -> bool:
        """Whether an attempt is one of the first so many that have left."""
        number = self._numbers.get(attempt_id)
        return number is not None and number <= starts_seen

    def acknowledge(self, attempt_id: AttemptId, next_sequence: int) -> None:
        """The chunks that have left for the client: those before this number."""
        self._acknowledged[attempt_id] = next_sequence
        self._filled.set()

    async def take(self) -> gateway_pb2.ForwardFrame:
        """The frame, as soon as anything is in it."""
        await self._filled.wait()
        frame = gateway_pb2.ForwardFrame(finishes=self._finishes)
        for attempt_id, next_sequence in self._acknowledged.items():
            frame.acknowledgements.add(attempt_id=attempt_id, next_sequence=next_sequence)
        self._finishes, self._acknowledged = [], {}
        self._move_starts_into(frame)
        if not self._starts:
            self._filled.clear()
        return frame

    def _move_starts_into(self, frame: gateway_pb2.ForwardFrame) -> None:
        left_bytes = STARTS_BYTES_MAX
        for attempt_id, start in tuple(self._starts.items()):
            left_bytes -= len(start.start.body)
            if left_bytes < 0 and frame.starts:
                return
            frame.starts.append(start)
            del self._starts[attempt_id]
            self._start_count += 1
            self._numbers[attempt_id] = self._start_count
