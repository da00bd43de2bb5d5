"""People, keys and the pool's first start, on a real database."""

from __future__ import annotations

import pytest
from sqlalchemy import inspect, text

from potluck_coordinator.directory.bootstrap import OPERATOR_ACCOUNT_ID, offer, operator_key
from potluck_coordinator.domain.catalogue import Deployment
from potluck_coordinator.domain.quotas import KeyQuotas
from potluck_protocol.errors import ErrorCode, PotluckError
from tests.support.books import GRANT, open_books
from tests.unit.test_pricing import ENTRY


@pytest.fixture
async def books(database_url):
    with open_books(database_url) as opened:
        await opened.found()
        yield opened
        assert opened.audit_now().findings == ()


async def refusal(awaitable):
    with pytest.raises(PotluckError) as refused:
        await awaitable
    return refused.value.code


async def test_a_pool_is_founded_once(books):
    pool_id = await books.found()
    assert pool_id.startswith("pool_")
    assert await books.found() == pool_id
    (operator,) = await books.accounts.list_accounts()
    assert (operator.account_id, operator.operator) == (OPERATOR_ACCOUNT_ID, True)
    assert (await books.ledger.balance(OPERATOR_ACCOUNT_ID)).available_micro_credits == GRANT


async def test_the_operators_key_is_kept_while_it_is_good_and_replaced_when_it_is_not(books):
    first = await operator_key(books.accounts, None)
    assert await operator_key(books.accounts, first) == first
    assert (await books.accounts.authenticate(first)).operator
    await books.accounts.revoke_key((await books.accounts.authenticate(first)).key_prefix, None)
    second = await operator_key(books.accounts, first)
    assert second != first
    assert (await books.accounts.authenticate(second)).account_id == OPERATOR_ACCOUNT_ID
    ann = await books.accounts.create_account("ann")
    _, anns = await books.accounts.create_key(ann.account_id, "laptop", 0)
    assert (await books.accounts.authenticate(await operator_key(books.accounts, anns))).account_id != ann.account_id


async def test_a_new_account_gets_the_grant_and_a_name_of_its_own(books):
    ann = await books.accounts.create_account("  Ann Ωmega ")
    assert ann.name == "Ann Ωmega"
    assert (await books.ledger.balance(ann.account_id)).available_micro_credits == GRANT
    assert await refusal(books.accounts.create_account("Ann Ωmega")) is ErrorCode.ALREADY_EXISTS
    for name in ("", "  ", "x" * 65, "a\tb", "a\x00b"):
        assert await refusal(books.accounts.create_account(name)) is ErrorCode.INVALID_REQUEST


async def test_a_key_speaks_for_its_account_until_it_expires_or_is_revoked(books):
    ann = await books.accounts.create_account("ann")
    record, key = await books.accounts.create_key(ann.account_id, "laptop", 60)
    assert key.startswith(f"sk-potluck-{record.key_prefix}-")
    assert len(record.key_prefix) == 8
    assert len(key) == len("sk-potluck-") + 8 + 1 + 43
    identity = await books.accounts.authenticate(key)
    assert (identity.account_id, identity.operator, identity.expires_at_unix_ms) == (ann.account_id, False, record.expires_at_unix_ms)
    books.clock.advance(59.999)
    await books.accounts.authenticate(key)
    books.clock.advance(0.001)
    assert await refusal(books.accounts.authenticate(key)) is ErrorCode.INVALID_API_KEY

    record, key = await books.accounts.create_key(ann.account_id, "phone", 0)
    books.clock.advance(10**9)
    await books.accounts.authenticate(key)
    await books.accounts.revoke_key(record.key_prefix, ann.account_id)
    assert books.revocations == 1
    assert await refusal(books.accounts.authenticate(key)) is ErrorCode.INVALID_API_KEY
    assert [(listed.name, listed.revoked) for listed in await books.accounts.list_keys(ann.account_id)] == [
        ("laptop", False),
        ("phone", True),
    ]


async def test_a_key_s_quotas_are_kept_changed_one_by_one_and_told_to_gateways(books):
    ann, bob = await books.accounts.create_account("ann"), await books.accounts.create_account("bob")
    quotas = KeyQuotas(requests_per_day=5, spend_micro_credits_per_day=2_500_000)
    record, key = await books.accounts.create_key(ann.account_id, "course", 0, quotas=quotas)
    assert record.quotas == (await books.accounts.authenticate(key)).quotas == quotas
    changed = await books.accounts.set_key_quotas(record.key_prefix, ann.account_id, {"requests_per_day": 0, "concurrent_max": 2})
    assert changed.quotas == KeyQuotas(concurrent_max=2, spend_micro_credits_per_day=2_500_000)
    assert [listed.quotas for listed in await books.accounts.list_keys(ann.account_id)] == [changed.quotas]
    assert (await books.accounts.authenticate(key)).quotas == changed.quotas
    assert books.revocations == 1, "what gateways remember of keys is void"
    assert await refusal(books.accounts.set_key_quotas(record.key_prefix, bob.account_id, {"concurrent_max": 0})) is ErrorCode.NOT_FOUND
    for bound in (-1, 2**60):
        changing = books.accounts.set_key_quotas(record.key_prefix, None, {"tokens_per_day": bound})
        assert await refusal(changing) is ErrorCode.INVALID_REQUEST


