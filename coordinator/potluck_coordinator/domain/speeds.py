"""How fast a replica reads prompts and writes answers, learned from what the gateway itself saw of its attempts.

Decides what one finished attempt changes: a replica that got slower is believed at once, one that got faster only after several attempts,
and what is old weighs little against what is new. Seconds of a token are a line over the batch, `base + each * batch`. A node's own word is
where learning starts, within bounds, and the first attempt already weighs as much. It must not know clocks, chunks or sessions: it is
called once an attempt, never for a token.
"""

from __future__ import annotations

from typing import Final, NamedTuple

PREFILL_TOKENS_PER_SECOND_GUESS: Final = 1000.0
DECODE_TOKENS_PER_SECOND_GUESS: Final = 30.0
"""Of a replica that says nothing, before its first attempt: a card of the pool's kind with a model that nearly fills it."""
PREFILL_TOKENS_PER_SECOND_BOUNDS: Final = (1.0, 30_000.0)
DECODE_TOKENS_PER_SECOND_BOUNDS: Final = (0.1, 500.0)
"""What may be believed or learned of a replica: one that claims to be quicker than any card of today gets no more work for it."""
EACH_SHARE_GUESS: Final = 0.05
"""Of the seconds of a token alone in its batch that every other request of the batch adds, until that is learned."""
GAIN_DROP: Final = 0.5
"""Of what is known that an attempt which was slower replaces."""
GAIN_RISE: Final = 0.1
"""The same of one that was faster."""
HALF_LIFE_SECONDS: Final = 20.0
"""In which what is known loses half of its weight against the next attempt."""
GAIN_MAX: Final = 0.9
PREFILL_SAMPLE_TOKENS_MIN: Final = 32.0
"""Fewer tokens read say more about everything around them; so many weigh half."""
DECODE_SAMPLE_TOKENS_MIN: Final = 4
TOGETHER_SECONDS_MIN: Final = 2.0
TOGETHER_FACTOR: Final = 4.0
"""Answers in one piece are counted together for so long, or for so many times as long as the newest of them took: what ends at first had
begun before and counts nothing, and the longer it is the later a change is seen."""
SECONDS_MIN: Final = 1e-4
"""Less is no time that was measured."""
_BATCH_SCALE: Final = 8.0
"""At this batch the slope of the line takes as much of a surprise as its base."""


class Speeds(NamedTuple):
    """One replica's."""

    prefill_tokens_per_second: float
    decode_base_seconds: float
    """Of a token, whatever the batch."""
    decode_each_seconds: float
    """Beside that, for each request of the batch."""
    prefill_sample_count: int = 0
    decode_sample_count: int = 0
    learned_at_seconds: float = 0.0
    batch_mean: float = 0.0
    """In which it was seen to write lately: the line over the batch is known best there."""
    told_token_seconds: float = 0.0
    """Of one client alone, by its node's word; 0: it says nothing."""

    def decode_seconds(self, batch: float) -> float:
        """Of one token in a batch of so many requests."""
        return self.decode_base_seconds + self.decode_each_seconds * batch


class AttemptTimes(NamedTuple):
    """What the gateway saw of one attempt."""

    read_tokens: float
    """Of prompts, that stood before its first token at its replica: its own without what was cached, and what was dispatched before it and
    had not begun."""
    first_token_seconds: float
    """From the dispatch, without the line's round trip."""
    answer_tokens: int
    answer_seconds: float
    """From its first token to its last."""
    batch_mean: float
    """Requests at the replica meanwhile, this one among them."""


class ReadTogether(NamedTuple):
    """What a replica is certain to have read since a moment: the prompts of answers in one piece that began after it and are over."""

    since_seconds: float = 0.0
    tokens: float = 0.0


def prior(prefill_tokens_per_second: float | None, decode_tokens_per_second: float | None) -> Speeds:
    """Where learning starts: what the node says of one client alone, or a guess."""
    prefill = _within(prefill_tokens_per_second or PREFILL_TOKENS_PER_SECOND_GUESS, PREFILL_TOKENS_PER_SECOND_BOUNDS)
    token_seconds = 1 / _within(decode_tokens_per_second or DECODE_TOKENS_PER_SECOND_GUESS, DECODE_TOKENS_PER_SECOND_BOUNDS)
    told = token_seconds if decode_tokens_per_second else 0.0
    return Speeds(prefill, token_seconds * (1 - EACH_SHARE_GUESS), token_seconds * EACH_SHARE_GUESS, told_token_seconds=told)


