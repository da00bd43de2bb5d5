"""What `potluck node run` shows: one line that moves on a terminal, one line a change otherwise.

Decides words and rhythm, and that an agent goes on when nobody can read them any more: answers are under way. It must not know where a
status comes from.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.status import Status

from potluck_node.control import AgentStatus, AttachedLine, EngineLine
from potluck_node.rest_words import reason_words, stage_words

FETCH_STEP_PERCENT: Final = 10
"""Without a terminal, a download is told in steps of this size."""
NAMES_SHOWN_MAX: Final = 10
"""Of one server's models."""


class ProgressLine(AbstractContextManager["ProgressLine"]):
    """Shows one agent's statuses as they come."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Status | None = console.status("starting") if console.is_terminal else None
        self._told: dict[str, str] = {}

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, status: AgentStatus) -> None:
        """Takes the next status; shows no more once standard output takes no more, which others are ended for."""
        with suppress(SystemExit):
            self._show(status)

    def _show(self, status: AgentStatus) -> None:
        self._tell("link", link_words(status))
        if status.rest.rest.reasons:
            self._tell("rest", rest_words(status))
        else:
            self._told.pop("rest", None)
        for engine in status.engines:
            step = engine_words(engine, fetch_step_percent=FETCH_STEP_PERCENT)
            if not (self._live is not None and engine.state == "fetching"):
                self._tell(engine.replica_id, step)
        if self._live is not None:
            parts = [engine_words(engine, fetch_step_percent=1) for engine in status.engines]
            rest = [rest_words(status)] if status.rest.rest.reasons else []
            self._live.update(" · ".join([link_words(status), *rest, *parts]))

    def _tell(self, subject: str, words: str) -> None:
        if self._told.get(subject) != words:
            self._told[subject] = words
            self._console.print(words, markup=False, highlight=False, soft_wrap=True)


def link_words(status: AgentStatus) -> str:
    """The node and its link in a few words."""
    if status.phase == "serving":
        state = {"serving": "linked", "paused": "linked, paused", "draining": "finishing"}.get(status.state, status.state)
        return f"node {status.node_id}: {state}"
    reason = f" ({status.trouble})" if status.trouble else ""
    return f"node {status.node_id}: {'not linked' if status.phase == 'fenced' else 'connecting'}{reason}"


def rest_words(status: AgentStatus) -> str:
    """That the node rests, and why: it says so once for each stage and reason."""
    reasons = "; it ".join(reason_words(reason) for reason in status.rest.rest.reasons)
    return f"{stage_words(status)}: it {reasons}"


def engine_words(engine: EngineLine, *, fetch_step_percent: int) -> str:
    """One replica in a few words; a download's percentage rounded down to the step."""
    match engine.state:
        case "fetching":
            percent = 100 * engine.fetched_bytes // max(1, engine.fetch_total_bytes) // fetch_step_percent * fetch_step_percent
            return f"{engine.model_id}: fetching {percent} % of {engine.fetch_total_bytes / 1e6:.0f} MB"
        case "ready":
            return f"{engine.model_id}: ready, {engine.slot_count} slots"
        case "backing_off" | "refused":
            last_line = engine.failure.strip().splitlines()[-1] if engine.failure.strip() else "no reason given"
            return f"{engine.model_id}: {'refused' if engine.state == 'refused' else 'failed, trying again'}: {last_line}"
        case _:
            return f"{engine.model_id}: {engine.state}"


def attached_words(attached: AttachedLine) -> str:
    """One server of the owner's in a few words."""
    shown, more_count = attached.model_names[:NAMES_SHOWN_MAX], len(attached.model_names) - NAMES_SHOWN_MAX
    models = ", ".join((*shown, *((f"and {more_count} more",) if more_count > 0 else ())))
    what = "; ".join(word for word in (models, attached.trouble) if word) or "it lists no model that can be shared"
    return ": ".join(word for word in (attached.place, attached.kind, what) if word)
