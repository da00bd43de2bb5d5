"""The modelled engine against arithmetic that can be done by hand, and against queueing theory."""

from __future__ import annotations

import math
from random import Random

import pytest

from potluck_coordinator.simulation.engine_model import Engine, EngineModel, Happening, Prefix, Sequence, Stage, WhenFull

MODEL = EngineModel(
    prefill_tokens_per_second=1000, step_seconds=0.02, step_seconds_per_answer=0.001, kv_tokens=10_000, prefill_chunk_tokens=100
)


class Bench:
    """An engine and its time."""

    def __init__(self, model: EngineModel = MODEL) -> None:
        self.engine = Engine(model, 0.0)
        self.now = 0.0
        self.happened: list[tuple[float, Happening, Sequence | None]] = []

    def submit(self, prompt_tokens: int, answer_tokens: int, *prefixes: Prefix) -> Sequence:
        sequence = Sequence(None, prompt_tokens, answer_tokens, prefixes)
        self.engine.submit(sequence, self.now)
        return sequence

    def run(self, until: float = math.inf) -> None:
        while (due := self.engine.due_seconds()) != math.inf and self.now + due <= until:
            self.now += due
            self.happened += [(self.now, *each) for each in self.engine.proceed(self.now)]
            if self.happened and self.happened[-1][1] is Happening.DIED:
                return
        if until != math.inf:
            self.now = until

    def at(self, happening: Happening, sequence: Sequence | None) -> float:
        (found,) = [at for at, what, whose in self.happened if what is happening and whose is sequence]
        return found


def test_one_request_alone_takes_its_prompt_and_then_a_step_for_each_token() -> None:
    bench = Bench()
    sequence = bench.submit(500, 101)
    bench.run()

    assert bench.at(Happening.FIRST_TOKEN, sequence) == pytest.approx(0.5)
    assert bench.at(Happening.FINISHED, sequence) == pytest.approx(0.5 + 100 * 0.021)


def test_a_prompt_that_is_read_slows_the_answers_by_a_chunk_a_step() -> None:
    bench = Bench()
    first = bench.submit(100, 101)
    bench.run(0.1)
    second = bench.submit(200, 1)
    bench.run()

    # Two chunks of 0.1 s, each within a step of 0.021 s: the first answer gets two tokens meanwhile, and the others at its own pace.
    assert bench.at(Happening.FIRST_TOKEN, second) == pytest.approx(0.1 + 2 * 0.121)
    assert bench.at(Happening.FINISHED, first) == pytest.approx(0.1 + 2 * 0.121 + 98 * 0.021)


def test_a_batch_goes_at_the_pace_of_its_size_and_each_gets_its_own_tokens() -> None:
    bench = Bench()
    sequences = [bench.submit(1, 1 + 50 * number) for number in range(1, 5)]
    bench.run()

    ends = [bench.at(Happening.FINISHED, sequence) for sequence in sequences]
    starts = bench.at(Happening.FIRST_TOKEN, sequences[-1])
    assert ends == sorted(ends)
    for one, (batch, steps) in zip((0, 1, 2), ((3, 50), (2, 50), (1, 50)), strict=True):
        assert ends[one + 1] - ends[one] == pytest.approx(steps * (0.02 + 0.001 * batch), rel=0.03)
    assert ends[0] - starts == pytest.approx(50 * 0.024, rel=0.05)


def test_tokens_in_are_tokens_out_whatever_comes_in_between() -> None:
    random = Random(7)
    bench = Bench(EngineModel(1000, 0.02, 0.001, kv_tokens=1500, prefill_chunk_tokens=100))
    sequences = []
    for _ in range(60):
        sequences.append(bench.submit(random.randint(1, 300), random.randint(1, 400)))
        bench.run(bench.now + random.expovariate(1.0))
        if random.random() < 0.2:
            bench.engine.set_speed(random.uniform(0.3, 1.0), random.uniform(0.3, 1.0), bench.now)
    wanted = [(sequence, sequence.tokens_before + sequence.to_go) for sequence in sequences]
    bench.run()

    assert bench.engine.preempted_count > 0
    assert all(sequence.stage is Stage.OVER for sequence in sequences)
    assert [bench.engine.produced(sequence, bench.now) for sequence, _ in wanted] == [tokens for _, tokens in wanted]
    assert bench.engine.kv_tokens == pytest.approx(0.0, abs=1e-3)
    assert sum(what is Happening.FINISHED for _, what, _ in bench.happened) == 60


def test_a_full_cache_puts_the_newest_out_and_it_goes_on_later_from_what_it_had() -> None:
    bench = Bench(EngineModel(1000, 0.02, 0.001, kv_tokens=500, prefill_chunk_tokens=100))
    old, new = bench.submit(100, 250), bench.submit(100, 250)
    bench.run()

    assert bench.engine.preempted_count >= 1
    assert bench.at(Happening.FINISHED, old) < bench.at(Happening.FINISHED, new)
    assert new.prompt_tokens > 100
    assert new.tokens_before == 250


def test_an_engine_without_paging_dies_of_a_full_cache() -> None:
    bench = Bench(EngineModel(1000, 0.02, 0.001, kv_tokens=500, when_full=WhenFull.DIE))
    bench.submit(200, 200)
    bench.submit(200, 200)
    bench.run(100.0)

    assert bench.happened[-1][1] is Happening.DIED