def learned(known: Speeds, seen: AttemptTimes, now: float) -> Speeds:
    """What is known after one more attempt."""
    freshness = 0.5 ** (max(0.0, now - known.learned_at_seconds) / HALF_LIFE_SECONDS)
    prefill, prefill_count = _prefill(known, seen, freshness)
    base, each, decode_count, batch = _decode(known, seen, freshness)
    if (prefill_count, decode_count) == (known.prefill_sample_count, known.decode_sample_count):
        return known
    return Speeds(prefill, base, each, prefill_count, decode_count, now, batch, known.told_token_seconds)


def learned_in_one_piece(known: Speeds, read_tokens: float, seconds: float) -> Speeds:
    """What is known after an answer of which nothing was seen before its end: that reading took no longer than all of it.

    So it shows only that the replica is faster than was known. A model of embeddings is never seen otherwise.

    Args:
        known: before it.
        read_tokens: of its own prompt, without what was cached.
        seconds: from its dispatch to its end.
    """
    rate, count = known.prefill_tokens_per_second, known.prefill_sample_count
    least = _within(read_tokens / max(seconds, SECONDS_MIN), PREFILL_TOKENS_PER_SECOND_BOUNDS)
    if least <= rate:
        return known
    rate = _drawn_to(least, rate, _gain(count, 1.0, is_slower=False) * _weight(read_tokens))
    return known._replace(prefill_tokens_per_second=rate, prefill_sample_count=count + 1)


def read_together(before: ReadTogether, read_tokens: float, began_at: float, now: float) -> ReadTogether:
    """What is certain after one more answer in one piece.

    Requests that run at once each take as long as all of them: alone they show a fraction of what the replica reads. What counts here began
    and ended within the same seconds, so that no prompt is counted for a time in which it was not read.

    Args:
        before: before it; since no earlier than when the replica had nothing to do.
        read_tokens: of its own prompt, without what was cached.
        began_at: when it was dispatched.
        now: its end.
    """
    if now - before.since_seconds > max(TOGETHER_SECONDS_MIN, TOGETHER_FACTOR * (now - began_at)):
        return ReadTogether(now)
    return before._replace(tokens=before.tokens + read_tokens) if began_at >= before.since_seconds else before


def _prefill(known: Speeds, seen: AttemptTimes, freshness: float) -> tuple[float, int]:
    count, rate = known.prefill_sample_count, known.prefill_tokens_per_second
    # The first token itself is written, not read.
    seconds = seen.first_token_seconds - known.decode_seconds(seen.batch_mean)
    if seen.read_tokens < PREFILL_SAMPLE_TOKENS_MIN or seen.first_token_seconds < SECONDS_MIN:
        return rate, count
    # One that is over so soon says only that reading took nearly no time.
    sample = _within(seen.read_tokens / max(seconds, seen.first_token_seconds / 10), PREFILL_TOKENS_PER_SECOND_BOUNDS)
    return _drawn_to(sample, rate, _gain(count, freshness, is_slower=sample < rate) * _weight(seen.read_tokens)), count + 1


def _weight(read_tokens: float) -> float:
    return read_tokens / (read_tokens + PREFILL_SAMPLE_TOKENS_MIN)


def _drawn_to(sample: float, rate: float, gain: float) -> float:
    """Of times, not of rates, as those add up."""
    return 1 / ((1 - gain) / rate + gain / sample)


def _decode(known: Speeds, seen: AttemptTimes, freshness: float) -> tuple[float, float, int, float]:
    base, each, count = known.decode_base_seconds, known.decode_each_seconds, known.decode_sample_count
    if seen.answer_tokens < DECODE_SAMPLE_TOKENS_MIN or seen.answer_seconds < SECONDS_MIN:
        return base, each, count, known.batch_mean
    slowest, fastest = 1 / DECODE_TOKENS_PER_SECOND_BOUNDS[0], 1 / DECODE_TOKENS_PER_SECOND_BOUNDS[1]
    sample = _within(seen.answer_seconds / (seen.answer_tokens - 1), (fastest, slowest))
    surprise = sample - known.decode_seconds(seen.batch_mean)
    # Least squares by normalised steps: along the line's own two directions, so that different batches tell base and slope apart.
    lean = seen.batch_mean / _BATCH_SCALE
    gain = _gain(count, freshness, is_slower=surprise > 0)
    step = gain * surprise / (1 + lean * lean)
    batch = known.batch_mean + gain * (seen.batch_mean - known.batch_mean) if count else seen.batch_mean
    return max(fastest / 2, base + step), max(0.0, each + step * lean / _BATCH_SCALE), count + 1, batch


def _gain(sample_count: int, freshness: float, *, is_slower: bool) -> float:
    """How much of what is known the next attempt replaces. The first ones count alike, the node's own word as one of them."""
    plain = max(GAIN_DROP if is_slower else GAIN_RISE, 1 / (sample_count + 2))
    return min(GAIN_MAX, 1 - (1 - plain) * freshness) if sample_count else plain


def _within(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
