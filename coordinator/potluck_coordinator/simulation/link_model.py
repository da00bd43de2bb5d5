"""What goes over the modelled link, and who stands at its two ends.

Decides nothing: these are the words that a node's and the coordinator's models share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from potluck_coordinator.simulation.engine_model import Prefix, Sequence

if TYPE_CHECKING:
    from potluck_coordinator.simulation.node_model import Node


@dataclass(frozen=True, slots=True)
class Work:
    """What a coordinator sends to have an attempt begun."""

    attempt_id: int
    epoch: int
    prompt_tokens: int
    answer_tokens: int
    first_token_index: int
    """Of the request's answer: how much of it earlier attempts have given."""
    prefixes: tuple[Prefix, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """A part of an answer on its way to the coordinator."""

    attempt_id: int
    epoch: int
    sequence: int
    first_token_index: int
    token_count: int
    ends: bool = False
    cached_tokens: int = 0
    """Of the prompt, by the engine's count; told with the end."""
    refused: bool = False
    """The engine's context has no room for the prompt."""
    died: bool = False


class NodeAttempt:
    """One attempt as its node knows it."""

    __slots__ = ("chunks", "over", "sent", "sequence", "work")

    def __init__(self, work: Work) -> None:
        self.work = work
        self.sequence = Sequence(self, work.prompt_tokens, work.answer_tokens, work.prefixes)
        self.sent = 0
        self.chunks: list[Frame] = []
        self.over = False


class Coordinator(Protocol):
    """The other end of the link."""

    def receive(self, node: Node, frame: Frame) -> None: ...
    def hello(self, node: Node) -> None: ...
    def heartbeat(self, node: Node) -> None: ...
    def link_broke(self, node: Node, *, goodbye: bool = False) -> None: ...
    def fell_silent(self, node: Node) -> None: ...
    def orders_changed(self, node: Node) -> None: ...
