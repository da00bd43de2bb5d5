"""When an attempt without tokens is moved: the table, how long a frozen machine takes to be found, and how rarely a busy one is."""

from __future__ import annotations

import bisect
import math
import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.stall import (
    ANSWER_SECONDS,
    GAP_BUCKETS,
    GAPS_KEPT_MAX,
    PREFILL_SECONDS_MAX,
    Quiet,
    Stall,
    faded,
    gap_p99_seconds,
    judge,
    prefill_seconds,
)

BEAT = 1.0
STREAM = Quiet(
    attempt_seconds=0.0,
    node_seconds=0.0,
    asked_seconds=None,
    streams=True,
    begun=True,
    gap_p99_seconds=0.064,
    round_trip_seconds=0.0,
    prefill_seconds=0.0,
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attempt_seconds": 0.6, "node_seconds": 0.6}, Stall.NONE),
        ({"attempt_seconds": 0.7, "node_seconds": 0.7}, Stall.ASK),
        ({"attempt_seconds": 1.5, "node_seconds": 1.5, "asked_seconds": 0.8}, Stall.NONE),
        ({"attempt_seconds": 1.6, "node_seconds": 1.6, "asked_seconds": 0.9}, Stall.NODE),
        ({"attempt_seconds": 1.7, "node_seconds": 1.7, "asked_seconds": 1.0, "round_trip_seconds": 0.2}, Stall.NONE),
        ({"attempt_seconds": 1.8, "node_seconds": 1.8, "asked_seconds": 1.1, "round_trip_seconds": 0.2}, Stall.NODE),
        # Its agent says something, an answer or the tokens of others: it is the engine's.
        ({"attempt_seconds": 2.9, "node_seconds": 0.1}, Stall.NONE),
        ({"attempt_seconds": 3.0, "node_seconds": 0.1}, Stall.ENGINE),
        ({"attempt_seconds": 3.0, "node_seconds": 0.1, "prefill_seconds": 2.0}, Stall.NONE),
        ({"attempt_seconds": 5.0, "node_seconds": 0.1, "prefill_seconds": 2.0}, Stall.ENGINE),
        # Tokens of this replica are mostly slow.
        ({"attempt_seconds": 1.5, "node_seconds": 1.5, "gap_p99_seconds": 0.512}, Stall.NONE),
        ({"attempt_seconds": 1.6, "node_seconds": 1.6, "gap_p99_seconds": 0.512}, Stall.ASK),
        ({"attempt_seconds": 1.9, "node_seconds": 1.9, "gap_p99_seconds": 30.0}, Stall.NONE),
        ({"attempt_seconds": 2.0, "node_seconds": 2.0, "gap_p99_seconds": 30.0}, Stall.ASK),
        ({"attempt_seconds": 10.0, "node_seconds": 0.1, "gap_p99_seconds": 1.024}, Stall.NONE),
        ({"attempt_seconds": 10.3, "node_seconds": 0.1, "gap_p99_seconds": 1.024}, Stall.ENGINE),
        # What is usual is not known.
        ({"attempt_seconds": 1.4, "node_seconds": 1.4, "gap_p99_seconds": None}, Stall.NONE),
        ({"attempt_seconds": 1.5, "node_seconds": 1.5, "gap_p99_seconds": None}, Stall.ASK),
        ({"attempt_seconds": 9.9, "node_seconds": 0.1, "gap_p99_seconds": None}, Stall.NONE),
        ({"attempt_seconds": 10.0, "node_seconds": 0.1, "gap_p99_seconds": None}, Stall.ENGINE),
        # Before the first token only the node's own silence counts, until the prompt has had its time.
        ({"attempt_seconds": 1.4, "node_seconds": 1.4, "begun": False}, Stall.NONE),
        ({"attempt_seconds": 1.5, "node_seconds": 1.5, "begun": False}, Stall.ASK),
        ({"attempt_seconds": 9.9, "node_seconds": 0.5, "begun": False}, Stall.NONE),
        ({"attempt_seconds": 10.0, "node_seconds": 0.5, "begun": False}, Stall.ENGINE),
        ({"attempt_seconds": 50.0, "node_seconds": 0.5, "begun": False, "prefill_seconds": 50.0}, Stall.NONE),
        # A node that was idle had nothing to say before this attempt came.
        ({"attempt_seconds": 0.2, "node_seconds": 4.9, "begun": False}, Stall.NONE),
        ({"attempt_seconds": 1.5, "node_seconds": 6.2, "begun": False}, Stall.ASK),
        # An answer in one piece has no gaps.
        ({"attempt_seconds": 500.0, "node_seconds": 0.5, "streams": False}, Stall.NONE),
        ({"attempt_seconds": 500.0, "node_seconds": 2.6, "asked_seconds": 1.0, "streams": False}, Stall.NODE),
    ],
)
def test_silence_means_what_the_table_says(changes, expected):
    assert judge(replace(STREAM, **changes), BEAT) is expected


