"""Every RPC and every HTTP route against every credential, at a real coordinator: nothing is accepted that should not be.

A call counts as accepted unless it is refused with UNAUTHENTICATED, PERMISSION_DENIED, UNIMPLEMENTED or a failed handshake (HTTP: 401 or
403). What an accepted call then answers to its empty message is not this table's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import aiohttp
import grpc
import pytest
import pytest_asyncio
from cryptography import x509

from potluck_coordinator.directory.bootstrap import OPERATOR_ACCOUNT_ID
from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_coordinator.gateway.authorisation import HTTP_ROUTES, contract_methods
from potluck_protocol import codec, identity
from potluck_protocol.channels import SERVER_NAME
from potluck_protocol.metadata import ERROR_DETAIL
from potluck_protocol.v1 import account_pb2, account_pb2_grpc, common_pb2, node_pb2, node_pb2_grpc, pool_pb2, pool_pb2_grpc
from potluck_protocol.values import AccountId, GoodbyeReason, Hello, Inventory, NodeId, NodeState, SessionId
from potluck_protocol.version import PROTOCOL_VERSION
from tests.support.certificates import SERVER, Credential, bent_certificate
from tests.support.open_pool import OpenPool, open_pool

pytestmark = pytest.mark.asyncio(loop_scope="module")

LINK = "/potluck_protocol.v1.NodeService/Link"
NODE_METHODS = [LINK, *(f"/potluck_protocol.v1.NodeService/{name}" for name in ("MeasureDownload", "MeasureUpload"))]
GATEWAY_METHODS = ["/potluck_protocol.v1.GatewayService/Forward"]
ACCEPTED = "accepted"
NO_KEY = "invalid_api_key"
FORBIDDEN = "permission_denied"
NOT_SERVED = "not served here"
NO_HANDSHAKE = "no handshake"


# Written down here once more, so that a slip in the coordinator's own table is seen. Everything else is for users.
PREFIX, POOL = "/potluck_protocol.v1.", "/potluck_protocol.v1.PoolService/"
JOINER_METHODS = [f"{PREFIX}EnrolmentService/Join", f"{PREFIX}EnrolmentService/Renew"]
OPERATOR_METHODS = [
    *(f"{PREFIX}AccountService/{name}" for name in ("AuditLedger", "CreateAccount", "ListAccounts")),
    *(POOL + name for name in ("AddModel", "Deploy", "ExplainDeployment", "RemoveModel", "RevokeNode", "SetNodeTrust", "Undeploy")),
]
KEY_METHODS = sorted(contract_methods() - {*JOINER_METHODS, *NODE_METHODS, *GATEWAY_METHODS})
OPEN_ROUTES = [("GET", "/health"), ("GET", "/pool/v1/connection"), ("GET", "/ready")]
OPERATOR_ROUTES = [("GET", "/metrics")]


@dataclass
class People:
    """The pool with everyone who tries the doors."""

    pool: OpenPool
    user: AccountId
    other_user: AccountId
    keys: dict[str, str | None]
    """By kind of credential: the whole authorization value, None for no such header."""
    node_id: NodeId
    node: Credential


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def people(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[People]:
    async with open_pool(tmp_path_factory.mktemp("pool")) as pool, open_pool(tmp_path_factory.mktemp("elsewhere")) as elsewhere:
        accounts = pool.directory.accounts
        user, user_key = await pool.user_key("user")
        other_user, _ = await pool.user_key("other")
        _, expired = await accounts.create_key(user, "short", 1)
        record, revoked = await accounts.create_key(user, "revoked", 0)
        await accounts.revoke_key(record.key_prefix, user)
        operator_record, operator_revoked = await accounts.create_key(OPERATOR_ACCOUNT_ID, "revoked", 0)
        await accounts.revoke_key(operator_record.key_prefix, None)
        token, token_secret = await accounts.create_join_token(user, 0)
        pool.clock.shift_seconds += 2
        node_id, node = await pool.joined_node(user)
        last = "A" if pool.operator_key[-1] != "A" else "B"
        keys = {
            "nothing": None,
            "an empty header": "",
            "an empty key": "Bearer ",
            "garbage": "Bearer garbage",
            "a NUL-free binary-looking key": "Bearer sk-potluck-~~~~~~~~-" + "!" * 43,
            "an unknown key": "Bearer sk-potluck-aaaaaaaa-" + "a" * 43,
            "another pool's operator key": f"Bearer {elsewhere.operator_key}",
            "an operator key with its last letter changed": f"Bearer {pool.operator_key[:-1]}{last}",
            "an operator key without its last letter": f"Bearer {pool.operator_key[:-1]}",
            "an operator key's prefix": f"Bearer {pool.operator_key[:20]}",
            "an operator key without a scheme": pool.operator_key,
            "an operator key under another scheme": f"Basic {pool.operator_key}",
            "two keys in one header": f"Bearer sk-potluck-x, Bearer {pool.operator_key}",
            "an expired key": f"Bearer {expired}",
            "a revoked key": f"Bearer {revoked}",
            "a revoked operator key": f"Bearer {operator_revoked}",
            "a join token": f"Bearer {token_secret}",
            "a join token's id": f"Bearer {token.token_id}",
            "a node's id": f"Bearer {node_id}",
            "an account's id": f"Bearer {OPERATOR_ACCOUNT_ID}",
            "a user's key": f"Bearer {user_key}",
            "the operator's key": f"Bearer {pool.operator_key}",
        }
        yield People(pool, user, other_user, keys, node_id, node)


GOOD = {"a user's key", "the operator's key"}


def expected(kind: str, *, for_operators: bool) -> str:
    """What a caller with an API key (or without) meets at a door of the grpc or http port."""
    if kind not in GOOD:
        return NO_KEY
    return FORBIDDEN if for_operators and kind != "the operator's key" else ACCEPTED


def detail_of(error: grpc.aio.AioRpcError) -> common_pb2.ErrorDetail:
    raw = dict(error.trailing_metadata() or ()).get(ERROR_DETAIL, b"")
    assert isinstance(raw, bytes)
    return common_pb2.ErrorDetail.FromString(raw)


async def outcome(channel: grpc.aio.Channel, method: str, authorization: str | None, payload: bytes = b"") -> str:
    """What became of a call with this payload. On the wire all four arities look alike, so one message out and one in fits every method."""
    metadata = () if authorization is None else (("authorization", authorization),)
    call = channel.unary_stream(method)(payload, metadata=metadata, timeout=20)
    try:
        if await call.read() is not grpc.aio.EOF:
            return ACCEPTED
        status, trailing = await call.code(), await call.trailing_metadata()
    except grpc.aio.AioRpcError as error:
        status, trailing = error.code(), error.trailing_metadata()
    finally:
        call.cancel()
    return meaning(method, status, dict(trailing or ()).get(ERROR_DETAIL, b""))


def meaning(method: str, status: grpc.StatusCode, raw_detail: str | bytes) -> str:
    assert isinstance(raw_detail, bytes)
    code = common_pb2.ErrorDetail.FromString(raw_detail).code
    if code in {NO_KEY, FORBIDDEN, "invalid_certificate", "invalid_invite"}:
        return code
    if status is grpc.StatusCode.UNIMPLEMENTED:
        return NOT_SERVED
    if status is grpc.StatusCode.UNAVAILABLE and not code:
        return NO_HANDSHAKE
    # No refusal of the caller, so it got in; but nothing may break, whatever the message.
    assert status not in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}, method
    assert status not in {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED}, method
    return ACCEPTED


@pytest.mark.parametrize("method", KEY_METHODS)
async def test_calls_that_need_a_key(people: People, method: str) -> None:
    async with people.pool.grpc_channel() as channel, people.pool.grpc_channel(people.node) as nodes_channel:
        found = {kind: await outcome(channel, method, header) for kind, header in people.keys.items()}
        assert found == {kind: expected(kind, for_operators=method in OPERATOR_METHODS) for kind in people.keys}
        # A node's certificate is worth nothing here, with or without a key that is no good.
        assert await outcome(nodes_channel, method, None) == NO_KEY
        assert await outcome(nodes_channel, method, people.keys["a revoked key"]) == NO_KEY


@pytest.mark.parametrize("method", JOINER_METHODS)
async def test_keys_open_no_way_into_the_pool(people: People, method: str) -> None:
    async with people.pool.grpc_channel() as channel:
        found = {kind: await outcome(channel, method, header) for kind, header in people.keys.items()}
    assert set(found.values()) == {"invalid_certificate"}


async def test_what_is_for_nodes_and_gateways_is_not_served_on_the_grpc_port(people: People) -> None:
    methods = [*NODE_METHODS, *GATEWAY_METHODS]
    async with people.pool.grpc_channel() as channel, people.pool.grpc_channel(people.node) as nodes_channel:
        found = [await outcome(channel, method, header) for method in methods for header in people.keys.values()]
        found += [await outcome(nodes_channel, method, None) for method in methods]
        assert set(found) == {NOT_SERVED}


async def test_nothing_but_what_is_for_nodes_is_served_on_the_link_port(people: People) -> None:
    async with people.pool.link_channel(people.node) as channel:
        for method in sorted(contract_methods() - {*NODE_METHODS}):
            for kind in ("nothing", "a user's key", "the operator's key"):
                assert await outcome(channel, method, people.keys[kind]) == NOT_SERVED, (method, kind)


@pytest.mark.parametrize(("verb", "pattern"), sorted(HTTP_ROUTES))
async def test_http_routes(people: People, verb: str, pattern: str) -> None:
    path = pattern.replace("{model_id}", "smollm2-135m-instruct")
    found: dict[str, str] = {}
    async with aiohttp.ClientSession(people.pool.http_url) as session:
        for kind, header in people.keys.items():
            headers = {} if header is None else {"authorization": header}
            async with session.request(verb, path, headers=headers, data=b"{}" if verb == "POST" else None) as response:
                await response.read()
                assert response.status != 404
                found[kind] = {401: NO_KEY, 403: FORBIDDEN}.get(response.status, ACCEPTED)
    if (verb, pattern) in OPEN_ROUTES:
        assert set(found.values()) == {ACCEPTED}
    else:
        assert found == {kind: expected(kind, for_operators=(verb, pattern) in OPERATOR_ROUTES) for kind in people.keys}


# Nodes' certificates.


def hello(node_id: str) -> bytes:
    value = Hello(PROTOCOL_VERSION, NodeId(node_id), SessionId("session"), "test", Inventory(), NodeState.SERVING)
    return node_pb2.NodeFrame(hello=codec.hello_message(value)).SerializeToString()


def own_id(credential: Credential) -> NodeId:
    return identity.node_id_of_public_key(identity.public_key_der(credential.key_pem))


async def link_credentials(people: People, folder: Path) -> dict[str, tuple[Credential | None, str]]:
    """By kind: the credential, and what the link port should make of it."""
    pool, authority, now = people.pool, people.pool.authority, people.pool.clock.unix_ms()
    elsewhere = CertificateAuthority.load_or_create(folder / "elsewhere", now)
    key = identity.new_private_key()
    spki = identity.public_key_der(key)
    node_key, node_spki = people.node.key_pem, identity.public_key_der(people.node.key_pem)
    node_uri, other_uri = identity.node_uri(people.node_id), f"spiffe://other/node/{people.node_id}"
    server, gateway = authority.issue_server_certificate(now), authority.issue_gateway_certificate(1, now)
    revoked_id, revoked = await pool.joined_node()
    await pool.directory.nodes.revoke_node(revoked_id, "test")
    left_id, left = await pool.joined_node()
    await pool.directory.nodes.close_session(left_id, 0, GoodbyeReason.LEAVING)
    never_enrolled = Credential(key, authority.issue_node_certificate(spki, now).encode())
    dns: list[x509.GeneralName] = [x509.DNSName(SERVER_NAME)]
    return {
        "no certificate": (None, NO_HANDSHAKE),
        "another pool's CA": (Credential(key, elsewhere.issue_node_certificate(spki, now).encode()), NO_HANDSHAKE),
        "another pool's CA, a node's key": (Credential(node_key, elsewhere.issue_node_certificate(node_spki, now).encode()), NO_HANDSHAKE),
        "expired": (bent_certificate(authority, node_key, ends_in=timedelta(seconds=-10)), NO_HANDSHAKE),
        "not yet good": (bent_certificate(authority, node_key, starts_in=timedelta(minutes=10)), NO_HANDSHAKE),
        "for servers only": (bent_certificate(authority, node_key, usages=[SERVER]), NO_HANDSHAKE),
        "the coordinator's own": (Credential(server.private_key_pem, server.certificate_chain_pem), NO_HANDSHAKE),
        "a gateway's": (Credential(gateway.private_key_pem, gateway.certificate_chain_pem), "invalid_certificate"),
        "no extended key usage": (bent_certificate(authority, node_key, usages=[]), "invalid_certificate"),
        "no name": (bent_certificate(authority, node_key, uris=[], common_name=people.node_id), "invalid_certificate"),
        "two names": (bent_certificate(authority, node_key, uris=[node_uri, "spiffe://potluck/node/x"]), "invalid_certificate"),
        "its name twice": (bent_certificate(authority, node_key, uris=[node_uri, node_uri]), "invalid_certificate"),
        "its name and the server's": (bent_certificate(authority, node_key, other_names=dns), "invalid_certificate"),
        "another node's name": (bent_certificate(authority, key, uris=[node_uri]), "invalid_certificate"),
        "a name of another form": (bent_certificate(authority, node_key, uris=[other_uri]), "invalid_certificate"),
        "a CA's certificate": (bent_certificate(authority, node_key, ca=True), "invalid_certificate"),
        "a key that never enrolled": (never_enrolled, "invalid_certificate"),
        "a revoked node's": (revoked, "invalid_certificate"),
        "a node's that its owner took out": (left, "invalid_certificate"),
        "the pool's own": (people.node, ACCEPTED),
    }


@pytest.mark.parametrize("method", NODE_METHODS)
async def test_what_is_for_nodes_against_every_certificate(people: People, tmp_path: Path, method: str) -> None:
    table = await link_credentials(people, tmp_path)
    found: dict[str, str] = {}
    for kind, (credential, _) in table.items():
        async with people.pool.link_channel(credential) as channel:
            said = hello(people.node_id if credential is None else own_id(credential)) if method == LINK else b""
            # An operator's key beside it must not help a bad certificate.
            found[kind] = await outcome(channel, method, f"Bearer {people.pool.operator_key}", said)
    assert found == {kind: wanted for kind, (_, wanted) in table.items()}


async def test_a_hello_cannot_name_another_node(people: People) -> None:
    other_id, other = await people.pool.joined_node()
    async with people.pool.link_channel(other) as channel:
        assert await outcome(channel, LINK, None, hello(people.node_id)) == "invalid_certificate"
        assert await outcome(channel, LINK, None, hello(other_id)) == ACCEPTED


async def test_a_certificate_that_lapses_on_an_open_connection_is_seen(people: People) -> None:
    clock = people.pool.clock
    node_id, _ = await people.pool.joined_node()
    key = identity.new_private_key()
    token, secret = await people.pool.directory.accounts.create_join_token(people.user, 0)
    request = identity.certificate_request(key)
    enrolment = await people.pool.directory.enrolment.join(request, token.token_id, secret, "box", Inventory())
    async with people.pool.link_channel(Credential(key, enrolment.certificate_pem.encode())) as channel:
        assert await outcome(channel, LINK, None, hello(enrolment.node_id)) == ACCEPTED
        clock.shift_seconds += 25 * 3600
        try:
            assert await outcome(channel, LINK, None, hello(enrolment.node_id)) == "invalid_certificate"
        finally:
            clock.shift_seconds -= 25 * 3600
    assert node_id != enrolment.node_id


# Enrolment.


async def join(
    people: People, token_id: str, secret: str, key_pem: bytes | None = None, request_der: bytes | None = None
) -> tuple[str, str]:
    """The outcome and the node's id."""
    request = node_pb2.JoinRequest(
        certificate_request_der=request_der or identity.certificate_request(key_pem or identity.new_private_key()),
        token_id=token_id,
        token_secret=secret,
        display_name="box",
    )
    async with people.pool.grpc_channel() as channel:
        try:
            response = await node_pb2_grpc.EnrolmentServiceStub(channel).Join(request)
        except grpc.aio.AioRpcError as error:
            # What gRPC says itself has no detail of ours.
            return detail_of(error).code or f"{error.code()}: {error.details()}", ""
    return ACCEPTED, response.node_id


