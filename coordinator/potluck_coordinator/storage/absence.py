"""What is said of a database that cannot be used now.

Decides that clients are told when to come again, and nothing of where the database is; the operator reads that in the log, and at a start.
"""

from __future__ import annotations

from typing import ClassVar, Final

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


class EndedError(PotluckError):
    """This coordinator must not write to its database any more, whatever becomes of that; each kind says why."""

    WORDS: ClassVar[str]

    def __init__(self) -> None:
        super().__init__(ErrorCode.COORDINATOR_UNAVAILABLE, self.WORDS)


class ReplacedError(EndedError):
    """Another coordinator has begun on this database since."""

    WORDS = "Another coordinator has taken this one's database over, so this one stops serving."


class FellBackError(EndedError):
    """The database came back without something that was committed to it."""

    WORDS = (
        "The coordinator's database came back with older books: a standby that was behind has taken over, or a copy was restored, and what "
        "was committed last is missing. So this coordinator stops serving. Bring the server back that has the newest books, or start the "
        "coordinator again to go on with these."
    )
