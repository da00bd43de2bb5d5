"""What a frame of the coordinator asks of attempts, engines and the measuring of peers.

Decides the order in which a frame's parts are carried out, that an older wish never undoes a newer one and no attempt is started twice,
and what of a wish outlives its lease. It must not know connections, nor when a lease ends.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from potluck_node.attempts import Attempts
from potluck_node.peer_measurement import PeerMeasuring
from potluck_node.replicas import Replicas
from potluck_protocol.codec import start_attempt_value
from potluck_protocol.engine_codec import desired_state_value
from potluck_protocol.errors import PotluckError
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import AttemptId, DesiredState

STARTED_MAX: Final = 4096
"""So many starts are remembered: four times the attempts that a node may have at once."""


class Orders:
    """Carries out what the coordinator says.

    Args:
        attempts: where attempts run.
        replicas: who takes the coordinator's wishes about engines.
        peers: who takes those about other nodes of the site.
    """

    def __init__(self, attempts: Attempts, replicas: Replicas, peers: PeerMeasuring) -> None:
        self._attempts = attempts
        self._replicas = replicas
        self._peers = peers
        self._desired = DesiredState()
        self._started: dict[AttemptId, None] = {}
        """The newest under this lease; the oldest first."""

    def take(self, frame: node_pb2.CoordinatorFrame) -> None:
        """Carries out one frame; raises PotluckError for a wish that cannot be read."""
        # Cancels go before starts: they free the slots that the starts were given.
        for cancel in frame.cancels:
            self._attempts.cancel(AttemptId(cancel.attempt_id))
        for acknowledgement in frame.acknowledgements:
            self._attempts.acknowledge(AttemptId(acknowledgement.attempt_id), acknowledgement.next_sequence)
        for start in frame.starts:
            self._start(start)
        if frame.HasField("desired"):
            self.wish(desired_state_value(frame.desired), outright=False)

    def wish(self, desired: DesiredState, *, outright: bool) -> None:
        """Hands a wish on if it is newer than the last; `outright`: even if it is not, for revisions of another epoch do not compare."""
        if outright or desired.revision > self._desired.revision:
            self._desired = desired
            self._hand_on(desired)

    def lease_ended(self) -> None:
        """Ends what must not outlive the lease: stages of groups, which the coordinator forms anew without this node, and measuring.

        A whole engine goes on: it is of use again as soon as the coordinator is.
        """
        self._started.clear()  # what was dropped with the lease may be started again
        whole = tuple(engine for engine in self._desired.engines if engine.group is None)
        if whole != self._desired.engines or self._desired.peers:
            self._hand_on(replace(self._desired, engines=whole, peers=()))

    def _hand_on(self, desired: DesiredState) -> None:
        self._replicas.set_desired(desired)
        self._peers.set_peers(desired.peers)

    def _start(self, message: node_pb2.StartAttempt) -> None:
        attempt_id = AttemptId(message.attempt_id)
        if attempt_id in self._started:
            return
        self._started[attempt_id] = None
        if len(self._started) > STARTED_MAX:
            del self._started[next(iter(self._started))]
        try:
            start = start_attempt_value(message)
        except PotluckError as error:
            self._attempts.refuse(attempt_id, error.message)
            return
        self._attempts.start(start)
