"""The tier in an answer's body: OpenAI's `service_tier`, put into the first bytes that a client gets.

Decides where it goes without reading what an engine wrote: into the first event of a stream, or the beginning of a document. What does not
begin as engines begin is left as it is; the header says the same. It must not know tiers or engines.
"""

from __future__ import annotations

from typing import Final

_EVENT: Final = b'data: {"'
_DOCUMENT: Final = b'{"'
_EMPTY: Final = b'"service_tier":null'
"""As vLLM writes it. Inside a JSON string its quotation marks would have backslashes before them, so that no text looks like this."""


def marked(first: bytes, tier: str, *, stream: bool) -> bytes:
    """The first bytes of an answer, with the tier in them."""
    own = b'"service_tier":"' + tier.encode() + b'"'
    if _EMPTY in first:
        return first.replace(_EMPTY, own, 1)
    beginning = _EVENT if stream else _DOCUMENT
    if not first.startswith(beginning):
        return first
    return beginning[:-1] + own + b"," + first[len(beginning) - 1 :]
