"""What this gateway decided over the requests of the last minutes, in memory and within bounds; nothing of what was asked or answered.

Decides how many stories are kept, and whose go when there are too many: whoever has the most loses his oldest, so that nobody's flood
costs another his story, and refused requests have a shelf of their own. What is in a story is `domain.decisions`; it must not know who
may read them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

from potluck_coordinator.domain.decisions import Step, StepKind, Story, is_over, was_refused

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
"""Of requests that were answered, or may be. One is some two kilobytes, with a dozen candidates to each of its placements."""
REFUSED_MAX: Final = 1024
"""Of requests that were refused."""

_Key: TypeAlias = "tuple[AccountId, RequestId]"


class _Shelf:
    """Names of stories, each account's in the order of their coming. However many there are, nothing here looks at more than one."""

    def __init__(self) -> None:
        self._names: dict[AccountId, dict[RequestId, None]] = {}
        self._accounts: dict[int, dict[AccountId, None]] = {}
        """By how many each has."""
        self._most = 0
        self.count = 0

    def add(self, key: _Key) -> None:
        account_id, request_id = key
        names = self._names.setdefault(account_id, {})
        self._leave(account_id, len(names))
        names[request_id] = None
        self.count += 1
        self._accounts.setdefault(len(names), {})[account_id] = None
        self._most = max(self._most, len(names))

    def discard(self, key: _Key) -> None:
        """Whether it is there or not."""
        account_id, request_id = key
        names = self._names.get(account_id, {})
        if request_id not in names:
            return
        self._leave(account_id, len(names))
        del names[request_id]
        self.count -= 1
        if names:
            self._accounts.setdefault(len(names), {})[account_id] = None
        else:
            del self._names[account_id]
        # Who had the most has one less now: nobody has more than that.
        self._most -= self._most not in self._accounts

    def oldest_of_most(self) -> _Key:
        """Whose is to go; there is one. Of accounts that have as many, the one that has had so many for the longest."""
        account_id = next(iter(self._accounts[self._most]))
        return account_id, next(iter(self._names[account_id]))

    def _leave(self, account_id: AccountId, count: int) -> None:
        if count:
            del self._accounts[count][account_id]
            if not self._accounts[count]:
                del self._accounts[count]


class Decisions:
    """The stories of one gateway's requests.

    Args:
        clock: for their dates.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._stories: dict[_Key, Story] = {}
        """In the order of arrival. Who sends an id again sees the newest request of that name."""
        self._open, self._refused = _Shelf(), _Shelf()

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
            self._stories[key] = story = story.and_then(step)
            if was_refused(story):
                self._open.discard(key)
                self._refused.discard(key)
                self._refused.add(key)
                self._bound(self._refused, REFUSED_MAX)

    def arrived(self, request: InferenceRequest) -> None:
        """A story begins."""
        now = self._clock.monotonic_seconds()
        key = (request.account_id, request.request_id)
        self._forget(key)
        while self._stories and is_over(next(iter(self._stories.values())), now):
            self._forget(next(iter(self._stories)))
        # One that is refused at once goes to its own shelf, and leaves its room to the next: a flood of them costs one story here.
        self._bound(self._open, STORIES_MAX - 1)
        self._stories[key] = Story(request.request_id, request.account_id, request.model_id, self._clock.unix_ms(), now)
        self._open.add(key)

    def _bound(self, shelf: _Shelf, count_max: int) -> None:
        while shelf.count > count_max:
            self._forget(shelf.oldest_of_most())

    def _forget(self, key: _Key) -> None:
        if self._stories.pop(key, None) is not None:
            self._open.discard(key)
            self._refused.discard(key)

    def story(self, request_id: RequestId, may_see: Callable[[AccountId], bool]) -> Story | None:
        """The newest request of that name among those of accounts that the caller may see."""
        found = [story for (account_id, one), story in self._stories.items() if one == request_id and may_see(account_id)]
        return found[-1] if found else None

    @property
    def stories(self) -> tuple[Story, ...]:
        """All that are kept, oldest first."""
        return tuple(self._stories.values())
