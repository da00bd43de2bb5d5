"""One engine subprocess: started, ready after a real answer, failed with a reason.

Decides when an engine counts as ready and how its failure reads; `domain.failures` says what kind of failure it is. It is run as a
`child_process`. It must not know why it runs or what happens after it fails: that is the plan's business.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import aiohttp

from potluck_node.bounded_body import read_at_most
from potluck_node.child_process import ChildProcess
from potluck_node.domain.attached import BUSY_STATUSES
from potluck_node.domain.failures import Shortage, diagnose
from potluck_node.domain.model_source import ATTACHED_KIND
from potluck_node.engines import last_lines
from potluck_node.engines.base import FAILURE_CHARACTERS_MAX, Engine, EngineAddress, EngineLaunch, EngineProbe
from potluck_node.engines.shared_memory import free_what_the_dead_left
from potluck_node.engines.stage_count import counted_bytes
from potluck_node.probe import kernel_kills
from potluck_node.probe.kernel_kills import KernelKills
from potluck_protocol.values import FailureKind

START_LIMIT_SECONDS: Final = 900.0
"""For loading the model; a large one comes from a slow disk."""
ENDING_LIMIT_SECONDS: Final = 5.0
"""For a process that closed its stdout to end."""
FAILURE_LINES: Final = 12
TOKEN_BYTES_MAX: Final = 1024 * 1024
"""Of an answer of one token, with whatever the engine says beside it. An attached one may send without an end."""

_PASSED_VARIABLES: Final = (
    *("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "XDG_CACHE_HOME"),
    "TORCHINDUCTOR_CACHE_DIR",
)
_PASSED_PREFIXES: Final = ("LC_", "CUDA_", "NVIDIA_", "GGML_", "OMP_")


class EngineFailedError(Exception):
    """An engine that did not start, did not answer, or ended; its text is for people.

    Attributes:
        kind: for whoever decides what to do about it.
        shortage: of what there was too little, where it ran out of memory.
        free_percent: of a card, where others hold the rest and its engine said how much.
    """

    def __init__(
        self,
        text: str,
        kind: FailureKind = FailureKind.NOT_STARTED,
        shortage: Shortage | None = None,
        free_percent: int | None = None,
    ) -> None:
        super().__init__(text)
        self.kind = kind
        self.shortage = shortage
        self.free_percent = free_percent


def engine_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What an engine sees of the agent's environment: no secrets of ours, and no leave to fetch anything."""
    passed = {name: value for name, value in environment.items() if name in _PASSED_VARIABLES or name.startswith(_PASSED_PREFIXES)}
    return {**passed, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


class EngineProcess:
    """One run of one engine. `start` makes one that has answered.

    Args:
        child: its process.
        kind: of engine.
        lines_folder: where its last lines are kept should it fail while it serves; None: nowhere.
    """

    def __init__(self, child: ChildProcess, kind: str = "engine", lines_folder: Path | None = None) -> None:
        self._child = child
        self._kind = kind
        self._lines_folder = lines_folder
        self._draining: asyncio.Task[None] | None = None
        self._condemned: asyncio.Future[EngineFailedError] = asyncio.get_running_loop().create_future()
        self._kills = KernelKills()
        self._looking = asyncio.create_task(self._look_at_kills())
        self.address = EngineAddress("")
        self._stage_counts: Path | None = None

    @classmethod
    async def start(
        cls,
        engine: Engine,
        launch: EngineLaunch,
        environment: Mapping[str, str],
        session: aiohttp.ClientSession,
        lines_folder: Path | None = None,
    ) -> EngineProcess:
        """Spawns the engine and waits until it has answered with a token.

        Raises:
            EngineFailedError: with the last lines of stderr; nothing of the engine is left.
        """
        try:
            child = ChildProcess.spawn(engine.arguments(launch), engine_environment(environment) | engine.variables)
        except OSError as error:
            raise EngineFailedError(f"the engine {engine.kind} could not be started: {error}") from error
        process = cls(child, engine.kind, lines_folder)
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

    @property
    def weight_bytes(self) -> int | None:
        """What a group's stage has loaded, as far as its workers have counted it; None where they did not. A cheap read."""
        return counted_bytes(self._stage_counts) if self._stage_counts is not None else None

    async def wait(self) -> EngineFailedError:
        """Waits for the engine's end, or for it to be condemned; what happened, to be told and not raised.

        Never its last lines: once it serves, an engine may quote requests in them. They are kept for the owner alone, if he wants them.
        """
        waiting = asyncio.ensure_future(self._child.wait())
        try:
            await asyncio.wait((waiting, self._condemned), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if self._lines_folder is not None:
            await asyncio.to_thread(last_lines.keep, self._lines_folder, self._kind, self._child.stderr.text())
        if self._condemned.done():
            return self._condemned.result()
        ending = waiting.result()
        told = diagnose(ending, self._lines(), served=True, memory_was_reclaimed=self._memory_was_reclaimed())
        what = f"the engine ended: {ending or 'exit status 0'}"
        return EngineFailedError(
            f"{what}; its last lines speak of {told.words}" if told.words else what, told.kind, told.shortage, told.free_percent
        )

    def condemn(self, why: str) -> None:
        """It lives and is of no use any more: `wait` ends with this, and `stop` will not ask it first."""
        if not self._condemned.done():
            self._condemned.set_result(EngineFailedError(why, FailureKind.HUNG))

    async def stop(self) -> None:
        """Stops the engine and everything it started, within a bound."""
        self._looking.cancel()
        await (self._child.kill() if self._condemned.done() else self._child.stop())
        # Where its launcher was killed with the rest, what the engine shared in memory would stay until the next start.
        await asyncio.to_thread(free_what_the_dead_left)
        if self._draining is not None:
            self._draining.cancel()

    async def _become_ready(self, engine: Engine, launch: EngineLaunch, session: aiohttp.ClientSession) -> None:
        try:
            # Not `wait_for`: up to Python 3.11 it loses a cancellation that comes with what it waits for.
            async with asyncio.timeout(START_LIMIT_SECONDS):
                line = await self._child.first_line()
        except TimeoutError as error:
            raise self._failure(f"the engine did not start within {START_LIMIT_SECONDS:.0f} s") from error
        if not line:
            ending = await self._ending()
            raise self._failure(f"the engine did not start: {ending or 'it closed its stdout and went on'}", ending)
        self.address = self._announced(line, leads=launch.group is None or launch.group.rank == 0)
        self._draining = asyncio.create_task(self._child.drain_stdout())
        if not self.address.url:
            return
        probe = engine.probe(launch)
        try:
            status, answer = await ask(session, self.address, probe, probe.limit_seconds)
        except TimeoutError as error:
            self.condemn(f"the engine did not answer its first request within {probe.limit_seconds:.0f} s")
            raise self._failure(str(self._condemned.result()), otherwise=FailureKind.HUNG) from error
        except aiohttp.ClientError as error:
            ending = await self._ending()
            what = f"the engine did not answer its first request: {ending or type(error).__name__}"
            raise self._failure(what, ending) from error
        if engine.kind == ATTACHED_KIND and status in BUSY_STATUSES:
            what = f"the attached server is too busy for a first answer, or still loads its model (HTTP status {status})"
            raise self._failure(what, otherwise=FailureKind.HUNG)
        if status != 200 or not has_token(answer):
            raise self._failure(f"the engine's first answer had no token (HTTP status {status})")

    async def _ending(self) -> str:
        """How it ended; empty if it goes on for longer than the limit."""
        try:
            async with asyncio.timeout(ENDING_LIMIT_SECONDS):
                return await self._child.wait() or "exit status 0"
        except TimeoutError:
            return ""

    def _announced(self, line: bytes, *, leads: bool) -> EngineAddress:
        try:
            words = json.loads(line)
            url, api_key = str(words["url"]), str(words.get("api_key", ""))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._failure("the engine's first line on stdout is not its URL") from error
        counts = words.get("stage_counts")
        self._stage_counts = Path(counts) if isinstance(counts, str) else None
        if not url and not leads:
            # A stage behind the leader's: it stands, and the first token, which goes through it, is the leader's to ask for.
            return EngineAddress("")
        if urlsplit(url).hostname != "127.0.0.1":
            raise self._failure(f"the engine listens at {url}, not on loopback only")
        return EngineAddress(url, api_key)

    def _failure(self, what: str, ending: str = "", otherwise: FailureKind = FailureKind.NOT_STARTED) -> EngineFailedError:
        """Of an engine that has not served: with its last lines, and the one that says why, should that stand further up."""
        told = diagnose(ending, self._lines(), served=False, memory_was_reclaimed=self._memory_was_reclaimed())
        tail = self._child.stderr.text(FAILURE_LINES)
        if told.line and told.line not in tail:
            what = f"{what}\n{told.line}"
        # The end of a traceback says what went wrong; its start only where.
        left_characters = max(1, FAILURE_CHARACTERS_MAX - len(what) - 1)
        kind = otherwise if told.kind is FailureKind.NOT_STARTED else told.kind
        return EngineFailedError(f"{what}\n{tail[-left_characters:]}" if tail else what, kind, told.shortage, told.free_percent)

    def _lines(self) -> list[str]:
        return self._child.stderr.text().splitlines()

    def _memory_was_reclaimed(self) -> bool:
        if self._kind == ATTACHED_KIND:
            # What it stands for has the memory, is its owner's, and can be given no less.
            return False
        return self._kills.came_lately()

    async def _look_at_kills(self) -> None:
        while True:
            await asyncio.sleep(kernel_kills.LOOK_SECONDS)
            self._kills.look()


async def ask(session: aiohttp.ClientSession, address: EngineAddress, probe: EngineProbe, limit_seconds: float) -> tuple[int, bytes]:
    """Asks an engine for its one token: HTTP status, and body up to a bound; raises aiohttp.ClientError, or TimeoutError after the limit.

    No redirection is followed: it may lead anywhere, and the token would be somebody else's.
    """
    url, limit = address.url + probe.endpoint.value, aiohttp.ClientTimeout(total=limit_seconds)
    async with session.post(url, data=probe.body, headers=address.headers, timeout=limit, allow_redirects=False) as response:
        return response.status, await read_at_most(response.content, TOKEN_BYTES_MAX)


def has_token(answer: bytes) -> bool:
    """Whether an unstreamed answer counts at least one token of its own."""
    try:
        return int(json.loads(answer)["usage"]["completion_tokens"]) >= 1
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False
