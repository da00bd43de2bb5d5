"""How a node becomes one of the pool's, and stays one.

Decides whether a token lets a key in, and whether a node's key gets another certificate; `certificate_authority` makes both. A join makes
the node desk (`nodes`) plan anew. It must not know links: a node's session is that desk's business, as are leaving and revocation.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import structlog

from potluck_coordinator.desks import Enrolment
from potluck_coordinator.directory.credentials import checked_label, proves
from potluck_coordinator.directory.gathering import Gathering
from potluck_coordinator.storage.join_tokens import StoredJoinToken
from potluck_coordinator.storage.nodes import EnrolledNode, NodeStatus
from potluck_coordinator.storage.store import Store
from potluck_coordinator.storage.unit_of_work import UnitOfWork
from potluck_protocol.clock import Clock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.identity import node_id_of_public_key, public_key_of_request
from potluck_protocol.values import AccountId, Inventory, NodeId, TokenId

_log = structlog.get_logger()


class NodeCertificates(Protocol):
    """What enrolment needs of the certificate authority."""

    def issue_node_certificate(self, public_key_spki_der: bytes, now_unix_ms: int) -> str: ...


class Enrolments:
    """The desk `desks.EnrolmentDesk`.

    Args:
        store: the books.
        clock: for dates and lifetimes.
        authority: signs what this desk has judged.
        node_has_joined: awaited after each enrolment, so that the pool plans with the new node.
    """

    def __init__(self, store: Store, clock: Clock, authority: NodeCertificates, *, node_has_joined: Callable[[], Awaitable[None]]) -> None:
        self._store = store
        self._clock = clock
        self._authority = authority
        self._node_has_joined = node_has_joined
        self._looking_up = Gathering(self._look_up)

    async def join(
        self, certificate_request_der: bytes, token_id: TokenId, token_secret: str, display_name: str, inventory: Inventory
    ) -> Enrolment:
        """As `desks.EnrolmentDesk.join`.

        A node that left may come back with a new token, under the owner of that token; a revoked key never does.

        Raises:
            PotluckError: INVALID_INVITE for the token, INVALID_CERTIFICATE for the request or a revoked key, INVALID_REQUEST for the name,
                ALREADY_EXISTS for a key that another person's node uses.
        """
        public_key = public_key_of_request(certificate_request_der)
        node_id = node_id_of_public_key(public_key)
        name = checked_label(display_name or f"node-{node_id[:6]}", "display_name")
        now_ms = self._clock.unix_ms()

        def enrol(work: UnitOfWork) -> AccountId:
            owner = _admit(work, token_id, token_secret, node_id, now_ms)
            node = EnrolledNode(
                node_id=node_id,
                owner_account_id=owner,
                display_name=name,
                public_key_spki=public_key,
                status=NodeStatus.ACTIVE,
                status_reason="",
                epoch=0,
                inventory=inventory,
                agent_version="",
                enrolled_at_unix_ms=now_ms,
                last_seen_at_unix_ms=0,
            )
            _take_in(work, node)
            return owner

        owner = await self._store.run(enrol)
        certificate = self._authority.issue_node_certificate(public_key, now_ms)
        await self._node_has_joined()
        _log.info("node_joined", node_id=node_id, account_id=owner, token_id=token_id)
        return Enrolment(node_id, owner, certificate)

    async def is_enrolled(self, node_id: NodeId) -> bool:
        """As `desks.EnrolmentDesk.is_enrolled`."""
        return await self._looking_up.ask(node_id, None) is not None

    async def _look_up(self, asked: Mapping[NodeId, None]) -> Mapping[NodeId, bool]:
        return dict.fromkeys(await self._store.run(lambda work: work.nodes.active_among(asked)), True)

    async def renew(self, certificate_request_der: bytes) -> tuple[NodeId, str]:
        """As `desks.EnrolmentDesk.renew`: the proof of the key is enough, however long its last certificate has run out."""
        public_key = public_key_of_request(certificate_request_der)
        node_id = node_id_of_public_key(public_key)
        node = await self._store.run(lambda work: work.nodes.get(node_id))
        if node is None or node.status is not NodeStatus.ACTIVE:
            raise PotluckError(
                ErrorCode.INVALID_CERTIFICATE, "This key belongs to no active node of the pool; join again with a new invite."
            )
        _log.info("node_certificate_renewed", node_id=node_id)
        return node_id, self._authority.issue_node_certificate(public_key, self._clock.unix_ms())


def _admit(work: UnitOfWork, token_id: TokenId, token_secret: str, node_id: NodeId, now_ms: int) -> AccountId:
    """Spends the token on the node, or finds that it was spent on this very node before; the owner it was made for."""
    stored = work.join_tokens.get(token_id)
    if stored is None or not proves(token_secret, stored.secret_sha256):
        raise PotluckError(ErrorCode.INVALID_INVITE, "This invite is not one of this pool's; ask for a new one.")
    if not work.join_tokens.spend(token_id, node_id, now_ms) and not _is_repetition(work, stored, node_id, now_ms):
        raise PotluckError(ErrorCode.INVALID_INVITE, f"This invite {_fault(stored, now_ms)}; ask for a new one.")
    return stored.record.account_id


def _is_repetition(work: UnitOfWork, stored: StoredJoinToken, node_id: NodeId, now_ms: int) -> bool:
    """The reply may have been lost: the same key may ask again while the token would still be good and the node still belongs."""
    record = stored.record
    node = work.nodes.get(node_id)
    return (
        record.used_by_node_id == node_id
        and not record.revoked
        and record.expires_at_unix_ms > now_ms
        and node is not None
        and node.status is NodeStatus.ACTIVE
    )


def _fault(stored: StoredJoinToken, now_ms: int) -> str:
    if stored.record.revoked:
        return "has been revoked"
    return "has expired" if stored.record.expires_at_unix_ms <= now_ms else "has been used"


def _take_in(work: UnitOfWork, node: EnrolledNode) -> None:
    known = work.nodes.get(node.node_id)
    if known is None:
        work.nodes.add(node)
        return
    if known.status is NodeStatus.REVOKED:
        raise PotluckError(ErrorCode.INVALID_CERTIFICATE, "This node's key has been revoked; make a new key, then join with a new invite.")
    if known.status is NodeStatus.LEFT:
        work.nodes.come_back(node.node_id, node.owner_account_id, node.display_name, node.inventory)
    elif known.owner_account_id != node.owner_account_id:
        raise PotluckError(ErrorCode.ALREADY_EXISTS, "This node belongs to another account; let it leave first, then join again.")
