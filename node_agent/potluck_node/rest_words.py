"""How a node's rest reads: its stage, its reasons, and until when.

Decides words. It must not know where a status comes from, nor what a reason leads to.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from potluck_node.control import AgentStatus, Stage
from potluck_node.domain.rest import Reason
from potluck_protocol.rest import RestCause

_STAGE_WORDS: Final = {Stage.SERVING: "serving", Stage.FREEING: "stopping engines", Stage.FREE: "paused, memory free"}


def stage_words(status: AgentStatus) -> str:
    """How far the node is on its way to rest."""
    line = status.rest
    if line.stage is Stage.FINISHING:
        count = status.attempt_count
        return f"finishing {count} answer{'' if count == 1 else 's'} under way"
    if line.living_count:
        return f"{_STAGE_WORDS[line.stage]}: {line.living_count} of them still hold memory, `potluck node run` logs more"
    return _STAGE_WORDS[line.stage]


def reason_words(reason: Reason) -> str:
    """One reason, with its end."""
    # An owner's pause for good says by itself how it ends.
    until = "" if reason.until_unix_ms is None else f", until {date_words(reason.until_unix_ms)}"
    return f"{reason.words}{until}"


def date_words(unix_ms: int) -> str:
    """Such as "Mon 23 Nov 07:00", by the clock on the wall; to the second where it is not on the minute."""
    local = datetime.fromtimestamp(unix_ms / 1000).astimezone()
    return local.strftime("%a %d %b %H:%M" if local.second == 0 else "%a %d %b %H:%M:%S")


def is_said_by_owner(reason: Reason) -> bool:
    """Whether `resume` ends it."""
    return reason.cause in {RestCause.OWNER, RestCause.FIRST_RUN}
