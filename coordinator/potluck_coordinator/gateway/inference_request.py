"""One request as an edge understood it: what `openai_request` read from its body, for everything behind the edges.

Decides nothing; it knows no HTTP, no gRPC, and of its body only what the fields say.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.continuing import CONTINUING_KINDS
from potluck_coordinator.domain.prefixes import PromptBlocks, block_names
from potluck_coordinator.domain.quotas import NO_QUOTAS, KeyQuotas
from potluck_coordinator.domain.tiers import AskedTier
from potluck_coordinator.gateway.prompt_text import prompt_text
from potluck_protocol.values import AccountId, Endpoint, KeyPrefix, ModelId, RequestId

if TYPE_CHECKING:
    from potluck_coordinator.domain.forecast import Work
    from potluck_protocol.culprits import Culprits, Fingerprint


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, beside the account."""

    key_prefix: KeyPrefix = KeyPrefix("")  # noqa: RUF009 - an id
    """Empty: by no key, as the pool's own requests."""
    quotas: KeyQuotas = NO_QUOTAS
    weight: float = 1.0
    """The account's, against others that wait."""


NO_CALLER: Final = Caller()


@dataclass(frozen=True, slots=True)
class Continued:
    """What a request's client has got already, from attempts of which one was lost; maybe nothing."""

    text: str
    token_count: int
    hold_micro_credits_max: int
    """What is left of the most that the whole answer may cost."""


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """One request as an edge understood it. `body` is JSON bound for the engine."""

    request_id: RequestId
    account_id: AccountId
    model_id: ModelId
    endpoint: Endpoint
    body: bytes
    stream: bool
    include_usage: bool
    """Whether the client itself asked for the usage chunk of a streamed answer; the engine is always asked for it."""
    prompt_bytes: int
    """An upper bound on the prompt's tokens."""
    completion_tokens_max: int | None
    answer_count: int
    prompt_count: int
    prompt_tokens_min: int
    """A lower bound on the tokens of the longest prompt: what cannot fit is refused before an engine works on it."""
    caller: Caller = NO_CALLER
    asked_tier: AskedTier = AskedTier.AUTO
    tier: ServiceTier = ServiceTier.DEFAULT
    """The one it is served in, once `gate` has let it in."""
    trusted_only: bool = False
    """It runs on nodes that the operator trusts, or nowhere; so does every attempt that follows."""
    work: Work | None = None
    """What it is expected to be, once `gate` has let it in."""
    continued: Continued | None = None
    """Set for an attempt that takes over from one that was lost: it comes before everybody who waits. `completion_tokens_max` is then what
    is left of it; `body` stays."""
    deadline_at_seconds: float | None = None
    """Monotonic; set once it has been dispatched, for whatever attempts follow."""
    _fingerprints: list[Fingerprint] = field(default_factory=list, init=False, repr=False, compare=False)
    """None or one."""
    _blocks: list[PromptBlocks] = field(default_factory=list, init=False, repr=False, compare=False)
    """The same."""

    def let_in(self, tier: ServiceTier, work: Work) -> InferenceRequest:
        """The same with its tier, and what it is expected to be. `replace` takes several times as long, and each request comes by here."""
        return InferenceRequest(
            self.request_id,
            self.account_id,
            self.model_id,
            self.endpoint,
            self.body,
            self.stream,
            self.include_usage,
            self.prompt_bytes,
            self.completion_tokens_max,
            self.answer_count,
            self.prompt_count,
            self.prompt_tokens_min,
            self.caller,
            self.asked_tier,
            tier,
            self.trusted_only,
            work,
            self.continued,
            self.deadline_at_seconds,
        )

    @property
    def engine_kinds(self) -> frozenset[str] | None:
        """The engines that it may run on; None: any."""
        return CONTINUING_KINDS[self.endpoint] if self.continued is not None and self.continued.text else None

    def fingerprint(self, culprits: Culprits) -> Fingerprint:
        """Made once, however often it is looked up: a body has up to megabytes, and a request that waits is looked at again and again."""
        if not self._fingerprints:
            self._fingerprints.append(culprits.fingerprint(self.endpoint, self.body))
        return self._fingerprints[0]

    def prompt_blocks(self) -> PromptBlocks:
        """Of its prompt, made once: it is read from the body, up to megabytes of it."""
        if not self._blocks:
            prompt = prompt_text(self.endpoint, self.body)
            self._blocks.append(PromptBlocks(block_names(prompt), len(prompt)))
        return self._blocks[0]
