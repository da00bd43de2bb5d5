"""How much of one attempt's answer may be on its way over a link.

Decides for both ends, so that neither can wait for the other for ever: the coordinator acknowledges whenever a quarter of the window has
left for the client, and the node may send what still fits the window, or a piece of any size while less than a quarter is
unacknowledged. It must not know chunks.
"""

from __future__ import annotations


def acknowledged_step_bytes(window_bytes: int) -> int:
    """So many bytes, once they have left for the client, are acknowledged; fewer may stay unacknowledged for as long as nothing follows."""
    return max(1, window_bytes // 4)


def has_room(unacknowledged_bytes: int, piece_bytes: int, window_bytes: int) -> bool:
    """Whether a piece may be sent. An event is never cut, so one that does not fit goes once the client has read what was before it."""
    return unacknowledged_bytes < acknowledged_step_bytes(window_bytes) or unacknowledged_bytes + piece_bytes <= window_bytes
