"""What the node says of itself, to its coordinator and to its owner.

Decides the words: state, disk left, and engines with the slots really taken, under the owner's limit and no more of them than a frame may
name. It must not know how either listener is reached: `link` carries it to the coordinator, `control` to the owner.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

from potluck_node.attached_servers import AttachedServers
from potluck_node.attempts import Attempts
from potluck_node.control import AgentStatus, EngineLine
from potluck_node.credentials import Credentials
from potluck_node.domain.session import Session, lease_left_seconds
from potluck_node.engines.base import FAILURE_CHARACTERS_MAX
from potluck_node.heat import Heat
from potluck_node.line_watch import LineWatch
from potluck_node.peer_measurement import PeerMeasuring
from potluck_node.readings import Readings
from potluck_node.replicas import Replicas
from potluck_protocol.clock import Clock
from potluck_protocol.rest import RestCause
from potluck_protocol.values import AttemptId, EngineStatus, Heartbeat, Hello, Inventory, NodeState, SessionId
from potluck_protocol.version import PROTOCOL_VERSION, package_version

ENGINES_MAX: Final = 64
"""How many replicas a hello or heartbeat names, whatever was wished."""


class SelfReport(Protocol):
    """What the link asks for."""

    def hello(self, in_flight: tuple[AttemptId, ...]) -> Hello: ...
    def heartbeat(self) -> Heartbeat: ...


class NodeReport:
    """The node's voice; `state` is set by whoever decides it.

    Args:
        credentials: who the node is.
        session_id: one per run of the agent.
        inventory: what the node has, probed once at start.
        replicas: the engines.
        attempts: what runs on them.
        readings: of engines.
        heat: of the cards, and what is left of replicas for it.
        peers: what was measured towards other nodes of the site.
        line: what was measured towards the coordinator.
        attached: the owner's own engines.
        cache_dir: where model files lie; its disk is the one reported.
        slot_count_max: the owner's limit for one engine.
        clock: time.
    """

    def __init__(
        self,
        *,
        credentials: Credentials,
        session_id: SessionId,
        inventory: Inventory,
        replicas: Replicas,
        attempts: Attempts,
        readings: Readings,
        heat: Heat,
        peers: PeerMeasuring,
        line: LineWatch,
        attached: AttachedServers,
        cache_dir: Path,
        slot_count_max: int | None,
        clock: Clock,
    ) -> None:
        self._credentials = credentials
        self._session_id = session_id
        self._inventory = inventory
        self._replicas = replicas
        self._attempts = attempts
        self._readings = readings
        self._heat = heat
        self._peers = peers
        self._line = line
        self._attached = attached
        self._cache_dir = cache_dir
        self._slot_count_max = slot_count_max
        self._clock = clock
        self.state = NodeState.SERVING
        self.rest_causes: tuple[RestCause, ...] = ()
        self._beat_count = 0

    def hello(self, in_flight: tuple[AttemptId, ...]) -> Hello:
        return Hello(
            protocol_version=PROTOCOL_VERSION,
            node_id=self._credentials.identity.node_id,
            session_id=self._session_id,
            agent_version=package_version(),
            inventory=replace(
                self._inventory,
                disk_free_bytes=self._disk_free_bytes(),
                attached_model_names=self._attached.model_names,
                line=self._line.found,
            ),
            state=self.state,
            in_flight=in_flight,
            engines=self.engines(),
            cards=self._heat.cards(),
            rest_causes=self.rest_causes,
        )

    def heartbeat(self) -> Heartbeat:
        self._beat_count += 1
        return Heartbeat(
            number=self._beat_count,
            progress_count=self._attempts.progress_count,
            state=self.state,
            engines=self.engines(),
            disk_free_bytes=self._disk_free_bytes(),
            cards=self._heat.cards(),
            peer_measurements=self._peers.measurements(),
            line=self._line.found,
            rest_causes=self.rest_causes,
        )

    def engines(self) -> tuple[EngineStatus, ...]:
        """The replicas with the slots that attempts take, under the owner's limit, and what is read off them; ENGINES_MAX at most."""
        return tuple(self._as_seen(status) for status in self._replicas.statuses()[:ENGINES_MAX])

    def status(self, session: Session, trouble: str) -> AgentStatus:
        """What the owner's commands show."""
        engines = self.engines()
        return AgentStatus(
            pid=os.getpid(),
            node_id=self._credentials.identity.node_id,
            phase=session.phase,
            state=self.state,
            epoch=session.epoch,
            lease_left_seconds=round(lease_left_seconds(session, self._clock.monotonic_seconds()), 1),
            attempt_count=sum(engine.running_count for engine in engines),
            progress_count=self._attempts.progress_count,
            certificate_valid_until_unix_ms=self._credentials.valid_until_unix_ms,
            updated_at_unix_ms=self._clock.unix_ms(),
            trouble=trouble,
            engines=tuple(_line(engine) for engine in engines),
            card_uuids=tuple(sorted(self._replicas.cards_given())),
            attached=self._attached.lines,
            cards=self._heat.lines(),
            cap_refusal=self._heat.cap_refusal,
            serving_card_uuids=self._serving_card_uuids(engines),
        )

    def _as_seen(self, status: EngineStatus) -> EngineStatus:
        limit, load = self._slot_count_max, self._readings.load(status.replica_id)
        rates = self._attempts.watches.solo.rates(status.replica_id)
        prefill, decode = (average.told if average else None for average in (rates.prefill, rates.decode))
        return replace(
            status,
            slot_count=self._heat.slots(status.replica_id, status.slot_count if limit is None else min(limit, status.slot_count)),
            running_count=self._attempts.running_count(status.replica_id),
            failure=status.failure[-FAILURE_CHARACTERS_MAX:],
            kv_capacity_tokens=load.kv_capacity_tokens,
            kv_used_tokens=load.kv_used_tokens,
            waiting_count=load.waiting_count,
            memory_bytes=self._readings.memory_bytes(status.replica_id),
            prefill_tokens_per_second=prefill.tokens_per_second if prefill else None,
            prefill_past_tokens=round(prefill.past_tokens) if prefill else 0,
            decode_tokens_per_second=decode.tokens_per_second if decode else None,
            decode_past_tokens=round(decode.past_tokens) if decode else 0,
            prefix_queried_tokens=load.prefix_queried_tokens,
            prefix_hit_tokens=load.prefix_hit_tokens,
        )

    def _serving_card_uuids(self, engines: tuple[EngineStatus, ...]) -> tuple[str, ...]:
        residences = (self._replicas.residence(engine.replica_id) for engine in engines)
        return tuple(sorted({uuid for residence in residences if residence is not None for uuid in residence.card_uuids}))

    def _disk_free_bytes(self) -> int:
        try:
            return shutil.disk_usage(self._cache_dir).free
        except OSError:
            return 0


def _line(engine: EngineStatus) -> EngineLine:
    return EngineLine(
        replica_id=engine.replica_id,
        model_id=engine.model_id,
        state=engine.state,
        engine_kind=engine.engine_kind,
        slot_count=engine.slot_count,
        running_count=engine.running_count,
        fetched_bytes=engine.fetched_bytes,
        fetch_total_bytes=engine.fetch_total_bytes,
        failure=engine.failure,
        failure_kind=engine.failure_kind or "",
    )