@pytest.mark.parametrize("when_full", list(WhenFull))
def test_what_an_empty_cache_has_no_room_for_never_runs(when_full: WhenFull) -> None:
    engine = Engine(EngineModel(1000, 0.02, 0.001, kv_tokens=500, when_full=when_full), 0.0)
    for prompt_tokens in (20_000, 500):
        assert not engine.submit(Sequence(None, prompt_tokens, 50), 0.0)
    assert engine.due_seconds() == math.inf
    assert engine.kv_tokens == 0


@pytest.mark.parametrize("when_full", list(WhenFull))
def test_an_answer_takes_its_time_and_ends_where_the_context_does(when_full: WhenFull) -> None:
    bench = Bench(EngineModel(1000, 0.02, 0.001, kv_tokens=500, prefill_chunk_tokens=100, when_full=when_full))
    sequence = bench.submit(450, 200)
    bench.run()

    assert sequence.tokens_before == 50
    assert bench.at(Happening.FINISHED, sequence) - bench.at(Happening.FIRST_TOKEN, sequence) == pytest.approx(49 * 0.021)
    # A context that is shorter than the cache ends it sooner.
    engine = Engine(bench.engine.model, 0.0, context_tokens=460)
    assert engine.submit(short := Sequence(None, 450, 200), 0.0)
    assert short.to_go == 10


def own(key: str, tokens: int) -> Prefix:
    """A session's, which has all that it said so far."""
    return Prefix(key, tokens, grows=True)


def test_a_kept_prefix_is_not_read_again_and_the_longest_unused_gives_way_from_its_end() -> None:
    bench = Bench(EngineModel(1000, 0.02, 0.001, kv_tokens=1000))
    bench.submit(400, 10, own("ana", 0), Prefix("all", 100))
    bench.run()
    again = bench.submit(450, 10, own("ana", 410), Prefix("all", 100))
    bench.run()
    other = bench.submit(200, 10, own("ben", 0), Prefix("all", 100))
    bench.run()
    assert (again.hit_tokens, other.hit_tokens) == (410, 100)

    # 460 of ana, 210 of ben and 100 of all are kept; 600 more take 370 of ana's.
    bench.submit(590, 10, own("eve", 0))
    bench.run()
    assert bench.engine.cached_tokens((own("ana", 460),)) == 460 - 370
    assert bench.engine.cached_tokens((own("ben", 210),)) == 210

    bench.submit(980, 10, own("eve", 0))
    bench.run()
    assert bench.engine.cached_tokens((own("ana", 460),)) == 0


def test_a_sessions_past_is_held_once_while_it_is_answered() -> None:
    bench = Bench(EngineModel(1000, 0.02, 0.001, kv_tokens=1000))
    bench.submit(400, 10, own("ben", 0))
    bench.run()
    bench.submit(390, 10, own("ana", 0))
    bench.run()
    bench.submit(500, 50, own("ana", 400))
    bench.run()

    # 410 and 550 fit beside each other; with ana's first 400 held twice, ben's would have gone.
    assert bench.engine.cached_tokens((own("ben", 410),)) == 410
    assert bench.engine.cached_tokens((own("ana", 550),)) == 550


@pytest.mark.parametrize(("until", "kept"), [(0.2, 200), (0.5 + 10 * 0.021, 511)])
def test_what_was_read_and_answered_before_its_client_went_is_kept(until: float, kept: int) -> None:
    bench = Bench()
    sequence = bench.submit(500, 101, own("ana", 0))
    bench.run(until)
    bench.engine.cancel(sequence, bench.now)
    bench.run()

    assert bench.engine.cached_tokens((own("ana", 10_000),)) == kept
    assert bench.engine.kv_tokens == 0


def test_a_frozen_engine_makes_nothing_and_goes_on_where_it_was() -> None:
    bench = Bench()
    sequence = bench.submit(100, 101)
    bench.run(1.0)
    before = bench.engine.produced(sequence, 1.0)
    bench.engine.stop_or_go(1.0, stopped=True)
    bench.now = 11.0
    assert bench.engine.produced(sequence, 11.0) == before
    bench.engine.stop_or_go(11.0, stopped=False)
    bench.run()

    assert bench.at(Happening.FINISHED, sequence) == pytest.approx(10.0 + 0.1 + 100 * 0.021)


def test_one_at_a_time_is_the_queue_of_the_textbook() -> None:
    """M/M/1: Poisson arrivals, exponential lengths, one server; at 70 % the mean stay is the mean service over 0.3."""
    random = Random(11)
    bench = Bench(EngineModel(1e9, 0.01, 0.0, kv_tokens=10**9, batch_max=1))
    service_seconds, load, count = 1.0, 0.7, 6_000
    arrived: dict[int, float] = {}
    for _ in range(count):
        at = bench.now + random.expovariate(load / service_seconds)
        bench.run(at)
        sequence = bench.submit(1, 1 + round(random.expovariate(0.01 / service_seconds)))
        arrived[id(sequence)] = at
    bench.run()
    ends = {id(whose): at for at, what, whose in bench.happened if what is Happening.FINISHED}
    stays = [ends[key] - at for key, at in arrived.items() if key in ends]

    assert len(stays) == count
    assert sum(stays) / count == pytest.approx(service_seconds / (1 - load), rel=0.15)
    # Little's law: requests in the system = arrivals a second x their stay; by the time that the engine was busy, the load.
    assert bench.engine.busy_seconds / bench.now == pytest.approx(load, rel=0.03)