async def test_invites(people: People) -> None:
    accounts = people.pool.directory.accounts
    token, secret = await accounts.create_join_token(people.user, 0)
    other, other_secret = await accounts.create_join_token(people.user, 0)
    short, short_secret = await accounts.create_join_token(people.user, 1)
    gone, gone_secret = await accounts.create_join_token(people.user, 0)
    await accounts.revoke_join_token(gone.token_id, people.user)
    people.pool.clock.shift_seconds += 2
    refused = {
        "unknown": ("aaaaaaaaaaaa", secret),
        "wrong secret": (token.token_id, "x" * 43),
        "another token's secret": (token.token_id, other_secret),
        "no secret": (token.token_id, ""),
        "nothing": ("", ""),
        "expired": (short.token_id, short_secret),
        "revoked": (gone.token_id, gone_secret),
        "an API key": (token.token_id, people.pool.operator_key),
    }
    found = {kind: (await join(people, *offered))[0] for kind, offered in refused.items()}
    assert found == dict.fromkeys(refused, "invalid_invite")
    assert (await join(people, token.token_id, secret, request_der=b"junk"))[0] == "invalid_certificate"

    key = identity.new_private_key()
    first = await join(people, token.token_id, secret, key)
    assert first[0] == ACCEPTED
    assert await join(people, token.token_id, secret, key) == first  # the reply may have been lost
    assert (await join(people, token.token_id, secret))[0] == "invalid_invite"
    await people.pool.directory.nodes.revoke_node(NodeId(first[1]), "test")
    assert (await join(people, token.token_id, secret, key))[0] == "invalid_invite"
    assert (await join(people, other.token_id, other_secret, key))[0] == "invalid_certificate"


