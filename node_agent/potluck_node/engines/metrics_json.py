"""What engines tell of themselves in JSON, beside their metrics or in their place, in our metrics' names.

Decides what of such an answer is meant. What is not there, or is not what it should be, is left out. It must not know who asks.

llama.cpp has had no metric of its cache since 2025. `/props` tells the slots and the context of one, `/slots` what each holds: seen on
xllamacpp 2026.10. TabbyAPI's `/v1/model` tells `cache_size`, which its own types call a number of tokens; TGI's `/info` told
`max_batch_total_tokens` in version 1. Neither of these two was tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from potluck_node.engines.metrics_words import OURS, TOKENS_MAX


def from_props(props: Any, *, has_shared_cache: bool = True) -> Mapping[str, float]:
    """llama.cpp's capacity. Slots that may share one cache, which it does not tell, say nothing of its size unless there is one only."""
    slot_count = _count(_field(props, "total_slots"))
    context = _count(_field(_field(props, "default_generation_settings"), "n_ctx"))
    if not slot_count or not context or (slot_count > 1 and has_shared_cache):
        return {}
    return {OURS.kv_capacity: slot_count * context}


def from_slots(slots: Any) -> Mapping[str, float]:
    """What the requests at work hold of llama.cpp's cache. What idle slots keep is given up as soon as it is in the way."""
    busy = [slot for slot in slots if _field(slot, "is_processing") is True] if isinstance(slots, list) else None
    held = None if busy is None else [_tokens_held(slot) for slot in busy]
    return {} if held is None or None in held else {OURS.kv_used: sum(each for each in held if each is not None)}


def from_model_card(card: Any) -> Mapping[str, float]:
    """TabbyAPI's capacity."""
    return _told(OURS.kv_capacity, _count(_field(_field(card, "parameters"), "cache_size")))


def from_info(info: Any) -> Mapping[str, float]:
    """TGI's capacity."""
    return _told(OURS.kv_capacity, _count(_field(info, "max_batch_total_tokens")))


def _tokens_held(slot: Any) -> int | None:
    """The prompt's tokens that were kept or read so far, and the answer's."""
    following = _field(slot, "next_token")
    answer = _field(following[0] if isinstance(following, list) and following else following, "n_decoded")
    parts = [_count(part) for part in (_field(slot, "n_prompt_tokens_cache"), _field(slot, "n_prompt_tokens_processed"), answer)]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _told(name: str, count: int | None) -> Mapping[str, float]:
    return {name: count} if count else {}


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= TOKENS_MAX else None
