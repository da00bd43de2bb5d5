"""What a request may cost at most, what it cost, and what the pool keeps of it.

Decides every amount, always in whole micro-credits. It must not know holds or postings; whoever settles cuts a charge at its hold, for a
node may claim counts that no request could have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from potluck_protocol.values import Usage

if TYPE_CHECKING:
    from potluck_coordinator.domain.catalogue import CatalogueEntry

TEMPLATE_TOKENS_ALLOWANCE: Final = 256
"""What a chat template may add to the prompt's own bytes: roles, separators and a default system message."""
BASIS_POINTS: Final = 10_000


def hold_amount(entry: CatalogueEntry, prompt_bytes: int, completion_tokens_max: int | None, answer_count: int, prompt_count: int) -> int:
    """The most that a request can cost, in micro-credits.

    Args:
        entry: the model's prices and context.
        prompt_bytes: of the request; no tokenizer makes more tokens than there are bytes.
        completion_tokens_max: as the client asked, for each answer; None asks for as many as fit.
        answer_count: how many answers the request gets, over all its prompts.
        prompt_count: how many prompts, or inputs to embed, it has; each of them may fill the context.
    """
    return charge(entry, most_tokens(entry, prompt_bytes, completion_tokens_max, answer_count, prompt_count))


def most_tokens(entry: CatalogueEntry, prompt_bytes: int, completion_tokens_max: int | None, answer_count: int, prompt_count: int) -> Usage:
    """The most tokens that a request can come to; it is told what `hold_amount` is told."""
    context = entry.context_length_tokens
    # What an engine puts around each of several prompts is no more than the quotes and commas around it in the body.
    prompt_tokens = min(max(0, prompt_bytes) + TEMPLATE_TOKENS_ALLOWANCE, context * max(1, prompt_count))
    completion_tokens = context if completion_tokens_max is None else min(max(0, completion_tokens_max), context)
    return Usage(prompt_tokens, completion_tokens * max(1, answer_count))


def believable(usage: Usage, prompt_tokens_max: int, completion_tokens_max: int) -> Usage:
    """An engine's counts, cut at what the request and what came of its answer can have had: a node's word is never worth more.

    Args:
        usage: as the engine counted.
        prompt_tokens_max: bytes of all that it had to read.
        completion_tokens_max: what its answer's own bytes allow.
    """
    prompt_tokens = min(max(0, usage.prompt_token_count), max(0, prompt_tokens_max) + TEMPLATE_TOKENS_ALLOWANCE)
    return Usage(
        prompt_token_count=prompt_tokens,
        completion_token_count=min(max(0, usage.completion_token_count), max(0, completion_tokens_max)),
        cached_prompt_token_count=min(max(0, usage.cached_prompt_token_count), prompt_tokens),
    )


def charge(entry: CatalogueEntry, usage: Usage) -> int:
    """What a whole answer cost by the engine's counts; a count below zero, which only a lying node sends, counts as none."""
    return (
        max(0, usage.prompt_token_count) * entry.prompt_price_micro_credits
        + max(0, usage.completion_token_count) * entry.completion_price_micro_credits
    )


def charge_for_relayed(entry: CatalogueEntry, completion_tokens: int) -> int:
    """What a broken stream cost: the tokens that were relayed. The prompt is free, for no count of it arrived."""
    return max(0, completion_tokens) * entry.completion_price_micro_credits


def fee(amount_micro_credits: int, fee_basis_points: int) -> int:
    """The pool's share of an amount, rounded down in the payee's favour; raises ValueError for a rate outside 0 to 10,000."""
    if not 0 <= fee_basis_points <= BASIS_POINTS:
        raise ValueError(f"fee_basis_points is from 0 to {BASIS_POINTS}, not {fee_basis_points}")
    return amount_micro_credits * fee_basis_points // BASIS_POINTS
