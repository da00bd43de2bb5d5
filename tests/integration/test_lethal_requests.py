"""Requests that engines die of, seen by the gateway: refused to everyone after the second death, while those beside them are answered.

Those that had both engines to themselves are refused for good, over restarts; whoever may have been there by chance is not.
Real gateway, directory and links; the nodes' words are the test's.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from potluck_coordinator.domain.lethal import SUSPECT_KEPT_MS
from potluck_coordinator.refused_command import NODES_GO_ON, refused
from potluck_protocol import codec
from potluck_protocol.clock import Clock
from potluck_protocol.culprits import REFUSED_KEPT_SECONDS
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import Endpoint, EndReason, NodeState
from tests.support.coordinator import Coordinator, running_coordinator
from tests.support.open_pool import ShiftedClock
from tests.support.raw_node import RawNode, enrol, raw_link
from tests.support.request_path import DONE, USAGE_EVENT, read_all, request_of, token
from tests.support.two_owners import until

KILLER, INNOCENT, OTHER = (b'{"messages":["%s"]}' % name for name in (b"killer", b"innocent", b"other"))


@asynccontextmanager
async def nodes(folder, count: int, *, owners: int = 1, clock: Clock | None = None) -> AsyncIterator[tuple[Coordinator, list[RawNode]]]:
    """A pool with so many nodes of two slots each, of so many owners in turn."""
    async with running_coordinator(folder, clock) as coordinator, AsyncExitStack() as links:
        accounts = [None, *[(await coordinator.directory.accounts.create_account(f"owner{n}")).account_id for n in range(1, owners)]]
        enrolled = [await enrol(coordinator, accounts[number % owners]) for number in range(count)]
        linked = [await links.enter_async_context(raw_link(coordinator, credentials)) for credentials in enrolled]
        for node in linked:
            await node.hello()
        yield coordinator, linked


async def asked(coordinator: Coordinator, body: bytes) -> asyncio.Future:
    return asyncio.ensure_future(coordinator.gateway.requests.begin(await request_of(coordinator, body=body)))


async def started(
    linked: list[RawNode], body: bytes, number: int = 0, besides: Sequence[node_pb2.StartAttempt] = ()
) -> tuple[RawNode, node_pb2.StartAttempt]:
    """Where the request is placed, the first time or a later one; of several nodes only what is not known yet tells which is later."""
    async with asyncio.timeout(5):
        while True:
            found = [(node, start) for node in linked for start in node.starts() if start.body == body and start not in besides]
            if len(found) > number:
                return found[-1]
            await asyncio.sleep(0.01)


async def die(node: RawNode, *starts: node_pb2.StartAttempt, reason: EndReason = EndReason.ENGINE_FAILED) -> None:
    """The node's engine has died with these attempts."""
    number = codec.END_REASON_NUMBER[reason]
    await node.send(
        ends=[
            node_pb2.AttemptEnd(attempt_id=start.attempt_id, reason=number, detail="the engine ended (crashed)", blamed=True)
            for start in starts
        ]
    )


async def answer_in_full(node: RawNode, start: node_pb2.StartAttempt, asking: asyncio.Future) -> None:
    await node.chunk(start.attempt_id, 0, token("one") + USAGE_EVENT + DONE)
    await node.end(start.attempt_id, 1)
    assert await read_all(await asyncio.wait_for(asking, 5))


async def failure_of(asking: asyncio.Future) -> PotluckError:
    with pytest.raises(PotluckError) as failure:
        await asyncio.wait_for(asking, 5)
    return failure.value


