"""An agent's life: its parts run until the owner ends it.

Decides what the owner's last words (leave, stop) do to the parts, and in which order things end: no new attempts, those under way finish
within the owner's limit, what is left is handed back, the coordinator hears a goodbye, engines stop. Rest, from which a node comes back, is
`resting`'s. It must not know how the parts are made.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, Final

import structlog

from potluck_node.attempts import Attempts
from potluck_node.control import POLL_SECONDS, AgentStatus, read_control, remove_status, write_status
from potluck_node.domain.session import Phase
from potluck_node.identity_store import StateFolder
from potluck_node.link import Link
from potluck_node.replicas import Replicas
from potluck_node.report import NodeReport
from potluck_node.resting import Resting
from potluck_node.settings import Settings
from potluck_protocol.values import EndReason, GoodbyeReason

LEAVE_LINK_SECONDS: Final = 15.0
"""How long leaving waits for a link that is not up."""
DRAIN_LOOK_SECONDS: Final = 0.05
ENDING: Final = "the node's owner stops it"

_log = structlog.get_logger()


class Agent:
    """A node's parts at work. Made by `agent_of`.

    Args:
        folder: locked by the caller.
        settings: the owner's.
        replicas: the engines.
        attempts: what runs on them.
        chores: what else goes on beside them, by name, each without an end.
        link: to the coordinator.
        report: the node's voice.
        resting: the way between serving and rest.
        show: called every second with what the owner should see.
    """

    def __init__(
        self,
        *,
        folder: StateFolder,
        settings: Settings,
        replicas: Replicas,
        attempts: Attempts,
        chores: Mapping[str, Callable[[], Coroutine[Any, Any, None]]],
        link: Link,
        report: NodeReport,
        resting: Resting,
        show: Callable[[AgentStatus], None],
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._replicas = replicas
        self._attempts = attempts
        self._chores = chores
        self._link = link
        self._report = report
        self._resting = resting
        self._show = show
        resting.changed = self.take_note
        self._wanted_end: GoodbyeReason | None = None
        self._end_wanted = asyncio.Event()
        self._hurry = asyncio.Event()
        self._news = asyncio.Event()
        self._status_written = True

    def stop(self, reason: GoodbyeReason) -> None:
        """Asks for the end; asking again means at once. Who leaves while the agent stops leaves for good."""
        if self._wanted_end is not None:
            self._hurry.set()
        if self._wanted_end is not GoodbyeReason.LEAVING:
            self._wanted_end = reason
        self._end_wanted.set()

    def take_note(self) -> None:
        """The node's stage has changed: coordinator and owner see it at once."""
        self._report.state, self._report.rest_causes = self._resting.state, self._resting.causes
        self._link.report_now()
        self._news.set()

    async def run(self) -> GoodbyeReason | None:
        """Works until `stop`, or until the owner's `leave`; the goodbye that the coordinator heard.

        Raises:
            PotluckError: as `Link.run`.
        """
        parts = [
            asyncio.create_task(self._replicas.run(), name="engines"),
            asyncio.create_task(self._link.run(), name="link"),
            asyncio.create_task(self._watch_owner(), name="owner"),
            *(asyncio.create_task(chore(), name=name) for name, chore in self._chores.items()),
        ]
        ending = asyncio.create_task(self._end_wanted.wait(), name="ending")
        try:
            done, _ = await asyncio.wait({*parts, ending}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                # A part that ends before it was asked to has failed, and its failure is the agent's.
                task.result()
            return await self._end(link=parts[1])
        finally:
            for task in [*parts, ending]:
                task.cancel()
            await asyncio.gather(*parts, ending, self._resting.close(), return_exceptions=True)
            await self._attempts.close()
            remove_status(self._folder.path)

    async def _end(self, link: asyncio.Task[None]) -> GoodbyeReason | None:
        _log.info("stopping", goodbye=self._wanted_end)
        self._resting.leave_off()
        if self._wanted_end is GoodbyeReason.LEAVING:
            await self._until(lambda: self._link.session.phase is Phase.SERVING or link.done(), LEAVE_LINK_SECONDS)
            if link.done():
                link.result()
        await self._until(lambda: not self._attempts.busy, self._settings.drain_seconds)
        self._attempts.end_running(EndReason.HANDED_BACK, ENDING)
        # Read only now: the owner's `leave` may have come during the wait.
        reason = self._wanted_end or GoodbyeReason.STOPPING
        heard = await self._link.say_goodbye(reason)
        _log.info("goodbye_said", goodbye=reason, heard=heard)
        return reason if heard else None

    async def _watch_owner(self) -> None:
        """Reads what the owner wants and writes what there is to see."""
        while True:
            control = read_control(self._folder.path)
            if control.leaving:
                self.stop(GoodbyeReason.LEAVING)
                return
            self._resting.heed(control)
            self._news.clear()
            status = replace(
                self._report.status(self._link.session, self._link.trouble),
                drain_seconds=self._settings.drain_seconds,
                engine_lines_are_kept=self._settings.keep_engine_lines,
                rest=self._resting.line,
            )
            self._write_status(status)
            self._show(status)
            # Not `wait_for`: up to Python 3.11 it loses a cancellation that comes with what it waits for.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._news.wait()

    def _write_status(self, status: AgentStatus) -> None:
        """A full disk costs the owner's view of the node, never the node; it is logged once until it is over."""
        try:
            write_status(self._folder.path, status)
        except OSError as error:
            if self._status_written:
                _log.warning("status_not_written", reason=error.strerror or type(error).__name__)
            self._status_written = False
        else:
            self._status_written = True

    async def _until(self, condition: Callable[[], bool], limit_seconds: float) -> None:
        """Waits for the condition, within the limit and the owner's patience."""
        for _ in range(int(limit_seconds / DRAIN_LOOK_SECONDS)):
            if condition() or self._hurry.is_set():
                return
            await asyncio.sleep(DRAIN_LOOK_SECONDS)
