"""When a late request gets no second attempt, and what one may cost: real gateway, directory, links and books."""

from __future__ import annotations

import asyncio

import pytest

from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.fairness import service
from potluck_coordinator.domain.hedging import Budget
from potluck_coordinator.domain.ledger import LedgerOutcome, OpenHold, SettleHold
from potluck_coordinator.domain.payees import PayeeShare
from potluck_coordinator.domain.pricing import hold_amount
from potluck_coordinator.domain.suspicion import Standing, Suspicion
from potluck_protocol.clock import SystemClock
from potluck_protocol.values import EndReason
from tests.support.coordinator import TINY
from tests.support.hedged_pool import ANSWER, PRICE, PROMPT_TOKENS, give_up, hedged_pool, say, whole
from tests.support.request_path import read_all
from tests.support.two_owners import DONE, end, role, text, until


async def test_without_enough_first_tokens_known_nobody_is_late(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        for replica in hedged.links.measures._replicas.values():
            known = replica.first_tokens
            replica.first_tokens = known._replace(ratios=known.ratios[:19], on_time_ratio=None)
        asking = hedged.ask()
        node, start = await hedged.next_attempt()
        await hedged.no_attempt()
        await say(node, start, "first")
        await (await asyncio.wait_for(asking, 5)).close()
        assert "not_hedged" not in hedged.steps()


async def test_an_exhausted_budget_hedges_nobody_and_says_so(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        hedged.requests.hedging.budget = Budget(PROMPT_TOKENS - 1.0)
        asking = hedged.ask()
        node, start = await hedged.next_attempt()
        await hedged.no_attempt()
        await say(node, start, "first")
        await (await asyncio.wait_for(asking, 5)).close()
        (why_not,) = [step for step in hedged.story().steps if step.kind == "not_hedged"]
        assert "are left for hedging" in why_not.words


async def test_no_hedge_where_only_its_own_node_has_room(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        others = [hedged.ask() for _ in range(4)]
        attempts = [await hedged.next_attempt() for _ in others]
        for node, start in attempts:
            await node.chunk(start.attempt_id, 0, role("busy") + text("busy", "Once"))
        reading = [asyncio.ensure_future(whole(other)) for other in others]
        first, second = hedged.pool.nodes
        for node, start in attempts:
            if node is first:
                await node.chunk(start.attempt_id, 1, end("busy", PROMPT_TOKENS, 1))
                await node.end(start.attempt_id, 2)
        await until(lambda: sum(task.done() for task in reading) == 2)
        asking = hedged.ask()
        node, start = await hedged.next_attempt()
        assert node is first, "the second's two slots are taken, and one of the first's is free still"
        await hedged.no_attempt()
        assert [step.words.partition(", and ")[2] for step in hedged.story().steps if step.kind == "not_hedged"] == [
            "no other node has room for it now"
        ]
        assert second.starts()
        await say(node, start, "first")
        await whole(asking)
        await give_up(*reading)


async def test_a_hedge_takes_no_turn_from_its_account_before_it_is_the_answer(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        line = hedged.requests.queues.line(TINY)
        (account,) = line.queues[ServiceTier.DEFAULT]._accounts.values()
        given = account.given
        asking, first, start, *_ = await hedged.late()
        assert account.running_count == 1
        await say(first, start, "first")
        await whole(asking)
        assert (account.running_count, account.pending) == (0, 0.0)
        assert account.given - given == service(PROMPT_TOKENS, 2)
        asking, _, _, second, again = await hedged.late()
        await say(second, again, "second")
        await whole(asking)
        assert (account.running_count, account.pending) == (0, 0.0)


async def test_nobody_who_waits_comes_second_to_a_hedge(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        asking = [hedged.ask() for _ in range(4)]
        attempts = [await hedged.next_attempt() for _ in asking]
        first, second = hedged.pool.nodes
        (_, busy), (lost, gone) = ([start for node, start in attempts if node is which] for which in (first, second))
        for node, start in ((first, busy), (second, lost), (second, gone)):
            await node.chunk(start.attempt_id, 0, role("busy") + text("busy", "Once"))
        # One of the second node's answers may go on at the first only, which is full; its own two slots are free, for others.
        await second.end(lost.attempt_id, 1, EndReason.ENGINE_FAILED)
        await second.chunk(gone.attempt_id, 1, end("busy", PROMPT_TOKENS, 1))
        await second.end(gone.attempt_id, 2)
        reading = [asyncio.ensure_future(whole(one)) for one in asking]
        await until(lambda: hedged.pool.queued_count == 1)
        assert hedged.links.session(second.credentials.node_id).attempts_by_replica[second.status.replica_id] == 0
        await hedged.no_attempt()
        assert [step.words.partition(", and ")[2] for step in hedged.story().steps if step.kind == "not_hedged"] == [
            "what room there is others wait for"
        ]
        await give_up(*reading)


async def test_a_client_that_hangs_up_before_its_answer_is_late_is_not_hedged(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        asking = hedged.ask()
        first, start = await hedged.next_attempt()
        await give_up(asking)
        await hedged.cancelled(first, start)
        await hedged.no_attempt()


async def test_an_unstreamed_answer_is_never_hedged(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        asking = hedged.ask(stream=False)
        await hedged.next_attempt()
        await hedged.no_attempt()
        await give_up(asking)


async def test_a_request_that_an_engine_died_with_never_runs_twice_at_a_time(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        asking = hedged.ask()
        first, _ = await hedged.next_attempt()
        links = hedged.links
        (request,) = links.session(first.credentials.node_id).requests.values()
        links.suspect_requests = {request.fingerprint(links.culprits): hedged.pool.owners[0]}
        await hedged.no_attempt()
        (why_not,) = [step for step in hedged.story().steps if step.kind == "not_hedged"]
        assert "an engine died with it" in why_not.words
        await give_up(asking)


async def test_an_account_with_just_enough_for_one_answer_is_hedged_and_pays_one(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        pool, ledger = hedged.pool, hedged.pool.coordinator.directory.ledger
        before, _ = await pool.paid()
        entry = pool.coordinator.gateway._snapshot.models[TINY]
        amount = hold_amount(entry, pool.request(messages=hedged.words()).prompt_bytes, 10, 1, 1)
        # What is beyond it is set aside, as by another request that runs.
        rest = (await ledger.balance(pool.client)).available_micro_credits - amount
        later_unix_ms = SystemClock().unix_ms() + 60_000
        aside = OpenHold("aside", pool.client, (PayeeShare(pool.owners[0], 1),), rest, later_unix_ms, gateway_epoch=1)
        assert await ledger.apply([aside]) == (LedgerOutcome.APPLIED,)
        asking, first, start, second, again = await hedged.late()
        assert (await ledger.balance(pool.client)).available_micro_credits == 0
        await say(second, again, "second")
        answer, received = await whole(asking)
        assert received.count(DONE) == 1
        assert answer.charge_micro_credits == ANSWER
        await hedged.cancelled(first, start)
        assert await ledger.apply([SettleHold("aside", 0)]) == (LedgerOutcome.APPLIED,)
        assert (await pool.paid())[0] - before == ANSWER


async def test_of_two_late_requests_and_a_budget_for_one_one_is_hedged(tmp_path):
    async with hedged_pool(tmp_path, node_count=3) as hedged:
        hedged.requests.hedging.budget = Budget(1.5 * PRICE)
        asking = [hedged.ask(), hedged.ask()]
        for _ in range(3):
            await hedged.next_attempt()
        await hedged.no_attempt()
        assert sorted(step for step in hedged.steps() if "hedged" in step) == ["hedged", "not_hedged"]
        await give_up(*asking)
        assert hedged.requests.hedging.budget.tokens <= 0.5 * PRICE, "who gives up has wasted a prompt, too"


async def test_a_replica_that_is_being_tried_is_not_tried_by_a_hedge(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        asking = hedged.ask()
        first, _ = await hedged.next_attempt()
        (second,) = [node for node in hedged.pool.nodes if node is not first]
        suspicions = hedged.links.suspicions
        suspicions._put(second.status.replica_id, Suspicion(Standing.HALF_OPEN))
        hedged.links.node_changed(second.credentials.node_id)
        await hedged.no_attempt()
        assert "is being tried" in hedged.story().steps[-1].words
        await give_up(asking)


@pytest.mark.parametrize(("reserve_percent", "steps"), [(75, ["not_hedged"]), (25, ["hedged"])])
async def test_a_hedge_keeps_away_from_what_flex_leaves_to_the_default_tier(tmp_path, reserve_percent, steps):
    async with hedged_pool(tmp_path, default_tier_reserve_percent=reserve_percent) as hedged:
        asking = hedged.ask(service_tier="flex")
        await hedged.next_attempt()
        await until(lambda: len(hedged.steps()) == 2)
        assert hedged.steps()[1:] == steps
        await give_up(asking)


async def test_an_attempt_that_was_outrun_is_known_to_have_been_late_and_its_prompt_not_to_be_cached(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        replicas = hedged.links.measures._replicas
        asking, first, start, second, again = await hedged.late()
        (request,) = hedged.links.session(first.credentials.node_id).requests.values()
        known = replicas[first.status.replica_id].first_tokens.ratios
        await say(second, again, "second")
        await read_all(await asyncio.wait_for(asking, 5))
        assert replicas[first.status.replica_id].first_tokens.ratios[-1] > 2.0
        assert replicas[first.status.replica_id].first_tokens.ratios != known
        warm = hedged.links.measures.warm(request, request.work)
        assert first.status.replica_id not in warm
        assert second.status.replica_id in warm
        await hedged.cancelled(first, start)


async def test_a_node_that_claims_much_feeds_the_budget_with_what_can_be_true_only(tmp_path):
    async with hedged_pool(tmp_path) as hedged:
        budget = hedged.requests.hedging.budget.tokens
        asking = hedged.ask()
        node, start = await hedged.next_attempt()
        await node.chunk(start.attempt_id, 0, role("liar") + text("liar", "Once") + end("liar", 10**6, 10**6))
        await node.end(start.attempt_id, 1)
        await whole(asking)
        gained = hedged.requests.hedging.budget.tokens - budget
        assert 0 < gained <= 0.03 * (hedged.pool.request(messages=hedged.words()).prompt_bytes + 10)