async def test_a_request_that_kills_two_engines_anywhere_is_refused_to_everyone(tmp_path):
    async with nodes(tmp_path, 2) as (coordinator, linked):
        dead: list[node_pb2.StartAttempt] = []
        asking = await asked(coordinator, KILLER)
        for _ in range(2):
            # After the first death it goes on elsewhere, by itself.
            node, start = await started(linked, KILLER, besides=dead)
            dead.append(start)
            await die(node, start)
        assert (await failure_of(asking)).code is ErrorCode.REQUEST_REFUSED
        assert (await failure_of(await asked(coordinator, KILLER))).code is ErrorCode.REQUEST_REFUSED
        assert sum(len(node.starts()) for node in linked) == 2, "no third engine is asked"
        asking = await asked(coordinator, INNOCENT)
        await answer_in_full(*await started(linked, INNOCENT), asking)


async def test_what_the_client_is_told_of_a_death_names_it(tmp_path):
    async with nodes(tmp_path, 1) as (coordinator, linked):
        asking = await asked(coordinator, KILLER)
        await die(*await started(linked, KILLER))
        failure = await failure_of(asking)
        assert failure.message == "The engine broke the answer off: the engine ended (crashed)"
        assert not failure.spec.retry_is_safe


async def test_suspects_are_kept_apart_so_that_the_next_death_tells_them_apart(tmp_path):
    async with nodes(tmp_path, 1) as (coordinator, linked):
        (node,) = linked
        asking = [await asked(coordinator, body) for body in (KILLER, INNOCENT)]
        starts = [(await started(linked, body))[1] for body in (KILLER, INNOCENT)]
        await die(node, *starts)
        for one in asking:
            assert (await failure_of(one)).code is ErrorCode.ENGINE_FAILED
        # Both come again. One has the node to itself; the other waits, and one that nobody suspects passes it by.
        again = await asked(coordinator, KILLER)
        _, killing = await started(linked, KILLER, 1)
        innocent = await asked(coordinator, INNOCENT)
        other = await asked(coordinator, OTHER)
        await answer_in_full(*await started(linked, OTHER), other)
        assert sum(start.body == INNOCENT for start in node.starts()) == 1
        await die(node, killing)
        assert (await failure_of(again)).code is ErrorCode.REQUEST_REFUSED
        await answer_in_full(*await started(linked, INNOCENT, 1), innocent)
        asking = [await asked(coordinator, INNOCENT) for _ in range(2)]
        await started(linked, INNOCENT, 3)
        for one in asking:
            one.cancel()


async def test_a_suspect_that_is_answered_in_full_is_none_any_more(tmp_path):
    async with nodes(tmp_path, 1) as (coordinator, linked):
        (node,) = linked
        asking = [await asked(coordinator, body) for body in (KILLER, INNOCENT)]
        await die(node, *[(await started(linked, body))[1] for body in (KILLER, INNOCENT)])
        for one in asking:
            await failure_of(one)
        innocent = await asked(coordinator, INNOCENT)
        await answer_in_full(*await started(linked, INNOCENT, 1), innocent)
        killing = await asked(coordinator, KILLER)
        _, killers = await started(linked, KILLER, 1)
        beside = await asked(coordinator, INNOCENT)
        _, start = await started(linked, INNOCENT, 2)
        await die(node, start)
        assert (await failure_of(beside)).code is ErrorCode.ENGINE_FAILED, "it was answered since the last death"
        await die(node, killers)
        assert (await failure_of(killing)).code is ErrorCode.REQUEST_REFUSED


async def test_one_death_counts_once_however_its_ends_arrive(tmp_path):
    async with nodes(tmp_path, 1) as (coordinator, linked):
        (node,) = linked
        asking = [await asked(coordinator, body) for body in (KILLER, INNOCENT)]
        starts = [(await started(linked, body))[1] for body in (KILLER, INNOCENT)]
        for start, one in zip(starts, asking, strict=True):
            await die(node, start)
            assert (await failure_of(one)).code is ErrorCode.ENGINE_FAILED


