"""One engine subprocess: started, ready after a real answer, failed with a reason.

Decides when an engine counts as ready and how its failure reads. It is run as a `child_process`. It must not know why it runs or what
happens after it fails: that is the plan's business.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

import aiohttp

from potluck_node.child_process import ChildProcess
from potluck_node.engines.base import FAILURE_CHARACTERS_MAX, Engine, EngineAddress, EngineLaunch

START_LIMIT_SECONDS: Final = 900.0
"""For loading the model; a large one comes from a slow disk."""
PROBE_LIMIT_SECONDS: Final = 120.0
"""For the first token; some engines compile for their first answer."""
ENDING_LIMIT_SECONDS: Final = 5.0
"""For a process that closed its stdout to end."""
FAILURE_LINES: Final = 12
KNOWN_CAUSES: Final = (
    "CUDA error",
    "out of memory",
    "bad_alloc",
    "MemoryError",
    "GGML_ASSERT",
    "Segmentation fault",
    "No space left",
    "says nothing any more",
)

_PASSED_VARIABLES: Final = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "XDG_CACHE_HOME")
_PASSED_PREFIXES: Final = ("LC_", "CUDA_", "NVIDIA_", "GGML_", "OMP_")


class EngineFailedError(Exception):
    """An engine that did not start, did not answer, or ended; its text is for people."""


def engine_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What an engine sees of the agent's environment: no secrets of ours, and no leave to fetch anything."""
    passed = {name: value for name, value in environment.items() if name in _PASSED_VARIABLES or name.startswith(_PASSED_PREFIXES)}
    return {**passed, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


class EngineProcess:
    """One run of one engine. `start` makes one that has answered."""

    def __init__(self, child: ChildProcess) -> None:
        self._child = child
        self._draining: asyncio.Task[None] | None = None
        self.address = EngineAddress("")

    @classmethod
    async def start(
        cls, engine: Engine, launch: EngineLaunch, environment: Mapping[str, str], session: aiohttp.ClientSession
    ) -> EngineProcess:
        """Spawns the engine and waits until it has answered with a token.

        Raises:
            EngineFailedError: with the last lines of stderr; nothing of the engine is left.
        """
        try:
            child = await ChildProcess.spawn(engine.arguments(launch), engine_environment(environment))
        except OSError as error:
            raise EngineFailedError(f"the engine {engine.kind} could not be started: {error}") from error
        process = cls(child)
        try:
            await process._become_ready(engine, launch, session)
        except BaseException:
            await process.stop()
            raise
        return process

    @property
    def pid(self) -> int:
        """The engine's process id."""
        return self._child.pid

    async def wait(self) -> str:
        """Waits for the engine's end; what happened. Never its last lines: once it serves, an engine may quote requests in them."""
        what = f"the engine ended: {await self._child.wait() or 'exit status 0'}"
        tail = self._child.stderr.text()
        causes = [cause for cause in KNOWN_CAUSES if cause in tail]
        return f"{what}; its last lines speak of {', '.join(causes)}" if causes else what

    async def stop(self) -> None:
        """Stops the engine and everything it started, within a bound."""
        await self._child.stop()
        if self._draining is not None:
            self._draining.cancel()

    async def _become_ready(self, engine: Engine, launch: EngineLaunch, session: aiohttp.ClientSession) -> None:
        try:
            line = await asyncio.wait_for(self._child.first_line(), START_LIMIT_SECONDS)
        except TimeoutError as error:
            raise EngineFailedError(self._failure(f"the engine did not start within {START_LIMIT_SECONDS:.0f} s")) from error
        if not line:
            raise EngineFailedError(self._failure(f"the engine did not start: {await self._ending()}"))
        self.address = self._announced(line)
        self._draining = asyncio.create_task(self._child.drain_stdout())
        probe = engine.probe(launch)
        try:
            limit = aiohttp.ClientTimeout(total=PROBE_LIMIT_SECONDS)
            url = self.address.url + probe.endpoint.value
            async with session.post(url, data=probe.body, headers=self.address.headers, timeout=limit) as response:
                answer = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineFailedError(self._failure(f"the engine did not answer its first request: {type(error).__name__}")) from error
        if response.status != 200 or not _has_token(answer):
            raise EngineFailedError(self._failure(f"the engine's first answer had no token (HTTP status {response.status})"))

    async def _ending(self) -> str:
        try:
            return await asyncio.wait_for(self._child.wait(), ENDING_LIMIT_SECONDS) or "exit status 0"
        except TimeoutError:
            return "it closed its stdout and went on"

    def _announced(self, line: bytes) -> EngineAddress:
        try:
            words = json.loads(line)
            url, api_key = str(words["url"]), str(words.get("api_key", ""))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineFailedError(self._failure("the engine's first line on stdout is not its URL")) from error
        if urlsplit(url).hostname != "127.0.0.1":
            raise EngineFailedError(self._failure(f"the engine listens at {url}, not on loopback only"))
        return EngineAddress(url, api_key)

    def _failure(self, what: str) -> str:
        tail = self._child.stderr.text(FAILURE_LINES)
        # The end of a traceback says what went wrong; its start only where.
        left_characters = max(1, FAILURE_CHARACTERS_MAX - len(what) - 1)
        return f"{what}\n{tail[-left_characters:]}" if tail else what


def _has_token(answer: bytes) -> bool:
    try:
        return int(json.loads(answer)["usage"]["completion_tokens"]) >= 1
    except (ValueError, KeyError, TypeError):
        return False