_QUIETS = st.builds(
    Quiet,
    attempt_seconds=st.floats(0, 700),
    node_seconds=st.floats(0, 700),
    asked_seconds=st.none() | st.floats(0, 700),
    streams=st.booleans(),
    begun=st.booleans(),
    gap_p99_seconds=st.none() | st.floats(0, 40),
    round_trip_seconds=st.floats(0, 2),
    prefill_seconds=st.floats(0, PREFILL_SECONDS_MAX),
)


@given(quiet=_QUIETS)
def test_no_node_is_given_up_that_was_not_asked_or_has_just_said_something(quiet):
    verdict = judge(quiet, BEAT)
    if verdict is Stall.NODE:
        assert quiet.asked_seconds is not None
        assert min(quiet.asked_seconds, quiet.node_seconds) >= 0.7
        assert quiet.asked_seconds >= 0.9 + quiet.round_trip_seconds
    if verdict is not Stall.NONE:
        assert quiet.attempt_seconds >= 0.7
    if verdict is Stall.ENGINE:
        assert quiet.streams
        assert quiet.attempt_seconds >= 3.0


@given(quiet=_QUIETS, longer=st.floats(0, 100))
def test_longer_silence_never_clears_a_stalled_engine(quiet, longer):
    if judge(quiet, BEAT) is Stall.ENGINE:
        assert judge(replace(quiet, attempt_seconds=quiet.attempt_seconds + longer), BEAT) is Stall.ENGINE


@given(gaps_ms=st.lists(st.floats(0.01, 30_000), min_size=30, max_size=300))
def test_what_is_rare_is_no_less_than_it_is_and_no_more_than_its_double(gaps_ms):
    counts = [0] * GAP_BUCKETS
    for gap in gaps_ms:
        counts[min(int(gap).bit_length(), GAP_BUCKETS - 1)] += 1
    rare_ms = sorted(gaps_ms)[-math.ceil(len(gaps_ms) / 100)]
    found = gap_p99_seconds(counts)
    assert found is not None
    assert rare_ms / 1000 <= found <= max(0.001, 2 * rare_ms / 1000)


def test_too_few_gaps_say_nothing():
    assert gap_p99_seconds([0, 29]) is None
    assert gap_p99_seconds([0, 30]) is not None


@given(counts=st.lists(st.integers(0, 2000), min_size=GAP_BUCKETS, max_size=GAP_BUCKETS))
def test_counts_fade_and_keep_their_shape(counts):
    after = faded(counts)
    assert list(after) == counts if sum(counts) <= GAPS_KEPT_MAX else all(2 * new <= old for new, old in zip(after, counts, strict=True))


def test_prompts_take_their_time_one_behind_the_other_and_within_a_bound():
    assert prefill_seconds([1000, 500], 500.0) == 3.0
    assert prefill_seconds([100], None) == 2.0
    assert prefill_seconds([100], 0.0) == 2.0
    assert prefill_seconds([10**7], 500.0) == PREFILL_SECONDS_MAX