async def test_a_nodes_own_refusal_ends_the_request_and_condemns_it_nowhere_else(tmp_path):
    async with nodes(tmp_path, 1) as (coordinator, linked):
        asking = await asked(coordinator, KILLER)
        node, start = await started(linked, KILLER)
        await die(node, start, reason=EndReason.REFUSED)
        assert (await failure_of(asking)).code is ErrorCode.REQUEST_REFUSED
        asking = await asked(coordinator, KILLER)
        await answer_in_full(*await started(linked, KILLER, 1), asking)


async def test_an_end_without_blame_is_nobodys_death(tmp_path):
    async with nodes(tmp_path, 1) as (coordinator, linked):
        for number in range(4):
            asking = await asked(coordinator, KILLER)
            node, start = await started(linked, KILLER, number)
            await node.end(start.attempt_id, 0, EndReason.ENGINE_FAILED)
            assert (await failure_of(asking)).code is ErrorCode.ENGINE_FAILED
            if number in {1, 2}:  # the replica is suspected, though its request is not
                await node.pass_probe(number - 1)
                await until(lambda: coordinator.gateway._links.suspicions.half_open)


async def kill(coordinator: Coordinator, linked: list[RawNode], body: bytes, dead: list[node_pb2.StartAttempt]) -> RawNode:
    """The request is asked, and its engine dies with nothing else on it; on which node."""
    asking = await asked(coordinator, body)
    node, start = await started(linked, body, besides=dead)
    dead.append(start)
    await die(node, start)
    await failure_of(asking)
    return node


async def known(coordinator: Coordinator, *, refused_count: int, suspect_count: int) -> None:
    """The gateway has heard of so many."""
    links = coordinator.gateway._links
    await until(lambda: (len(links.refused_requests), len(links.suspect_requests)) == (refused_count, suspect_count))


async def test_it_stays_refused_over_restarts_until_the_operator_lifts_it(tmp_path):
    dead: list[node_pb2.StartAttempt] = []
    async with nodes(tmp_path, 1) as (coordinator, linked):
        await kill(coordinator, linked, KILLER, dead)
        await known(coordinator, refused_count=0, suspect_count=1)
    async with nodes(tmp_path, 1) as (coordinator, linked):
        await known(coordinator, refused_count=0, suspect_count=1)
        await kill(coordinator, linked, KILLER, dead)
        await known(coordinator, refused_count=1, suspect_count=0)
        settings = coordinator.settings
    async with nodes(tmp_path, 1) as (coordinator, linked):
        failure = await failure_of(await asked(coordinator, KILLER))
        assert failure.code is ErrorCode.REQUEST_REFUSED
        assert b"potluck_requests_refused_for_good 1.0" in coordinator.gateway._metrics.render()
        asking = await asked(coordinator, INNOCENT)
        await answer_in_full(*await started(linked, INNOCENT), asking)
        assert all(start.body != KILLER for start in linked[0].starts())
    (line,) = await refused(settings, None)
    number = line.split()[0]
    assert number in failure.message
    with pytest.raises(PotluckError, match="No request"):
        await refused(settings, "00" * 16)
    (document,) = await refused(settings, None, as_json=True)
    assert [one["number"] for one in json.loads(document)] == [number]
    assert await refused(settings, number) == [f"{number} is refused no longer.", NODES_GO_ON]
    assert await refused(settings, None) == ["No request is refused for good."]
    async with nodes(tmp_path, 1) as (coordinator, linked):
        asking = await asked(coordinator, KILLER)
        await answer_in_full(*await started(linked, KILLER), asking)


async def test_nothing_of_it_is_written_that_could_be_guessed_without_the_pools_key(tmp_path):
    async with nodes(tmp_path, 1) as (coordinator, linked):
        await kill(coordinator, linked, KILLER, [])
        await known(coordinator, refused_count=0, suspect_count=1)
    key_file = tmp_path / "fingerprint_key"
    assert key_file.stat().st_mode & 0o777 == 0o600
    books = b"".join(file.read_bytes() for file in tmp_path.glob("potluck.db*"))
    assert KILLER not in books
    assert key_file.read_bytes() not in books
    key_file.unlink()
    async with nodes(tmp_path, 1) as (coordinator, linked):
        culprits, (kept,) = coordinator.gateway._links.culprits, coordinator.gateway._links.suspect_requests
        assert culprits.fingerprint(Endpoint.CHAT_COMPLETIONS, KILLER) != kept


