"""What the coordinator's goodbye means for the agent: dial again, or stop and say why.

Decides from the reasons of goodbyes and their times. It must not know connections.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import GoodbyeReason

REPLACED_COUNT_MAX: Final = 3
REPLACED_WINDOW_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a connection ended: by a goodbye, or by a failure."""

    goodbye: GoodbyeReason | None = None
    message: str = ""


class Farewells:
    """The goodbyes that this agent has heard."""

    def __init__(self) -> None:
        self._replaced_at_seconds: deque[float] = deque(maxlen=REPLACED_COUNT_MAX)

    def failure_of(self, outcome: Outcome, now_seconds: float) -> PotluckError | None:
        """Why the agent should stop; None: dial again.

        Being replaced once may be our own former link, or a lease that a sleeping machine missed; again and again it is another agent with
        the same key.
        """
        match outcome.goodbye:
            case GoodbyeReason.REVOKED:
                reason = f" ({outcome.message})" if outcome.message else ""
                text = (
                    f"The pool's operator has revoked this node{reason}. To come back: a new invite, `potluck node leave`, and join again."
                )
                return PotluckError(ErrorCode.INVALID_CERTIFICATE, text)
            case GoodbyeReason.REPLACED:
                self._replaced_at_seconds.append(now_seconds)
                if not self._replaced_too_often(now_seconds):
                    return None
                text = (
                    "Another agent with this node's key takes its place again and again; was the state folder copied to another machine? "
                    "Remove it there, and give that machine a key of its own: `potluck node join` with another invite."
                )
                return PotluckError(ErrorCode.ALREADY_EXISTS, text)
            case GoodbyeReason.PROTOCOL_VERSION_UNSUPPORTED:
                return PotluckError(ErrorCode.PROTOCOL_VERSION_UNSUPPORTED, outcome.message or None)
            case _:
                return None

    def _replaced_too_often(self, now_seconds: float) -> bool:
        times = self._replaced_at_seconds
        return len(times) == REPLACED_COUNT_MAX and now_seconds - times[0] < REPLACED_WINDOW_SECONDS
