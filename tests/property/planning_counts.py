"""What happened to the pool of `planning_churn`, counted. It must not know why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """So far."""

    events: Counter[str] = field(default_factory=Counter)
    plans: int = 0
    moves: int = 0
    displacements: int = 0
    placements: int = 0
    groups: int = 0
    """That became ready."""
    groups_yielded: int = 0
    """That were given up while idle."""
    yielded: int = 0
    """Replicas that left for a group."""
    beats: int = 0

    def event_words(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in sorted(self.events.items()))

    def words(self) -> str:
        return (
            f"{self.plans} plans, {self.placements} replicas placed, {self.moves} moved for 20 % or more, {self.displacements} made room "
            f"while idle, {self.yielded} of them for a group; {self.groups} groups became ready, {self.groups_yielded} gave way while idle"
        )
