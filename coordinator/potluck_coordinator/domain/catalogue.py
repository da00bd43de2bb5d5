"""What the operator offers: models with their pinned files, prices and limits, and the wish to have them served.

Decides nothing; these are the words that planning, pricing and the edges share.
"""

from __future__ import annotations

from dataclasses import dataclass

from potluck_protocol.values import Endpoint, ModelFile, ModelId


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One model of the catalogue. Prices are whole micro-credits a token."""

    model_id: ModelId
    file: ModelFile
    engine_kind: str
    context_length_tokens: int
    """Of one slot: prompt and answer together."""
    slot_count: int
    """Requests that one replica answers at a time."""
    prompt_price_micro_credits: int
    completion_price_micro_credits: int
    licence: str
    endpoints: tuple[Endpoint, ...]
    created_at_unix_seconds: int


@dataclass(frozen=True, slots=True)
class Deployment:
    """The wish "this model, this many replicas"; None asks for one on every node that may serve."""

    model_id: ModelId
    replica_count: int | None = None
