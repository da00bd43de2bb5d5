"""Asks the owner's own engines on loopback which models they serve.

Decides when they are asked, and that one that does not answer serves nothing. It asks, and asks nothing that changes anything: an attached
engine is never started, stopped or configured. It must not know the link; whoever wants to hear of a change is called.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog
from aiohttp import ClientError, ClientSession, ClientTimeout, DummyCookieJar

from potluck_node.domain.attached import (
    MODELS_PATH,
    NAMES_MAX,
    RECOGNITION_PATHS,
    Answer,
    AttachedServer,
    model_names,
    recognised,
)

LOOK_SECONDS: Final = 30.0
ANSWER_LIMIT_SECONDS: Final = 3.0
ANSWER_BYTES_MAX: Final = 4 * 1024 * 1024
KEY_CHARACTERS_MAX: Final = 4096

_log = structlog.get_logger()


def headers_of(server: AttachedServer) -> dict[str, str]:
    """What a request to the server carries; raises OSError or ValueError where its key file cannot be read."""
    key = Path(server.key_file).expanduser().read_text().strip() if server.key_file else ""
    if len(key) > KEY_CHARACTERS_MAX or not key.isprintable():
        raise ValueError(f"{server.key_file} holds no key")
    return {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}


async def ask(http: ClientSession, server: AttachedServer, path: str) -> Answer | None:
    """One GET; None where the server does not answer, or not in time."""
    try:
        limit = ClientTimeout(total=ANSWER_LIMIT_SECONDS)
        async with http.get(server.url + path, headers=headers_of(server), timeout=limit, allow_redirects=False) as response:
            content = await response.content.read(ANSWER_BYTES_MAX)
            while len(content) < ANSWER_BYTES_MAX and (piece := await response.content.read(ANSWER_BYTES_MAX - len(content))):
                content += piece
            return Answer(response.status, _decoded(content), response.headers.get("server", ""))
    except (ClientError, OSError, ValueError, TimeoutError):
        return None


@dataclass(frozen=True, slots=True)
class _Seen:
    names: tuple[str, ...] = ()
    kind: str = ""
    """Which software it is; empty while it does not answer."""
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

    @asynccontextmanager
    async def watched(self, on_change: Callable[[], None]) -> AsyncIterator[None]:
        """Looks now, and then again and again while the block runs; calls back when the names are others than at the look before."""
        if not self.servers:
            yield
            return
        async with ClientSession(trust_env=False, cookie_jar=DummyCookieJar()) as http:
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
        before, models = self._seen.get(server), await ask(http, server, MODELS_PATH)
        if models is None or models.status != 200:
            seen = _Seen(trouble=f"HTTP status {models.status}" if models else "no answer")
        else:
            kind = before.kind if before and before.kind else await self._recognise(http, server, models)
            seen = _Seen(model_names(models), kind)
        if seen != before:
            _log.info("attached_server", place=server.place, kind=seen.kind, models=seen.names[:10], trouble=seen.trouble)
        self._seen[server] = seen

    async def _recognise(self, http: ClientSession, server: AttachedServer, models: Answer) -> str:
        answers = {MODELS_PATH: models}
        for path in RECOGNITION_PATHS:
            answer = await ask(http, server, path)
            if answer is not None:
                answers[path] = answer
        return recognised(answers)


def _decoded(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
