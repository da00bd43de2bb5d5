"""Where a streamed answer may be cut.

Decides only where an event of `text/event-stream` ends: after an empty line. It must not know what an event says: the engine's bytes travel
unparsed.
"""

from __future__ import annotations

from typing import Final

EVENT_END: Final = b"\n\n"


def cut_at_event_end(remainder: bytes, piece: bytes) -> tuple[bytes, bytes]:
    """Splits `remainder + piece` after its last whole event: (whole events, what waits for more).

    `remainder` is what the last call left waiting, so it holds no event end of its own.
    """
    if not remainder and piece.endswith(EVENT_END):
        return piece, b""
    held = remainder + piece
    # An event end may straddle the two, so the search starts one byte before the piece.
    end = held.rfind(EVENT_END, max(0, len(remainder) - 1))
    if end < 0:
        return b"", held
    return held[: end + len(EVENT_END)], held[end + len(EVENT_END) :]
