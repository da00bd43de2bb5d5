"""Where a request may run, asked of the nodes as they are now: `domain.placement` over the `links`' cohorts, `quarantine` in mind.

Decides nothing of its own. It must not know queues, holds or answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from potluck_coordinator.domain.placement import place, slots, tokens_wanted

if TYPE_CHECKING:
    from collections.abc import Callable

    from potluck_coordinator.domain.placement import Placement
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.links import Links
    from potluck_coordinator.gateway.quarantine import Quarantine
    from potluck_protocol.values import ModelId, NodeId


class Placing:
    """The placement of one gateway's requests.

    Args:
        links: the nodes.
        quarantine: which requests are kept apart from which.
        draw: a random number in [0, 1) for ties.
    """

    def __init__(self, links: Links, quarantine: Quarantine, draw: Callable[[], float]) -> None:
        self._links = links
        self._quarantine = quarantine
        self._draw = draw

    def place(self, request: InferenceRequest, excluded: frozenset[NodeId]) -> Placement:
        """A free replica for the request now, if there is one, and why each other one is none."""
        cohorts, draw = self._links.cohorts(request.model_id), self._draw()
        for shunned in self._quarantine.shunned(request, excluded):
            out = excluded | shunned
            tokens_min = tokens_wanted(cohorts, request.endpoint, out, request.prompt_tokens_min, request.completion_tokens_max)
            placement = place(cohorts, request.endpoint, out, draw, tokens_min)
            if placement.chosen is not None:
                break
        return placement

    def slots(self, request: InferenceRequest, excluded: frozenset[NodeId]) -> tuple[int, int]:
        """The slots of replicas that can take the request, busy or not, and how many of them are free."""
        cohorts = self._links.cohorts(request.model_id)
        tokens_min = tokens_wanted(cohorts, request.endpoint, excluded, request.prompt_tokens_min, request.completion_tokens_max)
        return slots(cohorts, request.endpoint, excluded, tokens_min)

    def has_free_slot(self, model_id: ModelId) -> bool:
        """Whether some request for the model could be placed now."""
        return any(cohort.is_free for cohort in self._links.cohorts(model_id))

    def ready_replica_count(self, model_id: ModelId) -> int:
        """Replicas that answer, busy or not."""
        cohorts = self._links.cohorts(model_id)
        return sum(len(cohort.replicas) for cohort in cohorts if cohort.sample.ready and cohort.sample.link_up)
