"""When an engine counts as standing still as a whole, what then becomes of its attempts, and when it is asked again."""

from __future__ import annotations

import asyncio
import itertools
import math

import psutil
import pytest

from potluck_node.engine_watches import EngineWatches
from potluck_node.frozen_engines import FROZEN_SECONDS_MAX, GROWN_FACTOR, SILENT_SECONDS_MIN, FrozenEngines, processor_seconds
from potluck_node.replicas import Residence
from potluck_protocol.values import AttemptId, Endpoint, EndReason, StartAttempt
from tests.support.engines import MovedClock
from tests.support.node_engine import REPLICA

START = StartAttempt(AttemptId("a1"), REPLICA, Endpoint.COMPLETIONS, b"", stream=True, window_bytes=1)


class Node:
    """One engine, and one who waits for it."""

    def __init__(self, *, answers=False, used_seconds=lambda _: 7.0):
        self.clock = MovedClock()
        self.watches = EngineWatches(self.clock.monotonic_seconds)
        self.is_answering = answers
        self.asked_count = 0
        self.lives_at = Residence(42)
        self.ended: list[tuple] = []
        self.frozen = FrozenEngines(attempts=self, replicas=self, clock=self.clock, used_seconds=used_seconds)

    def end_running(self, reason, detail, replica_id):
        self.ended.append((reason, replica_id))
        return 1

    def residence(self, replica_id):
        return self.lives_at

    def end_hung(self, replica_id, why):
        self.ended.append(("hung", replica_id))

    async def answers(self, replica_id, *, token_seconds_max):
        assert token_seconds_max is None
        self.asked_count += 1
        if not self.is_answering:
            raise TimeoutError
        return True

    async def look(self, seconds=0.0):
        self.clock.now_seconds += seconds
        self.frozen.look()
        while self.frozen._questions:
            await asyncio.gather(*self.frozen._questions.values())


async def test_one_that_says_nothing_and_uses_no_time_loses_its_attempts_and_gets_no_more():
    node = Node()
    node.watches.listen(START).heard()
    await node.look(SILENT_SECONDS_MIN - 0.1)
    assert (node.asked_count, node.ended) == (0, [])
    await node.look(0.1)
    assert node.ended == [(EndReason.ENGINE_FAILED, REPLICA)]
    assert node.watches.frozen == {REPLICA}


def ever_more():
    """The processor time of one that is at work."""
    times = itertools.count(1)
    return lambda _: float(next(times))


@pytest.mark.parametrize(
    "node",
    [Node(answers=True), Node(used_seconds=ever_more()), Node(used_seconds=lambda _: None)],
    ids=["it answers", "it is busy", "it is gone"],
)
async def test_one_that_says_a_word_is_at_work_or_has_ended_is_left_alone(node):
    node.watches.listen(START).heard()
    await node.look(10.0)
    assert node.asked_count > 0
    assert (node.ended, node.watches.frozen) == ([], set())


async def test_an_owners_own_server_is_never_judged():
    node = Node()
    node.lives_at = None
    node.watches.listen(START).heard()
    await node.look(100.0)
    assert (node.asked_count, node.ended) == (0, [])


async def test_nobody_who_waits_is_no_silence():
    node = Node()
    node.watches.listen(START).close()
    await node.look(100.0)
    assert node.asked_count == 0


async def test_one_that_answers_is_asked_again_as_its_silence_grows():
    node = Node(answers=True)
    node.watches.listen(START).heard()
    for _ in range(240):
        await node.look(0.25)
    assert node.asked_count == 1 + math.floor(math.log(60 / SILENT_SECONDS_MIN, GROWN_FACTOR))


async def test_one_that_moves_again_takes_attempts_again_and_one_that_does_not_is_ended():
    node = Node()
    ear = node.watches.listen(START)
    await node.look(1.0)
    ear.close()
    assert node.watches.frozen == {REPLICA}
    node.is_answering = True
    await node.look(1.0)
    assert node.watches.frozen == set()
    node.is_answering = False
    node.watches.listen(START)
    await node.look(1.0)
    node.ended.clear()
    await node.look(FROZEN_SECONDS_MAX)
    assert node.ended == []
    await node.look(0.1)
    assert node.ended == [("hung", REPLICA)]


async def test_processor_time_is_that_of_all_its_processes():
    busy = await asyncio.create_subprocess_exec("sh", "-c", "(i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; sleep 30) & wait")
    try:
        async with asyncio.timeout(20):
            while (processor_seconds(busy.pid) or 0.0) < 0.05:
                await asyncio.sleep(0.05)
    finally:
        for process in (*psutil.Process(busy.pid).children(recursive=True), busy):
            process.kill()
        await busy.wait()
    assert processor_seconds(busy.pid) is None
