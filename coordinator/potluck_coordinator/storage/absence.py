"""What is said of a database that cannot be used now.

Decides that clients are told when to come again, and nothing of where the database is; the operator reads that in the log, and at a start.
"""

from __future__ import annotations

from typing import Final

from potluck_protocol.errors import ErrorCode, PotluckError

RETRY_AFTER_SECONDS: Final = 2
AWAY: Final = "The coordinator's database is away for now, and nothing can be done without it; try again."
LOST: Final = "The coordinator's database went away during the call; look whether it took effect."


class DatabaseAwayError(PotluckError):
    """There is no database now.

    Args:
        reason: for the operator. It may name hosts, and holds no password.
        had_begun: the unit was under way, so that it may have been committed.
    """

    def __init__(self, reason: str, *, had_begun: bool = False) -> None:
        words = LOST if had_begun else AWAY
        super().__init__(ErrorCode.COORDINATOR_UNAVAILABLE, words, retry_after_seconds=RETRY_AFTER_SECONDS)
        self.reason = reason


class ReplacedError(PotluckError):
    """Another coordinator has begun on this database since; this one must not go on, whatever becomes of the other."""

    def __init__(self) -> None:
        super().__init__(
            ErrorCode.COORDINATOR_UNAVAILABLE, "Another coordinator has taken this one's database over, so this one stops serving."
        )