async def test_whoever_was_beside_a_new_killer_each_time_is_not_refused_for_good(tmp_path):
    clock = ShiftedClock()
    async with nodes(tmp_path, 1, clock=clock) as (coordinator, (node,)):
        dead: list[node_pb2.StartAttempt] = []
        for number in range(2):
            killer = b'{"killer":%d}' % number
            asking = [await asked(coordinator, body) for body in (killer, INNOCENT)]
            starts = [(await started([node], body, besides=dead))[1] for body in (killer, INNOCENT)]
            dead += starts
            await die(node, *starts)
            for one in asking:
                await failure_of(one)
        assert (await failure_of(await asked(coordinator, INNOCENT))).code is ErrorCode.REQUEST_REFUSED, "for a while"
        assert not coordinator.gateway._links.refused_requests
        assert not coordinator.gateway._links.suspect_requests
        clock.shift_seconds += REFUSED_KEPT_SECONDS + 1
        await node.beat()
        asking = await asked(coordinator, INNOCENT)
        _, start = await started([node], INNOCENT, besides=dead)
        await answer_in_full(node, start, asking)


async def leave(coordinator: Coordinator, node: RawNode, body: bytes) -> node_pb2.StartAttempt:
    """A client asks, and hangs up as soon as its request is at the node."""
    leaver = await asked(coordinator, body)
    _, start = await started([node], body)
    leaver.cancel()
    await asyncio.wait([leaver])
    return start


@pytest.mark.parametrize(
    ("leaver", "counts"),
    [(KILLER, (0, 1)), (INNOCENT, (1,))],
    ids=["another request, and the second engine was left by nobody", "the same request"],
)
async def test_an_engine_that_somebody_else_just_left_is_nobodys_lone_death(tmp_path, leaver, counts):
    async with nodes(tmp_path, 1) as (coordinator, (node,)):
        dead = [await leave(coordinator, node, leaver)]
        for counted in counts:
            await kill(coordinator, [node], INNOCENT, dead)
            await asyncio.gather(*coordinator.gateway._links._closings)
            assert len(await coordinator.directory._store.run(lambda work: work.lethal_requests.all())) == counted


async def test_one_that_hangs_up_before_its_engine_dies_is_suspected_with_those_that_stay(tmp_path):
    async with nodes(tmp_path, 1) as (coordinator, (node,)):
        staying = await asked(coordinator, INNOCENT)
        _, stays = await started([node], INNOCENT)
        await leave(coordinator, node, KILLER)
        await die(node, stays)
        assert (await failure_of(staying)).code is ErrorCode.ENGINE_FAILED
        staying = await asked(coordinator, INNOCENT)
        _, stays = await started([node], INNOCENT, 1)
        killing = await asked(coordinator, KILLER)
        other = await asked(coordinator, OTHER)
        await answer_in_full(*await started([node], OTHER), other)
        assert [start.body for start in node.starts()].count(KILLER) == 1, "the two are kept apart"
        await answer_in_full(node, stays, staying)
        await die(*await started([node], KILLER, 1))
        assert (await failure_of(killing)).code is ErrorCode.REQUEST_REFUSED, "both engines died of it"
        staying = await asked(coordinator, INNOCENT)
        await answer_in_full(*await started([node], INNOCENT, 2), staying)


