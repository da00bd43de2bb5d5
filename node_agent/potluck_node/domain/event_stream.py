"""Where a streamed answer may be cut, and which of its bytes are words of the engine.

Decides where an event of `text/event-stream` ends: after an empty line; and that only an event with data is a sign of work. Servers keep
silent streams alive with comments, from a thread that goes on while their model hangs: llama.cpp writes ":" every 30 s, others ": ping". It
must not know what an event says: the engine's bytes travel unparsed, but for the ends of its lines.
"""

from __future__ import annotations

from typing import Final

EVENT_END: Final = b"\n\n"
_DATA_LINE: Final = b"\ndata:"
"""Inside a JSON string a line's end is escaped."""


class DataLines:
    """Counts the lines with data in one answer, whose bytes may come cut anywhere."""

    __slots__ = ("_end",)

    def __init__(self) -> None:
        self._end = b"\n"

    def take(self, piece: bytes) -> int:
        """How many began with this piece."""
        seen = self._end + piece
        # Too short to hold a whole mark, so none is counted twice.
        self._end = seen[1 - len(_DATA_LINE) :]
        return seen.count(_DATA_LINE)


class TokenEvents:
    """Tells which pieces of a streamed answer have tokens in them.

    Args:
        names_role_first: the first event names the role, which some engines say before they begin, as a chat's does.
    """

    __slots__ = ("_lines", "_roles_left")

    def __init__(self, *, names_role_first: bool) -> None:
        self._lines = DataLines()
        self._roles_left = int(names_role_first)

    def take(self, piece: bytes) -> bool:
        """Whether there is an event with data among these bytes, beside the role's."""
        count = self._lines.take(piece)
        has_token = count > self._roles_left
        if count:
            self._roles_left = 0
        return has_token


class EventTooLargeError(Exception):
    """The engine wrote an event without an end."""


class WholeEvents:
    """Cuts one answer, whose bytes may come cut anywhere, behind its whole events.

    Args:
        event_bytes_max: of one event.
    """

    __slots__ = ("_event_bytes_max", "_held", "_line_feeds")

    def __init__(self, event_bytes_max: int) -> None:
        self._event_bytes_max = event_bytes_max
        self._line_feeds = LineFeeds()
        # Grows in place: an event that comes in many pieces costs no more than its bytes.
        self._held = bytearray()

    @property
    def remainder(self) -> bytes:
        """What waits for its event's end. A copy: to be read at the answer's end."""
        return bytes(self._held)

    @property
    def held_bytes(self) -> int:
        """How many wait."""
        return len(self._held)

    def take(self, piece: bytes) -> bytes:
        """The events that are whole by now, their lines ended by line feeds; raises EventTooLargeError."""
        piece = self._line_feeds.take(piece)
        held = self._held
        if not held and piece.endswith(EVENT_END):
            return piece
        cut = piece.rfind(EVENT_END) + len(EVENT_END)
        if cut < len(EVENT_END):
            # What is held has no event's end of its own, so the only other place for one is where the two meet.
            cut = 1 if held.endswith(b"\n") and piece.startswith(b"\n") else 0
        whole = b""
        if cut:
            whole = b"".join((held, piece[:cut]))
            held.clear()
        held += piece[cut:]
        if len(held) > self._event_bytes_max:
            raise EventTooLargeError
        return whole


class LineFeeds:
    """Ends the lines of one answer with line feeds, whatever its server ends them with.

    The standard knows carriage returns too, alone and before a line feed, as sse-starlette writes; whoever reads the answer later on knows
    line feeds only. Inside a JSON string both are escaped.
    """

    __slots__ = ("_after_return",)

    def __init__(self) -> None:
        self._after_return = False

    def take(self, piece: bytes) -> bytes:
        """The next bytes: the same object, unless there was something to change."""
        if self._after_return and piece:
            # That line ended with the piece before.
            self._after_return = False
            piece = piece.removeprefix(b"\n")
        if b"\r" not in piece:
            return piece
        self._after_return = piece.endswith(b"\r")
        return piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
