"""What a modelled node did, added up over the lives of its engines.

Decides nothing. It must not know why an engine ended.
"""

from __future__ import annotations

from potluck_coordinator.simulation.engine_model import Engine


class NodeCounts:
    """One node's, up to the last time that somebody added."""

    __slots__ = ("_at", "here_seconds", "hit_tokens", "made_tokens", "preempted_count", "read_tokens", "up_seconds")

    def __init__(self) -> None:
        self.here_seconds = 0.0
        """Up or not: its owner wants it to be."""
        self.up_seconds = 0.0
        self.made_tokens = 0.0
        self.read_tokens = 0.0
        self.hit_tokens = 0
        self.preempted_count = 0
        self._at = 0.0

    def add(self, engine: Engine | None, now: float, *, here: bool) -> None:
        """Time, and the engine's work, which ends with it. Asked before anything of that changes."""
        passed = now - self._at
        self._at = now
        self.here_seconds += passed if here else 0.0
        if engine is None:
            return
        self.up_seconds += passed
        self.made_tokens += engine.made_tokens
        self.read_tokens += engine.read_tokens
        self.hit_tokens += engine.hit_tokens
        self.preempted_count += engine.preempted_count
        engine.made_tokens = engine.read_tokens = 0.0
        engine.hit_tokens = engine.preempted_count = 0
