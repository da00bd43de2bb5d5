"""The name under which one request is found again in logs, errors and answers.

Decides which names a caller may choose and what the others get. It must not know HTTP or gRPC.
"""

from __future__ import annotations

import re
import secrets
from typing import Final

from potluck_protocol.values import RequestId

_ACCEPTED: Final = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")


def request_id_of(offered: str | None) -> RequestId:
    """The caller's own id if it is harmless to repeat and to log, else a new one."""
    if offered is not None and _ACCEPTED.match(offered):
        return RequestId(offered)
    return RequestId(f"req_{secrets.token_hex(12)}")
