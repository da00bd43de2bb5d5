"""Where this agent dials its link, over losses and restarts.

Keeps what `domain.gateways` decides, in memory and, once a gateway took the node in, in the state folder, so that an agent that starts anew
knows the gateways that there were. A file that is missing or damaged costs only that knowledge. It must not know frames or channels.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from potluck_node.domain import gateways
from potluck_node.domain.gateways import Ways
from potluck_protocol.clock import Clock
from potluck_protocol.connection import ConnectionDocument
from potluck_protocol.private_files import read_json, write_private

FILE_NAME: Final = "gateways.json"

_log = structlog.get_logger()


class GatewayWays:
    """The ways to the pool's gateways.

    Args:
        folder: the state folder.
        connection: what the coordinator said last of its ports.
        clock: for how long the link is gone.
    """

    def __init__(self, folder: Path, connection: Callable[[], ConnectionDocument], clock: Clock) -> None:
        self._file = folder / FILE_NAME
        self._connection = connection
        self._clock = clock
        self._ways = self._read()
        self._dialled = self._ways.last

    @property
    def target(self) -> str:
        """Where the dial goes that was begun last, or has led to."""
        return self._dialled

    def begin_dial(self) -> None:
        """Chooses the next dial's target, which stays the same until it has come to something, however long that takes."""
        self._dialled = gateways.target(self._ways, self._clock.monotonic_seconds())

    @property
    def greeting_seconds_max(self) -> float:
        """How long the gateway that is dialled has for its welcome."""
        return gateways.greeting_seconds_max(self._ways)

    def delay_seconds(self, jitter: float) -> float:
        """How long to wait before that, beside all other reasons to wait."""
        return gateways.move_delay_seconds(self._ways, self._clock.monotonic_seconds(), jitter)

    def linked(self, said: tuple[str, ...]) -> None:
        """The gateway that was dialled took the node in, or has it, and said where all of them are."""
        connection = self._connection()
        usable = gateways.usable(said, connection.host or "")
        before, self._ways = self._ways, gateways.after_welcome(connection.link_target, self._dialled, usable)
        self._dialled = self._ways.last
        if (before.last, set(before.known)) != (self._ways.last, set(self._ways.known)):
            self._write()

    def lost(self, *, is_let_go: bool) -> None:
        """The link is gone; by the gateway's own goodbye, or not."""
        now = self._clock.monotonic_seconds()
        self._ways = gateways.after_loss(self._ways, now, is_let_go=is_let_go, seed=random.SystemRandom().getrandbits(32))

    def failed(self) -> None:
        """The last dial was in vain."""
        self._ways = gateways.after_failed_dial(self._ways, self._dialled)

    def moved(self) -> None:
        """The connection document has changed: what is dialled comes from there, until a gateway says more."""
        self._ways = Ways(self._connection().link_target)
        self._dialled = self._ways.last

    def _read(self) -> Ways:
        home = self._connection().link_target
        try:
            fields = read_json(self._file)
            addresses = gateways.usable((fields["last"], *fields["known"]), "")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            addresses = ()
        return gateways.after_welcome(home, home, addresses)

    def _write(self) -> None:
        fields = {"last": self._ways.last, "known": list(self._ways.known)}
        try:
            write_private(self._file, json.dumps(fields, indent=1).encode(), durable=False)
        except OSError as error:
            _log.error("state_folder_not_written", folder=str(self._file.parent), reason=error.strerror)
