"""A modelled request in the words of the live gateway: the few facts of it that its measures, lines and expectations read.

Decides only which blocks a modelled prompt shares with others, and that a token has four bytes. It must not know the pool.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final, cast

from potluck_coordinator.domain.admission import Queued
from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.fairness import service
from potluck_coordinator.domain.forecast import Work
from potluck_coordinator.domain.prefixes import BLOCK_BYTES, BLOCKS_MAX, PromptBlocks
from potluck_coordinator.gateway.inference_request import Caller
from potluck_coordinator.simulation.asking import Request
from potluck_protocol.values import Endpoint, ModelId, NodeId, Usage

if TYPE_CHECKING:
    from potluck_coordinator.gateway.attempt import Attempt as GatewayAttempt
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.waiting import WaitingRequest

MODEL: Final = ModelId("simulated")
ENDPOINT: Final = Endpoint.CHAT_COMPLETIONS
BYTES_PER_TOKEN: Final = 4
BLOCK_TOKENS: Final = BLOCK_BYTES // BYTES_PER_TOKEN


class Words:
    """One request before one of its attempts."""

    model_id = MODEL
    endpoint = ENDPOINT
    stream = True
    answer_count = 1
    prompt_tokens_min = 1

    __slots__ = ("_blocks", "account_id", "body", "caller", "completion_tokens_max", "continued", "prompt_bytes", "request", "tier", "work")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.account_id = request.account_id
        self.caller = Caller(weight=request.weight)
        self.tier = ServiceTier(request.tier)
        self.prompt_bytes = (request.prompt_tokens + request.delivered_tokens) * BYTES_PER_TOKEN
        self.completion_tokens_max = request.answer_tokens_max - request.delivered_tokens
        self.continued = True if request.delivered_tokens else None
        self.body = request.first_number.to_bytes(8, "big")
        """What a client sends again when it comes back."""
        self.work: Work | None = None
        self._blocks: PromptBlocks | None = None

    def prompt_blocks(self) -> PromptBlocks:
        """Of those blocks that other prompts may begin with, too; the others have no names, for nobody asks for them."""
        if self._blocks is None:
            self._blocks = PromptBlocks(_block_names(self.request), self.prompt_bytes)
        return self._blocks

    @property
    def live(self) -> InferenceRequest:
        """What stands behind the edges reads no more of a request than this has."""
        return cast("InferenceRequest", self)


def _block_names(request: Request) -> tuple[int, ...]:
    """A session's blocks are its own, but for the first ones, which all users of its kind share."""
    if not request.prefixes:
        return ()
    group, session = request.prefixes[-1], request.prefixes[0]
    shared = group.tokens // BLOCK_TOKENS if group.key == request.users_name else 0
    names = _named(group.key, shared)
    if session is group and shared:
        return names
    return names + _named(session.key, min(BLOCKS_MAX, request.prompt_tokens // BLOCK_TOKENS))[shared:]


@lru_cache(maxsize=1024)
def _named(key: str, count: int) -> tuple[int, ...]:
    return tuple(hash((key, number)) for number in range(count))


class Waiting:
    """One that waits, as the gateway's lines know it."""

    __slots__ = ("arrived_at_seconds", "deadline_seconds", "excluded", "number", "request", "service", "turn", "words", "work")

    def __init__(self, words: Words, work: Work, arrived_at: float, deadline: float) -> None:
        self.request = words.live
        self.words = words
        self.excluded: frozenset[NodeId] = words.request.excluded
        self.work = work
        self.service = service(work.prompt_tokens, work.answer_tokens)
        self.arrived_at_seconds = arrived_at
        self.deadline_seconds = deadline
        self.number = 0
        self.turn = _NotYet

    @property
    def queued(self) -> Queued:
        """As one of those that wait."""
        return Queued(1, self.work.wanted_tokens)

    @property
    def live(self) -> WaitingRequest:
        """As above."""
        return cast("WaitingRequest", self)


def words_of(waiting: WaitingRequest) -> Words:
    """Of one that waits in a line; there are no others in the simulator."""
    return cast("Waiting", waiting).words


class _NotYet:
    """Whoever has its turn leaves its line at once."""

    @staticmethod
    def done() -> bool:
        return False


class Ended:
    """An attempt that is over, as the gateway's lines charge it."""

    __slots__ = ("completion_tokens_max", "is_whole", "relayed_token_count", "usage")

    def __init__(self, usage: Usage | None, relayed_token_count: int, completion_tokens_max: int) -> None:
        self.usage = usage
        self.is_whole = usage is not None
        self.relayed_token_count = relayed_token_count
        self.completion_tokens_max = completion_tokens_max

    @property
    def live(self) -> GatewayAttempt:
        """As above."""
        return cast("GatewayAttempt", self)
