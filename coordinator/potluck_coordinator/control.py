"""How an operator's command talks to the coordinator that runs on this machine: one line of JSON asks, lines of JSON answer as it goes on.

Decides what such a conversation looks like, and that only this user's processes have one: the socket file lies in the run's private folder,
which `endpoints.json` names. It must not know what is asked for.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import structlog

from potluck_protocol.errors import ErrorCode, PotluckError

LINE_BYTES_MAX: Final = 64 * 1024
CLIENTS_MAX: Final = 1
"""At a time: two restarts at once would leave nobody serving."""
LINE_SECONDS_MAX: Final = 5.0
"""For a line to come, or to be taken: whoever says nothing, or stands still, keeps nobody else from asking."""

_log = structlog.get_logger()

Answer = Callable[[Mapping[str, Any]], Iterator[Mapping[str, Any]]]


class Control:
    """The coordinator's end, in a thread of its own.

    Args:
        path: of the socket file.
        answer: gets what was asked, and gives line after line. Its PotluckError ends the conversation, and is told.
    """

    def __init__(self, path: Path, answer: Answer) -> None:
        self._answer = answer
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        path.chmod(0o600)
        self._socket.listen(CLIENTS_MAX)
        threading.Thread(target=self._serve, name="control", daemon=True).start()

    def stop(self) -> None:
        """Listens no more; a conversation that is going on ends with the process."""
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            connection.settimeout(LINE_SECONDS_MAX)
            with connection, contextlib.suppress(OSError, ValueError, RecursionError), connection.makefile("rwb") as stream:
                asked = json.loads(stream.readline(LINE_BYTES_MAX))
                for line in self._lines(asked):
                    # Whoever asked may have gone; what was begun goes on to its end.
                    with contextlib.suppress(OSError):
                        stream.write(json.dumps(line).encode() + b"\n")
                        stream.flush()

    def _lines(self, asked: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        try:
            yield from self._answer(asked)
        except PotluckError as error:
            yield {"error": {"code": error.code, "message": error.message}}
        except Exception:  # noqa: BLE001 - the log says why, and the coordinator goes on
            _log.exception("control_failed")
            yield {"error": {"code": ErrorCode.INTERNAL_ERROR, "message": "It failed inside the coordinator; its log says why."}}
        else:
            yield {"done": True}


def ask(path: Path, asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the coordinator behind the socket answers, as it comes.

    Raises:
        PotluckError: what it refuses; COORDINATOR_UNAVAILABLE where none answers, or one that ends in the middle.
    """
    gone = PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, "The coordinator went away in the middle; see its log.")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
        try:
            connection.connect(str(path))
        except OSError as error:
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, f"No coordinator answers at {path}: {error.strerror}.") from error
        try:
            with connection.makefile("rwb") as stream:
                stream.write(json.dumps(asked).encode() + b"\n")
                stream.flush()
                for line in stream:
                    told = json.loads(line)
                    if "error" in told:
                        raise PotluckError(ErrorCode(told["error"]["code"]), told["error"]["message"])
                    if told.get("done"):
                        return
                    yield told
        except (OSError, ValueError) as error:
            raise gone from error
    raise gone
