"""Which replicas hold which beginnings of prompts, as far as this gateway sent them there.

Decides nothing of its own: `domain.prefixes` says what a block is, how deep a prompt is known, and when that is no longer believed. Blocks
are kept by name, with no word of what is in them; of more than `BLOCKS_KEPT_MAX` those go that nobody sent for longest, the deepest of a
prompt first. It must not know requests, sessions or speeds.
"""

from __future__ import annotations

from collections import OrderedDict
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.prefixes import CacheState, Holder, deepest, is_held

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from potluck_protocol.values import ReplicaId

BLOCKS_KEPT_MAX: Final = 100_000
"""Some 60 MB, for 25 MB of prompts: six million tokens."""
HOLDERS_MAX: Final = 4
"""Of one block; the one that read it longest ago makes room."""

_NOBODY: Final[Mapping[ReplicaId, Holder]] = MappingProxyType({})


class PrefixMap:
    """One gateway's.

    Args:
        cache_of: a replica's cache as it is now.
    """

    def __init__(self, cache_of: Callable[[ReplicaId], CacheState]) -> None:
        self._cache_of = cache_of
        self._blocks: OrderedDict[int, dict[ReplicaId, Holder]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def holders(self, names: Sequence[int], now: float, count_max: int) -> dict[ReplicaId, int]:
        """Who holds how many of the prompt's first blocks, the most first."""
        found: dict[ReplicaId, int] = {}
        depth = len(names)

        def has_others(name: int) -> bool:
            for replica_id, holder in self._blocks.get(name, _NOBODY).items():
                if replica_id not in found and is_held(holder, self._cache_of(replica_id), now):
                    return True
            return False

        while depth and len(found) < count_max:
            depth = deepest(names[:depth], has_others)
            if depth:
                found |= {replica_id: depth for replica_id in self._holding(names[depth - 1], now) if replica_id not in found}
        return found

    def depth(self, replica_id: ReplicaId, names: Sequence[int], now: float) -> tuple[int, float]:
        """How many of the first blocks one replica holds, and what it has read since."""
        cache = self._cache_of(replica_id)

        def is_there(name: int) -> bool:
            holder = self._blocks.get(name, {}).get(replica_id)
            return holder is not None and is_held(holder, cache, now)

        depth = deepest(names, is_there)
        return depth, cache.read_tokens - self._blocks[names[depth - 1]][replica_id].read_tokens if depth else 0.0

    def read(self, replica_id: ReplicaId, names: Sequence[int], now: float) -> None:
        """A replica gets a prompt to read."""
        cache = self._cache_of(replica_id)
        holder = Holder(now, cache.read_tokens, cache.beginning)
        # The last block first, so that the first ones are forgotten last: whoever has a block has all before it.
        for name in reversed(names):
            holders = self._blocks.get(name)
            if holders is None:
                self._blocks[name] = {replica_id: holder}
                continue
            self._blocks.move_to_end(name)
            holders.pop(replica_id, None)
            if len(holders) >= HOLDERS_MAX:
                del holders[next(iter(holders))]
            holders[replica_id] = holder
        while len(self._blocks) > BLOCKS_KEPT_MAX:
            self._blocks.popitem(last=False)

    def unread(self, replica_id: ReplicaId, names: Sequence[int]) -> None:
        """It never came to that."""
        for name in names:
            holders = self._blocks.get(name, {})
            holders.pop(replica_id, None)
            if not holders:
                self._blocks.pop(name, None)

    def _holding(self, name: int, now: float) -> list[ReplicaId]:
        holders = self._blocks.get(name, _NOBODY)
        return [replica_id for replica_id, holder in holders.items() if is_held(holder, self._cache_of(replica_id), now)]
