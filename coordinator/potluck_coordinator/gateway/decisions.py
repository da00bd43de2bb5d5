"""What this gateway decided over the requests of the last minutes, in memory and within bounds; nothing of what was asked or answered.

Decides how many stories are kept. What is in them is `domain.decisions`; it must not know who may read them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.decisions import Step, StepKind, Story, is_over

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from potluck_coordinator.domain.placement import Placement
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_protocol.clock import Clock
    from potluck_protocol.values import AccountId, AttemptId, NodeId, RequestId

    class Note(Protocol):
        """One more step of a story that its caller need not name."""

        def __call__(
            self, kind: StepKind, words: str = "", *, node_id: NodeId | None = None, attempt_id: AttemptId | None = None
        ) -> None: ...


STORIES_MAX: Final = 4096
"""The oldest goes first. One is some two kilobytes, with a dozen candidates to each of its placements."""


class Decisions:
    """The stories of one gateway's requests.

    Args:
        clock: for their dates.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._stories: dict[tuple[AccountId, RequestId], Story] = {}
        """In the order of arrival. Who sends an id again sees the newest request of that name."""

    def note(
        self,
        request: InferenceRequest,
        kind: StepKind,
        words: str = "",
        *,
        node_id: NodeId | None = None,
        attempt_id: AttemptId | None = None,
        placement: Placement | None = None,
    ) -> None:
        """One more step of a request's story, which begins with `arrived`."""
        key = (request.account_id, request.request_id)
        story = self._stories.get(key)
        if story is not None:
            step = Step(kind, self._clock.monotonic_seconds(), words, node_id, attempt_id, placement)
            self._stories[key] = story.and_then(step)

    def arrived(self, request: InferenceRequest) -> None:
        """A story begins."""
        now = self._clock.monotonic_seconds()
        key = (request.account_id, request.request_id)
        self._stories.pop(key, None)
        self._stories[key] = Story(request.request_id, request.account_id, request.model_id, self._clock.unix_ms(), now)
        while len(self._stories) > STORIES_MAX or is_over(next(iter(self._stories.values())), now):
            del self._stories[next(iter(self._stories))]

    def story(self, request_id: RequestId, may_see: Callable[[AccountId], bool]) -> Story | None:
        """The newest request of that name among those of accounts that the caller may see."""
        found = [story for (account_id, one), story in self._stories.items() if one == request_id and may_see(account_id)]
        return found[-1] if found else None

    @property
    def stories(self) -> tuple[Story, ...]:
        """All that are kept, oldest first."""
        return tuple(self._stories.values())
