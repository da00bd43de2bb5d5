"""The nodes that have said hello and are not welcomed yet.

Decides nothing: it counts them, and turns those away that `domain.doorway` would have come again. It must not know what opening a session
takes.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from potluck_coordinator.domain.doorway import come_again_seconds
from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Doorway:
    """One gateway's."""

    def __init__(self) -> None:
        self._waiting_count = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """For one node, until it is let in or refused. Raises QUEUE_FULL where it should come again."""
        seconds = come_again_seconds(self._waiting_count)
        if seconds is not None:
            text = "Many nodes come back at this moment, and are let in one after the other."
            raise PotluckError(ErrorCode.QUEUE_FULL, text, retry_after_seconds=seconds)
        self._waiting_count += 1
        try:
            yield
        except PotluckError as error:
            if error.code is not ErrorCode.ALREADY_EXISTS:
                raise
            # Another process has this gateway's number. An agent would take the code for its own: that another one has its node's place.
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, error.message) from error
        finally:
            self._waiting_count -= 1
