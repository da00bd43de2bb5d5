"""One request as an edge understood it: what `openai_request` read from its body, for everything behind the edges.

Decides nothing; it knows no HTTP, no gRPC, and of its body only what the fields say.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from potluck_protocol.values import AccountId, Endpoint, ModelId, RequestId

if TYPE_CHECKING:
    from potluck_protocol.culprits import Culprits, Fingerprint


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
    _fingerprints: list[Fingerprint] = field(default_factory=list, init=False, repr=False, compare=False)
    """None or one."""

    def fingerprint(self, culprits: Culprits) -> Fingerprint:
        """Made once, however often it is looked up: a body has up to megabytes, and a request that waits is looked at again and again."""
        if not self._fingerprints:
            self._fingerprints.append(culprits.fingerprint(self.endpoint, self.body))
        return self._fingerprints[0]
