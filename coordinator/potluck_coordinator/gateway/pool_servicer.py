"""The pool as people see it: the gRPC side of the directory's node and catalogue desks.

Decides what of a node is shown to whom: its owner and the operator see everything; others see neither whose it is, nor what tells its cards
apart and how they are, nor why an engine failed, nor what it offers to groups (its site and private address, and whom its owner trusts),
nor what its owner calls models of their own. The operator's words over nodes, models and deployments come in here as well; `authorisation`
keeps them to the operator, and `catalogue_messages` within bounds. It must not know links, but for handing them to `explain_servicer`, its
other part.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import grpc

from potluck_coordinator.desks import CatalogueDesk, KeyIdentity, NodeDesk, NodeRecord, Progress
from potluck_coordinator.domain.tiers import PromiseCount
from potluck_coordinator.gateway import catalogue_messages
from potluck_coordinator.gateway.explain_servicer import ExplainServicer
from potluck_coordinator.gateway.interceptors import caller
from potluck_coordinator.gateway.links import Links
from potluck_coordinator.gateway.requests import RequestService
from potluck_protocol import codec, engine_codec, hardware_codec
from potluck_protocol.clock import Clock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import pool_pb2
from potluck_protocol.values import AccountId, NodeId

REASON_CHARACTERS_MAX: Final = 500

_Context = grpc.aio.ServicerContext[Any, Any]


class PoolServicer(ExplainServicer):
    """Serves `PoolService`: the pool here, the reasons by what it inherits.

    Args:
        nodes: the nodes.
        catalogue: models and deployments.
        requests: as `ExplainServicer` has it, like the two that follow.
    """

    def __init__(self, nodes: NodeDesk, catalogue: CatalogueDesk, requests: RequestService, links: Links, clock: Clock) -> None:
        super().__init__(nodes, requests, links, clock)
        self._catalogue = catalogue

    async def ListNodes(  # noqa: N802 - the contract's name, as for every method here
        self, request: pool_pb2.ListNodesRequest, context: _Context
    ) -> pool_pb2.ListNodesResponse:
        """Every enrolled node."""
        del request, context
        identity = caller()
        records = await self._nodes.list_nodes()
        return pool_pb2.ListNodesResponse(nodes=[_node_message(_as_seen_by(identity, record)) for record in records])

    async def GetTiers(  # noqa: N802
        self, request: pool_pb2.GetTiersRequest, context: _Context
    ) -> pool_pb2.GetTiersResponse:
        """What the tiers are, what the caller has left, and how the promise was kept, as this gateway and the books know."""
        del request, context
        gate = self._requests.gate
        allowance, compliance = gate.windows.allowance(caller().account_id), gate.compliance()
        return pool_pb2.GetTiersResponse(
            default_request_count_max=allowance.limit_count,
            window_seconds=allowance.window_seconds,
            remaining_request_count=allowance.remaining_count,
            reset_ms=round(allowance.reset_seconds * 1000),
            reserve_percent=gate.limits.reserve_percent,
            first_token_ms=round(gate.limits.first_token_seconds * 1000),
            hour=_promise_message(compliance.hour),
            day=_promise_message(compliance.day),
            thirty_days=_promise_message(compliance.month),
        )

    async def RevokeNode(  # noqa: N802
        self, request: pool_pb2.RevokeNodeRequest, context: _Context
    ) -> pool_pb2.RevokeNodeResponse:
        """Shuts a node out for good."""
        del context
        if not request.node_id:
            raise PotluckError(ErrorCode.INVALID_REQUEST, "Name the node to revoke.", param="node_id")
        await self._nodes.revoke_node(NodeId(request.node_id), request.reason[:REASON_CHARACTERS_MAX])
        return pool_pb2.RevokeNodeResponse()

    async def SetNodeTrust(  # noqa: N802
        self, request: pool_pb2.SetNodeTrustRequest, context: _Context
    ) -> pool_pb2.SetNodeTrustResponse:
        """The operator's word that a node is trusted, or is not any more."""
        del context
        if not request.node_id:
            raise PotluckError(ErrorCode.INVALID_REQUEST, "Name the node.", param="node_id")
        await self._nodes.set_node_trust(NodeId(request.node_id), trusted=request.trusted)
        return pool_pb2.SetNodeTrustResponse()

    async def AddModel(  # noqa: N802
        self, request: pool_pb2.AddModelRequest, context: _Context
    ) -> pool_pb2.AddModelResponse:
        """Models into the catalogue: a file's, or a repository's, of which there may be no more than progress yet."""
        del context
        match request.WhichOneof("model"):
            case "catalogue_toml":
                records = await self._catalogue.add_models(catalogue_messages.catalogue_text_value(request.catalogue_toml))
            case "hub":
                wishes = catalogue_messages.wishes_value(request.hub)
                found = await self._catalogue.pin_model(catalogue_messages.source_value(request.hub), wishes)
                if isinstance(found, Progress):
                    return pool_pb2.AddModelResponse(progress=found.words)
                records = (found,)
            case _:
                raise PotluckError(ErrorCode.INVALID_REQUEST, "Send a catalogue file's text, or name a repository of the hub.")
        return pool_pb2.AddModelResponse(models=[catalogue_messages.model_message(record) for record in records])

    async def RemoveModel(  # noqa: N802
        self, request: pool_pb2.RemoveModelRequest, context: _Context
    ) -> pool_pb2.RemoveModelResponse:
        """Takes a model out of the catalogue."""
        del context
        await self._catalogue.remove_model(catalogue_messages.model_id_value(request.model_id))
        return pool_pb2.RemoveModelResponse()

    async def GetModel(  # noqa: N802
        self, request: pool_pb2.GetModelRequest, context: _Context
    ) -> pool_pb2.GetModelResponse:
        """All that the catalogue says of a model."""
        del context
        record = await self._catalogue.get_model(catalogue_messages.model_id_value(request.model_id))
        return pool_pb2.GetModelResponse(model=catalogue_messages.model_message(record))

    async def Deploy(  # noqa: N802
        self, request: pool_pb2.DeployRequest, context: _Context
    ) -> pool_pb2.DeployResponse:
        """Wishes a model served."""
        del context
        await self._catalogue.deploy(catalogue_messages.deployment_value(request.deployment))
        return pool_pb2.DeployResponse()

    async def Undeploy(  # noqa: N802
        self, request: pool_pb2.UndeployRequest, context: _Context
    ) -> pool_pb2.UndeployResponse:
        """Takes the wish back."""
        del context
        await self._catalogue.undeploy(catalogue_messages.model_id_value(request.model_id))
        return pool_pb2.UndeployResponse()

    async def ListDeployments(  # noqa: N802
        self, request: pool_pb2.ListDeploymentsRequest, context: _Context
    ) -> pool_pb2.ListDeploymentsResponse:
        """Every wish, and how far it is met."""
        del request, context
        records = await self._catalogue.list_deployments()
        return pool_pb2.ListDeploymentsResponse(deployments=map(catalogue_messages.deployment_status_message, records))

    async def ExplainDeployment(  # noqa: N802
        self, request: pool_pb2.ExplainDeploymentRequest, context: _Context
    ) -> pool_pb2.ExplainDeploymentResponse:
        """What each node has to do with a deployment."""
        del context
        records = await self._catalogue.explain(catalogue_messages.model_id_value(request.model_id))
        return pool_pb2.ExplainDeploymentResponse(verdicts=map(catalogue_messages.node_verdict_message, records))


