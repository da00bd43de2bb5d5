"""Real requests of one token to suspected and doubted replicas, so that they can show whether they work.

Decides what is asked, how long the answer may take, and that a probe is an attempt like any other but for the money: nobody pays, and
nobody earns a token, so that no replica gains by failing. Each is worded anew, so that no cache answers it, and a death that comes with it
is held against no request. It must not know what a replica is suspected of.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import structlog

from potluck_coordinator.domain.suspicion import Standing
from potluck_coordinator.gateway.openai_request import parse_request
from potluck_coordinator.gateway.relay import Relay
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, AttemptId, Endpoint, ReplicaId, RequestId, StartAttempt

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from potluck_coordinator.domain.placement import ReplicaView
    from potluck_coordinator.gateway.node_session import NodeSession
    from potluck_coordinator.gateway.suspicions import Suspicions
    from potluck_protocol.values import NodeId

_log = structlog.get_logger()

PROBE_SECONDS_MAX: Final = 15.0
"""From its dispatch to its end: a short prompt and one token, on an engine that may have to read its weights anew."""
WINDOW_BYTES: Final = 64 * 1024
NOBODY: Final = AccountId("")
"""Who asks."""


class Probing:
    """The probes of one gateway.

    Args:
        suspicions: says who is to be probed, and hears what came of it.
        changed: called with each node of which a probe has taken a slot.
        finish: gives the slot back.
        now: monotonic seconds.
    """

    def __init__(
        self,
        suspicions: Suspicions,
        changed: Callable[[NodeId], None],
        finish: Callable[[NodeSession, AttemptId, ReplicaId], None],
        now: Callable[[], float],
    ) -> None:
        self._suspicions = suspicions
        self._changed = changed
        self._finish = finish
        self._now = now
        self._running: dict[ReplicaId, asyncio.Task[None]] = {}
        self.attempt_ids: set[AttemptId] = set()
        """Those on their way."""

    def start_due(self, sessions: Collection[NodeSession]) -> None:
        """Probes whoever is to be, can be reached, and is not being probed."""
        due = set(self._suspicions.due()) - self._running.keys()
        if not due:
            return
        for session in sessions:
            for view in session.replica_views():
                if view.replica_id in due and _can_be_probed(session, view) and self._has_room(view):
                    self._start(session, view)

    def _has_room(self, view: ReplicaView) -> bool:
        """One that serves on may have no slot for it: its refusal would show nothing."""
        return view.in_flight_count < view.slot_count or self._suspicions.standing(view.replica_id) is Standing.SUSPECTED

    async def stop(self) -> None:
        """Gives up those on their way."""
        tasks = tuple(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, session: NodeSession, view: ReplicaView) -> None:
        task = asyncio.ensure_future(self._probe(session, view))
        self._running[view.replica_id] = task
        task.add_done_callback(lambda _: self._running.pop(view.replica_id, None))

    async def _probe(self, session: NodeSession, view: ReplicaView) -> None:
        attempt_id = AttemptId(f"probe_{secrets.token_hex(8)}")
        self.attempt_ids.add(attempt_id)
        succeeded = answered = False
        try:
            relay = self._dispatched(session, view, attempt_id)
            async with asyncio.timeout(PROBE_SECONDS_MAX):
                succeeded, answered = await _is_answered(relay), True
        except TimeoutError:
            pass
        except PotluckError as error:
            answered = error.code is ErrorCode.ENGINE_FAILED
        except Exception:  # noqa: BLE001 - whatever it is, it is told
            # A fault of ours counts as a probe that failed: one that counted as none would be due again at every look.
            _log.exception("probe_broke", replica_id=view.replica_id, node_id=view.node_id)
        finally:
            self._finish(session, attempt_id, view.replica_id)
            self.attempt_ids.discard(attempt_id)
        _log.info("replica_probed", replica_id=view.replica_id, node_id=view.node_id, succeeded=succeeded)
        self._suspicions.probed(view.replica_id, succeeded=succeeded, answered=answered)

    def _dispatched(self, session: NodeSession, view: ReplicaView, attempt_id: AttemptId) -> Relay:
        endpoint = view.endpoints[0]
        request = parse_request(endpoint, _body(endpoint, view), RequestId(attempt_id), NOBODY)
        relay = Relay(attempt_id, WINDOW_BYTES, self._now(), session.acknowledge)
        start = StartAttempt(attempt_id, view.replica_id, endpoint, request.body, request.stream, WINDOW_BYTES)
        session.start(start, relay, self._now(), request)
        self._changed(session.node_id)
        return relay


def _can_be_probed(session: NodeSession, view: ReplicaView) -> bool:
    return view.ready and view.link_up and not view.node_paused and not view.leaving and not session.suspect and bool(view.endpoints)


async def _is_answered(relay: Relay) -> bool:
    """Whether the engine gave something, and came to its end."""
    head = await relay.wait_for_head()
    while await relay.next_data() is not None:
        pass
    return head.http_status == HTTPStatus.OK and relay.received_bytes > 0


def _body(endpoint: Endpoint, view: ReplicaView) -> bytes:
    words = f"Say yes. ({secrets.token_hex(4)})"
    asked: dict[str, Any]
    match endpoint:
        case Endpoint.CHAT_COMPLETIONS:
            asked = {"messages": [{"role": "user", "content": words}], "max_tokens": 1, "stream": True}
        case Endpoint.COMPLETIONS:
            asked = {"prompt": words, "max_tokens": 1, "stream": True}
        case Endpoint.EMBEDDINGS:
            asked = {"input": words}
    return json.dumps({"model": view.model_id, **asked}).encode()
