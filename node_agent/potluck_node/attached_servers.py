"""Asks the owner's own engines on loopback which models they serve.

Decides when they are asked, and that one that does not answer serves nothing, unless it still listens, or says that it cannot answer just
now: then it is busy, and serves what it did. It asks, and asks nothing that changes anything: an attached engine is never started, stopped
or configured. It must not know the link; whoever wants to hear of a change is called.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import structlog
from aiohttp import ClientError, ClientSession, ClientTimeout, DummyCookieJar

from potluck_node.bounded_body import read_at_most
from potluck_node.control import AttachedLine
from potluck_node.domain.attached import (
    MODELS_PATH,
    NAMES_MAX,
    RECOGNITION_PATHS,
    Answer,
    AttachedServer,
    is_conclusive,
    is_only_busy,
    model_names,
    recognised,
)
from potluck_node.engines.base import EngineAddress

LOOK_SECONDS: Final = 10.0
ANSWER_LIMIT_SECONDS: Final = 3.0
CONNECT_LIMIT_SECONDS: Final = 5.0
ANSWER_BYTES_MAX: Final = 4 * 1024 * 1024
KEY_CHARACTERS_MAX: Final = 4096

_log = structlog.get_logger()


def headers_of(server: AttachedServer) -> dict[str, str]:
    """What a request to the server carries; raises OSError or ValueError where its key file cannot be read."""
    return address_of(server).headers


def address_of(server: AttachedServer) -> EngineAddress:
    """Where the server answers, and with which key; raises OSError or ValueError where its key file cannot be read."""
    try:
        key = Path(server.key_file).expanduser().read_text().strip() if server.key_file else ""
    except RuntimeError as error:  # of a user that is none
        raise ValueError(str(error)) from None
    if len(key) > KEY_CHARACTERS_MAX or not key.isprintable():
        raise ValueError(f"{server.key_file} holds no key")
    return EngineAddress(server.url, key)


async def ask(http: ClientSession, server: AttachedServer, path: str) -> Answer | None:
    """One GET; None where the server does not answer, or not in time."""
    try:
        limit = ClientTimeout(total=ANSWER_LIMIT_SECONDS)
        headers = headers_of(server) | {"accept-encoding": "identity"}
        async with http.get(server.url + path, headers=headers, timeout=limit, allow_redirects=False) as response:
            content = await read_at_most(response.content, ANSWER_BYTES_MAX)
            return Answer(response.status, _decoded(content), response.headers.get("server", ""))
    except (ClientError, OSError, ValueError, TimeoutError):
        return None


async def listens(server: AttachedServer) -> bool:
    """Whether it takes connections, or is too busy for that."""
    host, _, port = server.place.rpartition(":")
    try:
        # Not `wait_for`: up to Python 3.11 it loses a cancellation that comes with what it waits for.
        async with asyncio.timeout(CONNECT_LIMIT_SECONDS):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except TimeoutError:
        return True
    except OSError:
        return False
    writer.close()
    return True


async def words_of(http: ClientSession, server: AttachedServer, models: Answer) -> dict[str, Answer]:
    """What a server that listed its models says of itself, by path."""
    answers = {MODELS_PATH: models}
    for path in RECOGNITION_PATHS:
        answer = await ask(http, server, path)
        if answer is not None:
            answers[path] = answer
    return answers


@dataclass(frozen=True, slots=True)
class _Seen:
    names: tuple[str, ...] = ()
    kind: str = ""
    """Which software it is; empty while it does not answer."""
    is_conclusive: bool = False
    """Whether it need not be asked for that again."""
    trouble: str = ""


class AttachedServers:
    """The owner's servers, as they were at the last look.

    Args:
        servers: where they are.
    """

    def __init__(self, servers: Sequence[AttachedServer]) -> None:
        self.servers = tuple(servers)
        self._seen: dict[AttachedServer, _Seen] = {}

    @property
    def model_names(self) -> tuple[str, ...]:
        """What they serve, all together."""
        return tuple(sorted({name for seen in self._seen.values() for name in seen.names}))[:NAMES_MAX]

    @property
    def kinds(self) -> str:
        """Which software answers, for people."""
        return ", ".join(sorted({seen.kind for seen in self._seen.values() if seen.kind}))

    @property
    def lines(self) -> tuple[AttachedLine, ...]:
        """Each of them, for the owner."""
        seen = ((server.place, self._seen.get(server, _Seen(trouble="not looked for yet"))) for server in self.servers)
        return tuple(AttachedLine(place, each.kind, each.names, each.trouble) for place, each in seen)

    @asynccontextmanager
    async def watched(self, on_change: Callable[[], None]) -> AsyncIterator[None]:
        """Looks now, and then again and again while the block runs; calls back when the names are others than at the look before."""
        if not self.servers:
            yield
            return
        # What comes packed, unasked, may be any size unpacked.
        async with ClientSession(trust_env=False, cookie_jar=DummyCookieJar(), auto_decompress=False) as http:
            await self._look(http)
            watching = asyncio.create_task(self._watch(http, on_change), name="attached servers")
            try:
                yield
            finally:
                watching.cancel()
                await asyncio.wait({watching})

    async def _watch(self, http: ClientSession, on_change: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            before = self.model_names
            await self._look(http)
            if self.model_names != before:
                on_change()

    async def _look(self, http: ClientSession) -> None:
        await asyncio.gather(*(self._look_at(http, server) for server in self.servers))

    async def _look_at(self, http: ClientSession, server: AttachedServer) -> None:
        before = self._seen.get(server)
        try:
            seen = await _seen_now(http, server, before)
        except Exception as error:  # noqa: BLE001 - what one server says must end neither the agent nor the looks at the others
            seen = _Seen(trouble=f"what it answers cannot be read: {type(error).__name__}")
        if seen != before:
            _log.info("attached_server", place=server.place, kind=seen.kind, models=seen.names[:10], trouble=seen.trouble)
        self._seen[server] = seen


async def _seen_now(http: ClientSession, server: AttachedServer, before: _Seen | None) -> _Seen:
    models = await ask(http, server, MODELS_PATH)
    if before is not None and before.names and (await listens(server) if models is None else is_only_busy(models)):
        # Some list nothing while they are at work, their owner's too.
        return replace(before, trouble="it listens, and does not answer just now" if models is None else _trouble(server, models))
    if models is None or models.status != 200:
        return _Seen(trouble=_trouble(server, models))
    if before is not None and before.is_conclusive:
        return replace(before, names=model_names(models), trouble="")
    words = await words_of(http, server, models)
    return _Seen(model_names(models), recognised(words), is_conclusive(words))


def _trouble(server: AttachedServer, models: Answer | None) -> str:
    if models is not None:
        return f"HTTP status {models.status} for {MODELS_PATH}"
    try:
        headers_of(server)
    except (OSError, ValueError):
        return f"its key cannot be read from {server.key_file}"
    return "no answer"


def _decoded(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