def _as_seen_by(identity: KeyIdentity, record: NodeRecord) -> NodeRecord:
    if identity.operator or record.owner_account_id == identity.account_id:
        return record
    cards = tuple(replace(card, uuid="", nvlink_peer_uuids=(), pcie_peer_uuids=()) for card in record.inventory.accelerators)
    return replace(
        record,
        owner_account_id=AccountId(""),
        cards=(),
        rest_causes=(),
        engines=tuple(replace(status, failure="") for status in record.engines),
        inventory=replace(record.inventory, accelerators=cards, group_offer=None, attached_model_names=()),
    )


def _node_message(record: NodeRecord) -> pool_pb2.Node:
    return pool_pb2.Node(
        node_id=record.node_id,
        display_name=record.display_name,
        owner_account_id=record.owner_account_id,
        connection=record.connection,
        state=codec.NODE_STATE_NUMBER[record.state],
        engines=[engine_codec.engine_status_message(status) for status in record.engines],
        inventory=hardware_codec.inventory_message(record.inventory),
        agent_version=record.agent_version,
        up_minutes=record.up_minutes,
        down_minutes=record.down_minutes,
        unknown_minutes=record.unknown_minutes,
        last_seen_at_unix_ms=record.last_seen_at_unix_ms,
        cards=[hardware_codec.card_telemetry_message(card) for card in record.cards],
        rest_causes=codec.rest_cause_numbers(record.rest_causes),
        trusted=record.trusted,
    )


def _promise_message(count: PromiseCount) -> pool_pb2.PromiseKept:
    return pool_pb2.PromiseKept(request_count=count.count, kept_count=count.kept_count)