@dataclass
class World:
    """One stream of one node on virtual time: tokens, heartbeats and answers as its machine lets them.

    It is judged four times a second, and once more when the answer to a question is overdue.
    """

    draw: random.Random
    gap_median: float
    gap_sigma: float
    still_every_seconds: float = math.inf
    still_seconds: float = 0.0
    """The whole machine, or its line, stands still so often on average, for up to so long."""
    freezes_at: float = math.inf

    def run(self, seconds: float) -> tuple[float, Stall]:
        """When it was given up, and why; (inf, NONE) where it never was."""
        self._stills = self._drawn_stills(seconds)
        counts, token_at, heard_at = [0] * GAP_BUCKETS, 0.0, 0.0
        asked_at: float | None = None
        due = [(self._next_token(0.0), "token"), (1.0, "beat")]
        now = 0.0
        while now < seconds:
            overdue_at = math.inf if asked_at is None else asked_at + ANSWER_SECONDS + 0.002
            next_look_at = now + 0.25 + self.draw.uniform(0, 0.05)
            now = min(next_look_at, overdue_at) if overdue_at > now else next_look_at
            while due[0][0] <= now:
                heard_at, what = due.pop(0)
                if what == "token":
                    counts[min(int((heard_at - token_at) * 1000).bit_length(), GAP_BUCKETS - 1)] += 1
                    token_at = heard_at
                    due.append((self._next_token(heard_at), "token"))
                elif what == "beat":
                    due.append((self._lively(heard_at + 1.0), "beat"))
                due.sort()
            asked_at = None if asked_at is not None and heard_at > asked_at else asked_at
            asked_seconds = None if asked_at is None else now - asked_at
            verdict = judge(Quiet(now - token_at, now - heard_at, asked_seconds, True, True, gap_p99_seconds(counts), 0.0, 0.0), BEAT)
            if verdict is Stall.ASK:
                asked_at = now
                due.append((self._lively(now + self.draw.uniform(0.01, 0.3)), "answer"))
                due.sort()
            elif verdict is not Stall.NONE:
                return now, verdict
            counts = list(faded(counts))
        return math.inf, Stall.NONE

    def _drawn_stills(self, seconds: float) -> list[tuple[float, float]]:
        stills, at = [], 0.0
        while math.isfinite(self.still_every_seconds) and at < seconds:
            begins_at = at + 0.5 + self.draw.expovariate(1 / self.still_every_seconds)
            at = begins_at + self.draw.uniform(0, self.still_seconds)
            stills.append((begins_at, at))
        return [*stills, (self.freezes_at, math.inf)]

    def _lively(self, at: float) -> float:
        """When what was to happen then really happens."""
        for begins_at, ends_at in self._stills[bisect.bisect_left(self._stills, (at - 100,)) :]:
            if begins_at > at:
                break
            at = max(at, ends_at)
        return at

    def _next_token(self, at: float) -> float:
        return self._lively(at + self.draw.lognormvariate(math.log(self.gap_median), self.gap_sigma))


@pytest.mark.parametrize(("gap_median", "gap_sigma"), [(0.012, 0.3), (0.05, 0.5), (0.1, 0.5)])
def test_a_frozen_machine_is_given_up_within_two_seconds_or_three_where_tokens_are_slow(gap_median, gap_sigma):
    for seed in range(60):
        draw = random.Random(seed)
        freezes_at = draw.uniform(10, 20)
        given_up_at, why = World(draw, gap_median, gap_sigma, freezes_at=freezes_at).run(40)
        assert why is Stall.NODE
        assert given_up_at - freezes_at <= (2.0 if gap_median < 0.1 else 3.2)


@pytest.mark.parametrize(
    ("name", "gap_median", "gap_sigma", "still_every_seconds", "still_seconds"),
    [
        ("an idle machine", 0.012, 0.3, math.inf, 0.0),
        ("two cores with eight processes", 0.03, 0.7, 5.0, 1.5),
        ("a slow model whose tokens come in bursts", 0.3, 0.7, 60.0, 1.0),
        ("a line that stands still for up to a second and a half now and then", 0.05, 0.5, 60.0, 1.5),
    ],
)
def test_a_busy_machine_is_not_given_up_in_two_hours_of_streams(name, gap_median, gap_sigma, still_every_seconds, still_seconds):
    for seed in range(24):
        world = World(random.Random(seed), gap_median, gap_sigma, still_every_seconds, still_seconds)
        assert world.run(300) == (math.inf, Stall.NONE), (name, seed)
