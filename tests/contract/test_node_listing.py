"""What the pool shows of a node to its owner, to the operator, and to everyone else who has a key."""

from __future__ import annotations

import pytest

from potluck_coordinator.desks import NodeRecord
from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_coordinator.gateway.pool_servicer import PoolServicer
from potluck_protocol import codec
from potluck_protocol.cards import CardTelemetry
from potluck_protocol.clock import SystemClock
from potluck_protocol.rest import RestCause
from potluck_protocol.v1 import pool_pb2, pool_pb2_grpc
from potluck_protocol.values import (
    Accelerator,
    AccountId,
    EngineState,
    EngineStatus,
    GroupOffer,
    Inventory,
    ModelId,
    NodeId,
    NodeState,
    ReplicaId,
)
from tests.support.grpc_edge import CLOCK, OPERATOR_KEY, OTHER_KEY, USER_KEY, GrpcEdge, authorization

UUID, PEER_UUID = "GPU-5f1c7d2e", "GPU-0a9b8c7d"
FAILURE = "the engine said: no room on the card"
RECORD = NodeRecord(
    node_id=NodeId("n" * 26),
    display_name="den",
    owner_account_id=AccountId("acct_user"),
    connection="connected",
    state=NodeState.SERVING,
    engines=(EngineStatus(ReplicaId("r"), ModelId("m"), EngineState.BACKING_OFF, "scripted", failure=FAILURE),),
    inventory=Inventory(
        "Linux",
        8,
        1 << 34,
        1 << 40,
        (Accelerator("RTX 3090", UUID, 24 << 30, nvlink_peer_uuids=(PEER_UUID,), pcie_peer_uuids=(PEER_UUID,)),),
        group_offer=GroupOffer("cellar", "10.20.30.40", 29600, (AccountId("acct_friend"),)),
        attached_model_names=("grandmas-letters",),
    ),
    agent_version="0.1.0",
    up_minutes=7,
    down_minutes=2,
    unknown_minutes=1,
    last_seen_at_unix_ms=5,
    cards=(CardTelemetry(UUID, temperature_celsius=81, thermal_rung=2, throttle_seconds=7.5),),
    rest_causes=(RestCause.IN_USE, RestCause.HEAT),
    trusted=True,
)


class Desk:
    """The node desk's face, with one node behind it."""

    async def list_nodes(self) -> tuple[NodeRecord, ...]:
        return (RECORD,)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority.load_or_create(tmp_path_factory.mktemp("pool") / "ca", CLOCK.unix_ms())


async def shown_to(authority: CertificateAuthority, key: str) -> pool_pb2.Node:
    async with GrpcEdge(authority, pool=PoolServicer(Desk(), Desk(), Desk(), Desk(), SystemClock())) as edge:
        stub = pool_pb2_grpc.PoolServiceStub(edge.channel)
        (node,) = (await stub.ListNodes(pool_pb2.ListNodesRequest(), metadata=authorization(key))).nodes
    return node


@pytest.mark.parametrize("key", [USER_KEY, OPERATOR_KEY], ids=["owner", "operator"])
async def test_its_owner_and_the_operator_see_everything(authority: CertificateAuthority, key: str) -> None:
    node = await shown_to(authority, key)
    assert node.owner_account_id == "acct_user"
    assert [card.uuid for card in node.inventory.accelerators] == [UUID]
    assert [engine.failure for engine in node.engines] == [FAILURE]
    assert list(node.inventory.accelerators[0].nvlink_peer_uuids) == [PEER_UUID]
    assert list(node.inventory.accelerators[0].pcie_peer_uuids) == [PEER_UUID]
    assert [(card.uuid, card.temperature_celsius, card.thermal_rung, card.throttle_seconds) for card in node.cards] == [(UUID, 81, 2, 7.5)]
    assert codec.rest_causes_from_numbers(node.rest_causes) == RECORD.rest_causes
    assert (node.inventory.group_offer.site, list(node.inventory.attached_model_names)) == ("cellar", ["grandmas-letters"])


async def test_a_stranger_sees_neither_whose_it_is_nor_what_tells_its_cards_apart_nor_why_its_engines_fail_nor_its_owners_private_words(
    authority: CertificateAuthority,
) -> None:
    node = await shown_to(authority, OTHER_KEY)
    text = node.SerializeToString()
    for hidden in ("acct_user", UUID, PEER_UUID, FAILURE, "cellar", "10.20.30.40", "acct_friend", "grandmas-letters"):
        assert hidden.encode() not in text
    assert not node.inventory.HasField("group_offer")
    assert not node.cards
    assert not node.rest_causes, "when its owner sits there is nobody else's business"
    # The rest is what strangers choose a pool by.
    assert (node.display_name, node.connection, node.up_minutes, node.trusted) == ("den", "connected", 7, True)
    assert [(card.name, card.memory_bytes) for card in node.inventory.accelerators] == [("RTX 3090", 24 << 30)]
    assert [(engine.model_id, engine.replica_id) for engine in node.engines] == [("m", "r")]