async def test_of_64_that_race_one_invite_one_gets_in(people: People) -> None:
    token, secret = await people.pool.directory.accounts.create_join_token(people.user, 0)
    before = len(await people.pool.directory.nodes.list_nodes())
    found = await asyncio.gather(*(join(people, token.token_id, secret) for _ in range(64)))
    assert sorted(code for code, _ in found) == [ACCEPTED] + ["invalid_invite"] * 63
    assert len(await people.pool.directory.nodes.list_nodes()) == before + 1


async def test_only_an_enrolled_key_renews(people: People) -> None:
    revoked_id, revoked = await people.pool.joined_node()
    await people.pool.directory.nodes.revoke_node(revoked_id, "test")
    keys = {"enrolled": people.node.key_pem, "unknown": identity.new_private_key(), "revoked": revoked.key_pem}
    found: dict[str, str] = {}
    async with people.pool.grpc_channel() as channel:
        for kind, key in keys.items():
            request = node_pb2.RenewRequest(certificate_request_der=identity.certificate_request(key))
            try:
                response = await node_pb2_grpc.EnrolmentServiceStub(channel).Renew(request)
            except grpc.aio.AioRpcError as error:
                found[kind] = detail_of(error).code
            else:
                found[kind] = identity.node_id_of_certificate(response.certificate_pem.encode(), people.pool.clock.unix_ms())
    assert found == {"enrolled": people.node_id, "unknown": "invalid_certificate", "revoked": "invalid_certificate"}


