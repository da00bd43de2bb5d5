"""Which of the pool's gateways the next dial goes to.

Decides from what the last welcome said and how the link was lost. The gateway that had the link comes first, for it keeps a broken link's
answers for a moment; after that the others, in an order that each agent draws for itself, so that a lost gateway's nodes spread over those
that are left. It must not know sockets, files or clocks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Final

LAST_ALONE_SECONDS: Final = 0.5
"""How long only the last gateway is dialled: a link's grace."""
MOVE_SPREAD_SECONDS: Final = 1.0
"""Full jitter before the first dial of another gateway: those that a gateway had do not all come to the next one at once."""
GREETING_SECONDS_MAX: Final = 10.0
"""From the dial to the welcome of the only gateway there is; beyond it the dial has failed, and another follows. Where thousands come back
at once, each waits in a row of handshakes, and whoever gives up too soon goes to its end and has cost the gateway as much."""
GREETING_SECONDS_MAX_OF_SEVERAL: Final = 2.5
"""The same where there are others to be tried: a machine that is gone answers nothing at all."""
ADDRESSES_MAX: Final = 64
ADDRESS_CHARACTERS_MAX: Final = 261


@dataclass(frozen=True, slots=True)
class Ways:
    """The addresses of links, as "host:port", and how far the search among them has come."""

    last: str
    """Of the gateway that has the link, or had it last."""
    known: tuple[str, ...] = ()
    """Of all others, in the order of the search."""
    lost_at_seconds: float | None = None
    """None: the link stands, or never was there."""
    is_let_go: bool = False
    """The gateway said goodbye: it is dialled when no other one will have us."""
    tried_count: int = 0
    """Dials in vain at others than the last alone, since the link was lost."""


def after_welcome(home: str, dialled: str, said: tuple[str, ...]) -> Ways:
    """A gateway took the node in.

    Args:
        home: where the pool's links are by its connection document; always one of the ways.
        dialled: where this one was reached.
        said: the welcome's addresses, those it cannot use left out; a coordinator of before says none.
    """
    last = said[0] if said else dialled
    return Ways(last, tuple(dict.fromkeys(address for address in (*said, home) if address != last)))


def after_loss(ways: Ways, now_seconds: float, *, is_let_go: bool, seed: int) -> Ways:
    """The link is gone; the order in which others are tried is drawn anew."""
    order = list(ways.known)
    random.Random(seed).shuffle(order)  # noqa: S311 - it only spreads
    return replace(ways, known=tuple(order), lost_at_seconds=now_seconds, is_let_go=is_let_go, tried_count=0)


def after_failed_dial(ways: Ways, dialled: str) -> Ways:
    """A dial was in vain. Those of the last gateway alone do not count, but where it is all that is known of."""
    was_alone = ways.lost_at_seconds is not None and dialled == ways.last and ways.tried_count == 0
    return ways if was_alone else replace(ways, tried_count=ways.tried_count + 1)


def target(ways: Ways, now_seconds: float) -> str:
    """Where to dial now. A link that stands moves to another connection of the same gateway."""
    since = ways.lost_at_seconds
    alone = since is not None and not ways.is_let_go and now_seconds - since < LAST_ALONE_SECONDS
    others_first = (*ways.known, ways.last) if since is not None else (ways.last, *ways.known)
    return ways.last if alone else others_first[ways.tried_count % len(others_first)]


def move_delay_seconds(ways: Ways, now_seconds: float, jitter: float) -> float:
    """How long to wait before the next dial beside what `domain.session` says: only before the first one of another gateway."""
    moves = ways.lost_at_seconds is not None and ways.tried_count == 0 and target(ways, now_seconds) != ways.last
    return MOVE_SPREAD_SECONDS * jitter if moves else 0.0


def greeting_seconds_max(ways: Ways) -> float:
    """How long a gateway has for its welcome. Once all of them were tried in vain, each may be one that many nodes have come back to."""
    return GREETING_SECONDS_MAX_OF_SEVERAL if ways.tried_count < len(ways.known) else GREETING_SECONDS_MAX


def usable(said: tuple[str, ...], host: str) -> tuple[str, ...]:
    """The addresses that a dial can be made to, in their order; `host` is put where one names none. What is no address is left out."""
    completed = (f"{_in_brackets(host)}{address}" if address.startswith(":") else address for address in said[:ADDRESSES_MAX])
    return tuple(dict.fromkeys(address for address in completed if _is_address(address)))


def _in_brackets(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_address(address: str) -> bool:
    host, _, port = address.rpartition(":")
    is_port = port.isascii() and port.isdigit() and 0 < int(port[:6]) < 2**16
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    plain = all(character.isalnum() or character in "-._" or (character in ":%" and name != host) for character in name)
    return is_port and bool(name) and name.isascii() and plain and len(address) <= ADDRESS_CHARACTERS_MAX
