"""Keeps requests that may have killed an engine apart from each other, and those that did from every engine.

Decides what becomes of a request that `culprits` or the directory suspects. It runs, but never where another suspect does, so that the
next death tells which of them it was; those that only ran beside it are answered, and cleared by that. As far as nodes are free it has
one to itself, and others keep away from there: what is refused for good is told by such deaths. Where an engine died with it alone, it
waits for a node of another owner, as long as there is one that can take it: the second death is then a second opinion. It must not know how
a death is noticed: `links` hears of it from the node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.links import Links
    from potluck_protocol.values import AttemptId, NodeId


class Quarantine:
    """The suspects of one gateway, at work.

    Args:
        links: the nodes, and who was with engines of theirs that died.
    """

    def __init__(self, links: Links) -> None:
        self._links = links
        self._nodes: dict[AttemptId, NodeId] = {}

    def check(self, request: InferenceRequest) -> None:
        """Lets a request pass, or raises PotluckError(REQUEST_REFUSED)."""
        links = self._links
        if not links.knows_lethal_requests:
            return
        fingerprint = request.fingerprint(links.culprits)
        if fingerprint in links.refused_requests:
            text = "Two engines died while they worked on this request and nothing else, so it is not run again. Send another. "
            raise PotluckError(ErrorCode.REQUEST_REFUSED, f"{text}The pool's operator can lift this: {fingerprint.hex()}.")
        if links.culprits.is_refused(fingerprint):
            raise PotluckError(ErrorCode.REQUEST_REFUSED)

    def shunned(self, request: InferenceRequest, tried: frozenset[NodeId]) -> tuple[frozenset[NodeId], ...]:
        """Where a request should not run now, the best choice first; in the last are the nodes where it may not. `tried` refused it."""
        nobody: frozenset[NodeId] = frozenset()
        if not self._links.knows_lethal_requests:
            return (nobody,)
        suspects = frozenset(self._nodes.values())
        if not self.suspects(request):
            return (suspects, nobody) if suspects else (nobody,)
        owner = self._links.suspect_requests.get(request.fingerprint(self._links.culprits))
        hosts = tuple(self._links.hosts)
        busy = suspects | {host.node_id for host in hosts if host.attempts}
        witnesses = {host.node_id for host in hosts if host.owner_account_id == owner}
        choices = (busy | witnesses, suspects | witnesses)
        if owner is not None and self._links.others_can_take(request, owner, tried):
            return choices
        return (*choices, busy, suspects)

    def begin(self, attempt_id: AttemptId, node_id: NodeId, request: InferenceRequest) -> None:
        """An attempt starts."""
        if self.suspects(request):
            self._nodes[attempt_id] = node_id

    def end(self, attempt_id: AttemptId, request: InferenceRequest, *, answered: bool) -> None:
        """An attempt is over; `answered` in full, by an engine that lived to count its tokens."""
        self._nodes.pop(attempt_id, None)
        if answered and self._links.knows_lethal_requests:
            self._links.stood(request.fingerprint(self._links.culprits))

    def suspects(self, request: InferenceRequest) -> bool:
        """Whether an engine died with the request, and it was not answered since."""
        if not self._links.knows_lethal_requests:
            return False
        fingerprint = request.fingerprint(self._links.culprits)
        return fingerprint in self._links.suspect_requests or self._links.culprits.is_suspect(fingerprint)
