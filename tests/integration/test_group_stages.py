"""Stages of a group under the supervisor: what a member says, and that a failed one waits for the next generation."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace

from potluck_node.domain.plan import LocalLimits
from potluck_node.orders import Orders
from potluck_node.peer_measurement import PeerMeasuring
from potluck_protocol.clock import SystemClock
from potluck_protocol.values import DesiredState, EngineState, GroupOffer, GroupPlace, NodeId, Peer
from tests.support.engines import MovedClock, children_of, pinned, running, script_file, supervisor_of, wished
from tests.support.node_engine import FixedReplicas

LIMITS = LocalLimits(frozenset({"scripted"}), group_offer=GroupOffer("lab", "10.0.0.2", 29600))
MEMBER = GroupPlace("group/tiny/0", 3, 1, "10.0.0.1", 29600, "10.0.0.2", (5, 5))
LEADER = replace(MEMBER, rank=0, leader_address="10.0.0.2")


def stage(tmp_path, place):
    return replace(wished(pinned(script_file(tmp_path)), replica_id="group/tiny/0"), group=place)


async def test_a_member_stands_without_an_address_and_says_which_stage_it_is(tmp_path):
    async with running(supervisor_of(tmp_path, SystemClock(), limits=LIMITS)) as node:
        wish = stage(tmp_path, MEMBER)
        node.wish(wish)
        status = await node.until_state(EngineState.READY)
        assert (status.group_id, status.group_rank, status.group_generation, status.endpoints) == ("group/tiny/0", 1, 3, ())
        assert node.supervisor.ready_address(wish.replica_id) is None
        assert await node.supervisor.answers(wish.replica_id, token_seconds_max=1.0)


async def test_a_leader_is_ready_when_it_has_answered_and_can_be_asked(tmp_path):
    async with running(supervisor_of(tmp_path, SystemClock(), limits=LIMITS)) as node:
        wish = stage(tmp_path, LEADER)
        node.wish(wish)
        status = await node.until_state(EngineState.READY)
        assert (status.group_rank, status.group_generation) == (0, 3)
        assert status.endpoints
        assert node.supervisor.ready_address(wish.replica_id) is not None


async def test_a_killed_stage_is_not_started_again_before_the_next_generation(tmp_path):
    clock = MovedClock()
    async with running(supervisor_of(tmp_path, clock, limits=LIMITS)) as node:
        node.wish(stage(tmp_path, MEMBER))
        await node.until_state(EngineState.READY)
        (pid,) = children_of(os.getpid())
        os.kill(pid, signal.SIGKILL)
        failed = await node.until_state(EngineState.BACKING_OFF)
        assert (failed.group_generation, "SIGKILL" in failed.failure) == (3, True)
        clock.now_seconds += 3_600
        node.wish(stage(tmp_path, MEMBER))
        await asyncio.sleep(0.1)
        assert node.supervisor.statuses()[0].state is EngineState.BACKING_OFF
        node.wish(stage(tmp_path, replace(MEMBER, generation=4)))
        ready = await node.until_state(EngineState.READY)
        assert ready.group_generation == 4


async def test_the_end_of_the_lease_ends_stages_and_measuring_and_leaves_whole_engines_alone(tmp_path):
    replicas, peers = FixedReplicas(None), PeerMeasuring(NodeId("a" * 26), LIMITS.group_offer, MovedClock())
    orders = Orders(None, replicas, peers)
    whole = wished(pinned(script_file(tmp_path)), replica_id="whole")
    peer = Peer(NodeId("b" * 26), "10.0.0.1", 29601, b"s" * 32, dial=True)
    orders.wish(DesiredState(5, (whole, stage(tmp_path, MEMBER)), (peer,)), outright=False)
    assert list(peers._lines) == ["b" * 26]
    orders.lease_ended()
    assert [engine.replica_id for engine in replicas.desired[-1].engines] == ["whole"]
    assert not peers._lines
    orders.wish(DesiredState(1, (stage(tmp_path, MEMBER),)), outright=True)
    assert replicas.desired[-1].engines[0].group == MEMBER
    orders.wish(DesiredState(2, (whole,)), outright=False)
    orders.lease_ended()
    assert len(replicas.desired) == 4
