"""The books' memory of idempotency keys: every call may be made again, and no call of another use undoes anything."""

from __future__ import annotations

from dataclasses import replace

from potluck_coordinator.directory.idempotency import FORGET_SECONDS, IdempotencyKeys
from potluck_coordinator.domain.idempotency import KEY_KEPT_MS, KeyState, KeyUse
from potluck_protocol.values import AccountId, RequestId
from tests.support.books import open_books

USE = KeyUse(AccountId("ann"), b"k" * 32, b"body", RequestId("first"), "claim-1", gateway_epoch=1)
AGAIN = replace(USE, claim_id="claim-2")


async def test_every_call_may_be_made_again(database_url):
    with open_books(database_url) as books:
        books.add_people("ann", "bob")
        desk = IdempotencyKeys(books.store, books.clock)
        for _ in range(2):
            assert await desk.claim(USE) is None
        known = await desk.claim(AGAIN)
        assert known is not None
        assert (known.use, known.state) == (USE, KeyState.CLAIMED)
        assert await desk.claim(replace(AGAIN, account_id=AccountId("bob"))) is None, "a key is its account's own"
        await desk.release(AGAIN)
        await desk.finish(AGAIN, 99)
        assert await desk.claim(AGAIN) == known, "another use gives back and ends nothing"
        for _ in range(2):
            await desk.finish(USE, 18)
        await desk.release(USE)
        spent = await desk.claim(AGAIN)
        assert spent is not None
        assert (spent.state, spent.charge_micro_credits) == (KeyState.SPENT, 18)


async def test_what_was_given_back_is_free_and_what_is_old_is_gone(database_url):
    with open_books(database_url) as books:
        books.add_people("ann")
        desk = IdempotencyKeys(books.store, books.clock)
        await desk.claim(USE)
        for _ in range(2):
            await desk.release(USE)
        assert await desk.claim(AGAIN) is None
        await desk.forget_old()
        books.clock.advance(KEY_KEPT_MS / 1000 - 1)
        await desk.forget_old()
        assert await desk.claim(USE) is not None
        books.clock.advance(1 + FORGET_SECONDS)
        await desk.forget_old()
        assert await books.store.run(lambda work: work.idempotency.get(USE.account_id, USE.key_hash)) is None