# Whose things.


ACCOUNT_CALLS = {
    "GetBalance": account_pb2.GetBalanceRequest,
    "ListStatement": account_pb2.ListStatementRequest,
    "ClaimEarnings": account_pb2.ClaimEarningsRequest,
    "CreateKey": account_pb2.CreateKeyRequest,
    "ListKeys": account_pb2.ListKeysRequest,
    "CreateJoinToken": account_pb2.CreateJoinTokenRequest,
    "ListJoinTokens": account_pb2.ListJoinTokensRequest,
}


async def test_every_call_with_an_account_id_is_in_the_list() -> None:
    inputs = {method.name: method.input_type for method in account_pb2.DESCRIPTOR.services_by_name["AccountService"].methods}
    assert {name for name, message in inputs.items() if "account_id" in message.fields_by_name} == set(ACCOUNT_CALLS)


@pytest.mark.parametrize("name", ACCOUNT_CALLS)
async def test_anothers_account_needs_the_operator(people: People, name: str) -> None:
    method = f"/potluck_protocol.v1.AccountService/{name}"

    def about(account_id: str) -> bytes:
        message = ACCOUNT_CALLS[name](account_id=account_id)
        if isinstance(message, account_pb2.ClaimEarningsRequest):
            message.claim_id = f"claim-{account_id}"
        return message.SerializeToString()

    user, operator = people.keys["a user's key"], people.keys["the operator's key"]
    async with people.pool.grpc_channel() as channel:
        for account_id in (people.other_user, OPERATOR_ACCOUNT_ID, "acct_unknown"):
            assert await outcome(channel, method, user, about(account_id)) == FORBIDDEN
        for account_id in ("", people.user):
            assert await outcome(channel, method, user, about(account_id)) == ACCEPTED
        for account_id in ("", people.user, people.other_user):
            assert await outcome(channel, method, operator, about(account_id)) == ACCEPTED


