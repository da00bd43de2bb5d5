"""What each gateway says of its own nodes' replicas, for all others to read.

Decides nothing: it keeps every gateway's last word and says which are new to whoever asks. It is in memory only, for gateways tell it again
within seconds. It must not know what is in a view.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

from potluck_coordinator.pool_view import PoolView

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from potluck_coordinator.pool_view import GatewayView

FOLLOW_SECONDS_MAX: Final = 20.0
"""A gateway asks again so often, so that no answer hangs for ever on a connection that died."""


class ViewBoard:
    """Holds the newest `GatewayView` of each gateway.

    Args:
        first_version: higher than any version of an earlier run, or gateways would not notice the restart.
        epochs: of the coordinator's gateways, as of now.
    """

    def __init__(self, first_version: int, epochs: Callable[[], Collection[int]]) -> None:
        self._version = first_version
        self._epochs = epochs
        self._views: dict[int, tuple[int, GatewayView]] = {}
        self._changed = asyncio.Event()

    def tell(self, epoch: int, view: GatewayView) -> None:
        """One gateway's word, in place of its last one; of a gateway that was replaced, nothing."""
        epochs = self._epochs()
        self._views = {known: told for known, told in self._views.items() if known in epochs}
        if epoch in epochs:
            self._version += 1
            self._views[epoch] = self._version, view
            self._changed.set()
            self._changed = asyncio.Event()

    async def follow(self, epoch: int, known_version: int) -> PoolView:
        """What others than that gateway said since, as soon as there is something, or nothing after 20 s."""
        news = self._since(epoch, known_version)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FOLLOW_SECONDS_MAX):
                while not news.gateways:
                    await self._changed.wait()
                    news = self._since(epoch, known_version)
        return news

    def _since(self, epoch: int, known_version: int) -> PoolView:
        if known_version > self._version:
            known_version = 0  # of an earlier run, by a clock that was set back
        views = {other: view for other, (version, view) in self._views.items() if other != epoch and version > known_version}
        return PoolView(self._version, views)
