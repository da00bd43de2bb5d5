"""Who gets in: join tokens and keys, on a real database with real certificate requests."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from potluck_coordinator.directory.bootstrap import OPERATOR_ACCOUNT_ID
from potluck_coordinator.storage.nodes import NodeStatus
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.identity import certificate_request, new_private_key, node_id_of_public_key, public_key_der
from potluck_protocol.values import Inventory
from tests.support.books import open_books

INVENTORY = Inventory("Linux", 4, 1 << 33, 1 << 38)


@pytest.fixture
async def books(database_url):
    with open_books(database_url) as opened:
        await opened.found()
        yield opened


@pytest.fixture
async def token(books):
    record, secret = await books.accounts.create_join_token(OPERATOR_ACCOUNT_ID, 0)
    return record.token_id, secret


def new_request():
    key = new_private_key()
    return certificate_request(key), node_id_of_public_key(public_key_der(key))


def join(books, request, token, name="box"):
    return books.enrolment.join(request, *token, name, INVENTORY)


async def refusal(awaitable):
    with pytest.raises(PotluckError) as refused:
        await awaitable
    return refused.value.code


async def test_a_node_joins_with_its_token(books, token):
    request, node_id = new_request()
    enrolment = await join(books, request, token)
    assert (enrolment.node_id, enrolment.owner_account_id) == (node_id, OPERATOR_ACCOUNT_ID)
    assert enrolment.certificate_pem.startswith("certificate 1")
    assert books.joins == 1
    node = await books.store.run(lambda work: work.nodes.get(node_id))
    assert (node.display_name, node.inventory, node.status) == ("box", INVENTORY, NodeStatus.ACTIVE)
    assert node_id_of_public_key(books.authority.issued[0]) == node_id
    (listed,) = await books.accounts.list_join_tokens(OPERATOR_ACCOUNT_ID)
    assert listed.used_by_node_id == node_id


async def test_a_lost_reply_is_made_good_for_the_same_key_only(books, token):
    request, node_id = new_request()
    await join(books, request, token)
    assert (await join(books, request, token)).node_id == node_id
    assert await refusal(join(books, new_request()[0], token)) is ErrorCode.INVALID_INVITE
    assert len(await books.store.run(lambda work: work.nodes.list_all())) == 1


async def test_tokens_that_let_nobody_in(books, token):
    token_id, secret = token
    request, _ = new_request()
    for wrong in (("nosuchtoken1", secret), (token_id, ""), (token_id, secret[:-1]), (token_id, "A" * 43)):
        assert await refusal(join(books, request, wrong)) is ErrorCode.INVALID_INVITE
    await books.accounts.revoke_join_token(token_id, None)
    assert await refusal(join(books, request, token)) is ErrorCode.INVALID_INVITE
    record, secret = await books.accounts.create_join_token(OPERATOR_ACCOUNT_ID, 60)
    books.clock.advance(60)
    assert await refusal(join(books, request, (record.token_id, secret))) is ErrorCode.INVALID_INVITE
    assert books.authority.issued == []


async def test_a_spent_token_says_no_to_its_own_node_once_it_is_old_or_the_node_is_gone(books, token):
    request, node_id = new_request()
    await join(books, request, token)
    await books.store.run(lambda work: work.nodes.end(node_id, NodeStatus.LEFT, ""))
    assert await refusal(join(books, request, token)) is ErrorCode.INVALID_INVITE
    other, _ = new_request()
    record, secret = await books.accounts.create_join_token(OPERATOR_ACCOUNT_ID, 60)
    await join(books, other, (record.token_id, secret))
    books.clock.advance(60)
    assert await refusal(join(books, other, (record.token_id, secret))) is ErrorCode.INVALID_INVITE


@pytest.mark.parametrize("request_der", [b"", b"garbage", b"\x30" * 5000])
async def test_a_bad_request_or_name_spends_no_token(books, token, request_der):
    assert await refusal(join(books, request_der, token)) is ErrorCode.INVALID_CERTIFICATE
    assert await refusal(join(books, new_request()[0], token, name="x" * 65)) is ErrorCode.INVALID_REQUEST
    await join(books, new_request()[0], token, name="")


async def test_a_revoked_key_never_comes_back_and_spends_no_token(books, token):
    request, node_id = new_request()
    await join(books, request, token)
    await books.store.run(lambda work: work.nodes.end(node_id, NodeStatus.REVOKED, "stolen"))
    record, secret = await books.accounts.create_join_token(OPERATOR_ACCOUNT_ID, 0)
    assert await refusal(join(books, request, (record.token_id, secret))) is ErrorCode.INVALID_CERTIFICATE
    assert await refusal(books.enrolment.renew(request)) is ErrorCode.INVALID_CERTIFICATE
    await join(books, new_request()[0], (record.token_id, secret))


async def test_a_node_moves_to_another_owner_only_by_leaving(books, token):
    request, node_id = new_request()
    await join(books, request, token)
    ann = await books.accounts.create_account("ann")
    record, secret = await books.accounts.create_join_token(ann.account_id, 0)
    assert await refusal(join(books, request, (record.token_id, secret))) is ErrorCode.ALREADY_EXISTS
    await books.store.run(lambda work: work.nodes.end(node_id, NodeStatus.LEFT, ""))
    assert (await join(books, request, (record.token_id, secret))).owner_account_id == ann.account_id


async def test_renewal_is_for_enrolled_keys(books, token):
    request, node_id = new_request()
    assert await refusal(books.enrolment.renew(request)) is ErrorCode.INVALID_CERTIFICATE
    await join(books, request, token)
    books.clock.advance(10**7)
    assert await books.enrolment.renew(request) == (node_id, f"certificate 2 at {books.clock.unix_ms()}")
    assert await refusal(books.enrolment.renew(request[:-3] + b"abc")) is ErrorCode.INVALID_CERTIFICATE


def test_sixty_four_threads_race_one_token(database_url):
    with open_books(database_url) as books:
        asyncio.run(books.found())
        record, secret = asyncio.run(books.accounts.create_join_token(OPERATOR_ACCOUNT_ID, 0))
        requests = [new_request()[0] for _ in range(64)]
        barrier = threading.Barrier(64)

        def race(request):
            barrier.wait(30)
            try:
                return asyncio.run(join(books, request, (record.token_id, secret))).node_id
            except PotluckError as error:
                return error.code

        with ThreadPoolExecutor(64) as threads:
            outcomes = list(threads.map(race, requests))
        nodes = books.run_now(lambda work: work.nodes.list_all())
        assert outcomes.count(ErrorCode.INVALID_INVITE) == 63
        assert [node.node_id for node in nodes] == [outcome for outcome in outcomes if outcome is not ErrorCode.INVALID_INVITE]
        assert len(books.authority.issued) == 1