async def test_a_key_ends_no_later_than_it_may(books):
    ann = await books.accounts.create_account("ann")
    ends_by = books.clock.unix_ms() + 3_600_000
    for lifetime in (0, 3601):
        with pytest.raises(PotluckError, match=r"ends in 3600 s.* shorter lifetime") as refused:
            await books.accounts.create_key(ann.account_id, "k", lifetime, ends_by_unix_ms=ends_by)
        assert (refused.value.code, refused.value.param) == (ErrorCode.INVALID_REQUEST, "lifetime_seconds")
    record, _ = await books.accounts.create_key(ann.account_id, "k", 3600, ends_by_unix_ms=ends_by)
    assert record.expires_at_unix_ms == ends_by


async def test_what_is_not_a_key_of_this_pool_is_refused(books):
    ann = await books.accounts.create_account("ann")
    _, key = await books.accounts.create_key(ann.account_id, "laptop", 0)
    last = "A" if key[-1] != "A" else "B"
    for wrong in (
        "",
        "sk-potluck-",
        key[:-1],
        key + "x",
        key[:-1] + last,
        key.upper(),
        " " + key,
        key.replace("sk-", "pk-"),
        "x" * 100_000,
    ):
        assert await refusal(books.accounts.authenticate(wrong)) is ErrorCode.INVALID_API_KEY


async def test_a_key_is_only_its_owners_or_the_operators_to_revoke(books):
    ann, bob = await books.accounts.create_account("ann"), await books.accounts.create_account("bob")
    record, key = await books.accounts.create_key(ann.account_id, "laptop", 0)
    assert await refusal(books.accounts.revoke_key(record.key_prefix, bob.account_id)) is ErrorCode.NOT_FOUND
    assert await refusal(books.accounts.revoke_key("aaaaaaaa", None)) is ErrorCode.NOT_FOUND
    await books.accounts.authenticate(key)
    await books.accounts.revoke_key(record.key_prefix, None)
    await books.accounts.revoke_key(record.key_prefix, ann.account_id)
    assert await refusal(books.accounts.authenticate(key)) is ErrorCode.INVALID_API_KEY


async def test_unknown_accounts_and_senseless_lifetimes_are_refused(books):
    for asked in (
        books.accounts.create_key("acct_nobody", "k", 0),
        books.accounts.list_keys("acct_nobody"),
        books.accounts.create_join_token("acct_nobody", 0),
        books.accounts.list_join_tokens("acct_nobody"),
    ):
        assert await refusal(asked) is ErrorCode.NOT_FOUND
    for lifetime in (-1, 2**62):
        assert await refusal(books.accounts.create_key(OPERATOR_ACCOUNT_ID, "k", lifetime)) is ErrorCode.INVALID_REQUEST
        assert await refusal(books.accounts.create_join_token(OPERATOR_ACCOUNT_ID, lifetime)) is ErrorCode.INVALID_REQUEST


async def test_no_secret_is_kept(books):
    _, key = await books.accounts.create_key(OPERATOR_ACCOUNT_ID, "k", 0)
    _, token_secret = await books.accounts.create_join_token(OPERATOR_ACCOUNT_ID, 0)

    def everything(work):
        names = inspect(work.audit._connection).get_table_names()
        return str([work.audit._connection.execute(text(f"SELECT * FROM {name}")).all() for name in names])

    dump = books.run_now(everything)
    assert key[-43:] not in dump
    assert token_secret not in dump


async def test_the_catalogue_is_what_was_last_offered_and_wishes_for_it_stay(books):
    from dataclasses import replace

    other = replace(ENTRY, model_id="other")
    await offer(books.store, [ENTRY, other])
    await books.store.run(lambda work: work.catalogue.deploy(Deployment(ENTRY.model_id, 2)))
    cheaper = replace(ENTRY, prompt_price_micro_credits=0)
    await offer(books.store, [cheaper])
    assert await books.store.run(lambda work: work.catalogue.entries()) == {ENTRY.model_id: cheaper}
    assert await books.store.run(lambda work: work.catalogue.deployments()) == (Deployment(ENTRY.model_id, 2),)