async def test_anothers_keys_and_tokens_cannot_be_revoked(people: People) -> None:
    accounts = people.pool.directory.accounts
    record, key = await accounts.create_key(people.other_user, "theirs", 0)
    token, _ = await accounts.create_join_token(people.other_user, 0)
    async with people.pool.grpc_channel() as channel:
        stub = account_pb2_grpc.AccountServiceStub(channel)
        metadata = (("authorization", people.keys["a user's key"] or ""),)
        for call in (
            stub.RevokeKey(account_pb2.RevokeKeyRequest(key_prefix=record.key_prefix), metadata=metadata),
            stub.RevokeJoinToken(account_pb2.RevokeJoinTokenRequest(token_id=token.token_id), metadata=metadata),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert detail_of(caught.value).code == "not_found"
    assert (await accounts.authenticate(key)).account_id == people.other_user
    assert not (await accounts.list_join_tokens(people.other_user))[0].revoked


async def test_an_operators_key_cannot_be_made_by_a_user(people: People) -> None:
    async with people.pool.grpc_channel() as channel:
        stub = account_pb2_grpc.AccountServiceStub(channel)
        response = await stub.CreateKey(
            account_pb2.CreateKeyRequest(name="mine"), metadata=(("authorization", people.keys["a user's key"] or ""),)
        )
    assert not response.key.operator
    assert response.key.account_id == people.user


async def test_whose_node_it_is_is_for_its_owner_and_the_operator(people: People) -> None:
    _, stranger = await people.pool.user_key("stranger")
    seen: dict[str, str] = {}
    headers = {"owner": people.keys["a user's key"], "operator": people.keys["the operator's key"], "stranger": f"Bearer {stranger}"}
    async with people.pool.grpc_channel() as channel:
        stub = pool_pb2_grpc.PoolServiceStub(channel)
        for who, header in headers.items():
            response = await stub.ListNodes(pool_pb2.ListNodesRequest(), metadata=(("authorization", header or ""),))
            (node,) = [node for node in response.nodes if node.node_id == people.node_id]
            seen[who] = node.owner_account_id
    assert seen == {"owner": people.user, "operator": people.user, "stranger": ""}


# Revocation while in use.


async def test_a_revoked_key_stops_at_once_although_it_was_remembered(people: People) -> None:
    account_id, key = await people.pool.user_key("soon-gone")
    (record,) = await people.pool.directory.accounts.list_keys(account_id)
    method = "/potluck_protocol.v1.AccountService/GetBalance"
    async with people.pool.grpc_channel() as channel, aiohttp.ClientSession(people.pool.http_url) as session:
        assert await outcome(channel, method, f"Bearer {key}") == ACCEPTED
        operator = account_pb2_grpc.AccountServiceStub(channel)
        request = account_pb2.RevokeKeyRequest(key_prefix=record.key_prefix)
        await operator.RevokeKey(request, metadata=(("authorization", people.keys["the operator's key"] or ""),))
        assert await outcome(channel, method, f"Bearer {key}") == NO_KEY
        async with session.get("/v1/models", headers={"authorization": f"Bearer {key}"}) as response:
            assert response.status == 401


async def test_a_revoked_nodes_live_link_ends_and_stays_shut(people: People) -> None:
    node_id, credential = await people.pool.joined_node()
    async with people.pool.link_channel(credential) as channel:
        link = node_pb2_grpc.NodeServiceStub(channel).Link()
        await link.write(node_pb2.NodeFrame.FromString(hello(node_id)))
        assert (await link.read()).HasField("welcome")
        operator = pool_pb2_grpc.PoolServiceStub(people.pool.grpc_channel())
        started = asyncio.get_running_loop().time()
        await operator.RevokeNode(
            pool_pb2.RevokeNodeRequest(node_id=node_id, reason="test"),
            metadata=(("authorization", people.keys["the operator's key"] or ""),),
        )
        async with asyncio.timeout(5):
            while not (frame := await link.read()).HasField("goodbye"):
                pass
        assert (codec.goodbye_reason_from_number(frame.goodbye.reason), frame.goodbye.message) == (GoodbyeReason.REVOKED, "test")
        assert asyncio.get_running_loop().time() - started < 1
        assert await link.code() is grpc.StatusCode.UNAVAILABLE
        assert await outcome(channel, LINK, None, hello(node_id)) == "invalid_certificate"