async def test_an_owner_whose_node_will_not_take_a_request_keeps_it_from_no_refusal(tmp_path):
    async with nodes(tmp_path, 2, owners=2) as (coordinator, (node, unwilling)):

        async def turn_away() -> None:
            for number in itertools.count():
                start = await unwilling.next_start(number)
                await unwilling.end(start.attempt_id, 0, EndReason.REFUSED)

        turning_away = asyncio.ensure_future(turn_away())
        try:
            for number, (refused_count, suspect_count) in enumerate([(0, 1), (1, 0)]):
                asking = await asked(coordinator, KILLER)
                await die(*await started([node], KILLER, number))
                await failure_of(asking)
                await known(coordinator, refused_count=refused_count, suspect_count=suspect_count)
            assert unwilling.starts(), "it was asked before the engine's own owner was believed"
        finally:
            turning_away.cancel()


async def test_one_owners_word_is_not_enough_while_anothers_nodes_can_be_asked(tmp_path):
    async with nodes(tmp_path, 4, owners=2) as (coordinator, linked):
        asking = await asked(coordinator, KILLER)
        first, start = await started(linked, KILLER)
        await die(first, start)
        second, start = await started(linked, KILLER, besides=[start])
        await known(coordinator, refused_count=0, suspect_count=1)
        assert linked.index(first) % 2 != linked.index(second) % 2, "another owner's node is asked"
        # Meanwhile the other nodes are there for everybody else.
        others = [await asked(coordinator, OTHER) for _ in range(3)]
        await until(lambda: sum(start.body == OTHER for node in linked for start in node.starts()) == 3)
        assert all(start.body != OTHER for start in second.starts())
        await answer_in_full(second, start, asking)
        await known(coordinator, refused_count=0, suspect_count=0)
        for one in others:
            one.cancel()


async def test_a_suspect_waits_for_another_owners_node_and_is_refused_where_none_can_be_asked(tmp_path):
    async with nodes(tmp_path, 2, owners=2) as (coordinator, linked):
        asking = await asked(coordinator, KILLER)
        first, killed = await started(linked, KILLER)
        (second,) = [node for node in linked if node is not first]
        await say(coordinator, second, NodeState.PAUSED)
        await die(first, killed)
        await failure_of(asking)
        await say(coordinator, second, NodeState.SERVING)
        await known(coordinator, refused_count=0, suspect_count=1)
        others = [await asked(coordinator, OTHER) for _ in range(4)]
        await until(lambda: all(sum(start.body == OTHER for start in node.starts()) == 2 for node in linked))
        asking = await asked(coordinator, KILLER)
        for start in first.starts():
            if start.body == OTHER:
                await first.chunk(start.attempt_id, 0, token("one") + USAGE_EVENT + DONE)
                await first.end(start.attempt_id, 1)
        answered = [await one for one in await first_done(others, 2)]
        for answer in answered:
            await read_all(answer)
        assert [start.body for start in first.starts()].count(KILLER) == 1, "it is free, but it was its owner's that died"
        await second.beat(NodeState.PAUSED)
        node, start = await started(linked, KILLER, besides=[killed])
        assert node is first, "nobody else can be asked any more"
        await die(node, start)
        await failure_of(asking)
        await known(coordinator, refused_count=1, suspect_count=0)
        for one in others:
            one.cancel()


async def say(coordinator: Coordinator, node: RawNode, state: NodeState) -> None:
    """The node says it, and the gateway has heard it."""
    await node.beat(state)
    await until(lambda: coordinator.gateway._links.session(node.credentials.node_id).state is state)


async def first_done(tasks: list[asyncio.Future], count: int) -> list[asyncio.Future]:
    async with asyncio.timeout(5):
        while len(done := [task for task in tasks if task.done()]) < count:
            await asyncio.sleep(0.01)
    return done


async def test_a_suspect_that_is_not_sent_again_is_forgotten_by_and_by(tmp_path):
    clock = ShiftedClock()
    async with nodes(tmp_path, 1, clock=clock) as (coordinator, linked):
        await kill(coordinator, linked, KILLER, [])
        await known(coordinator, refused_count=0, suspect_count=1)
        clock.shift_seconds += SUSPECT_KEPT_MS / 1000
        await known(coordinator, refused_count=0, suspect_count=0)
