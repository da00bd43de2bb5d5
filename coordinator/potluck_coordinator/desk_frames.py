"""How calls and answers lie on the desk socket: pickles, each with its length and the number of its call before it.

Decides how what comes is cut, and that no frame is larger than either end would hold in memory. It must not know what is called.
"""

from __future__ import annotations

import asyncio
import pickle
import struct
from typing import Any, Final, cast

import structlog

from potluck_protocol.errors import ErrorCode, PotluckError

FRAME_BYTES_MAX: Final = 64 * 1024 * 1024
READ_BYTES: Final = 64 * 1024
"""At one go."""
HEAD: Final = struct.Struct("!IQ")
"""Of a frame: how many bytes follow, and the number of the call, which is known even of a frame that cannot be read."""

_log = structlog.get_logger()


class DeskFrames(asyncio.BufferedProtocol):
    """One end of a connection. What comes is cut into frames, and each is passed on as soon as it is whole."""

    def __init__(self) -> None:
        self._read = memoryview(bytearray(READ_BYTES))
        self._unread = bytearray()
        self._wanted_bytes = HEAD.size

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return self._read

    def buffer_updated(self, nbytes: int) -> None:
        unread = self._unread
        unread += self._read[:nbytes]
        begin = 0
        while len(unread) - begin >= self._wanted_bytes:
            size_bytes, number = HEAD.unpack_from(unread, begin)
            if size_bytes > FRAME_BYTES_MAX:
                self.transport.close()
                return
            content, end = begin + HEAD.size, begin + HEAD.size + size_bytes
            if len(unread) < end:
                self._wanted_bytes = end - begin
                break
            self._wanted_bytes = HEAD.size
            self.frame_received(number, unread[content:end])
            begin = end
        del unread[:begin]

    def frame_received(self, number: int, content: bytearray) -> None:
        """The content of a frame, and the number of its call."""
        raise NotImplementedError

    def send(self, number: int, content: Any) -> None:
        """Sends all of a frame or nothing.

        Raises:
            PotluckError: INTERNAL_ERROR for what does not pickle or is too large.
            ConnectionError: the peer went away. asyncio's own transports keep silent about it, uvloop's raise a RuntimeError.
        """
        if self.transport.is_closing():
            raise ConnectionResetError
        try:
            frame = pickle.dumps(content, pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            _log.exception("desk_frame_not_written", call=number)
            raise PotluckError(ErrorCode.INTERNAL_ERROR) from error
        if len(frame) > FRAME_BYTES_MAX:
            _log.error("desk_frame_too_large", call=number, frame_bytes=len(frame), frame_bytes_max=FRAME_BYTES_MAX)
            raise PotluckError(ErrorCode.INTERNAL_ERROR)
        self.transport.write(HEAD.pack(len(frame), number) + frame)
