"""When a node serves and when not: each reason by itself, the strictest of several, and what keeps a node from flapping."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from potluck_node.domain.hours import parse_window
from potluck_node.domain.rest import (
    EDGE_BYTES,
    FIRST_WORD,
    GIB,
    LEFT_BYTES,
    LEFT_SECONDS,
    NO_WORD,
    SERVING,
    TAKEN_BYTES,
    UNREADABLE_WORD,
    USE_KEPT_SECONDS,
    WORD_KEPT_SECONDS,
    CardUse,
    Facts,
    Memory,
    Moment,
    Posture,
    Reason,
    Rules,
    Use,
    Word,
    decide,
)
from potluck_protocol.rest import RestCause

NOW = Moment(round(datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp() * 1000), 1000.0)
HOUR_MS = 3_600_000
NIGHTS = Rules(hours=(parse_window("22:00-07:00"),))
WHEN_IDLE = Rules(idle_minutes=10)
HOT = Reason(RestCause.HEAT, Posture.FINISH, "is too hot")


def later(seconds: float) -> Moment:
    return Moment(NOW.unix_ms + round(seconds * 1000), NOW.monotonic_seconds + seconds)


def card(foreign_bytes: int | None, *, ours: bool = True, uuid: str = "GPU-a") -> CardUse:
    return CardUse(uuid, foreign_bytes, ours)


@pytest.mark.parametrize(
    ("rules", "facts", "posture", "causes", "until_in_ms"),
    [
        (Rules(), Facts(), Posture.SERVE, [], None),
        (Rules(), Facts(Word(Posture.HAND_OVER)), Posture.HAND_OVER, [RestCause.OWNER], None),
        (Rules(), Facts(FIRST_WORD), Posture.HAND_OVER, [RestCause.FIRST_RUN], None),
        (Rules(), Facts(UNREADABLE_WORD), Posture.HAND_OVER, [RestCause.OWNER], None),
        (Rules(), Facts(Word(Posture.FINISH)), Posture.FINISH, [RestCause.OWNER], None),
        (Rules(), Facts(Word(Posture.HAND_OVER, NOW.unix_ms + 5)), Posture.HAND_OVER, [RestCause.OWNER], 5),
        (Rules(), Facts(Word(Posture.HAND_OVER, NOW.unix_ms)), Posture.SERVE, [], None),
        (NIGHTS, Facts(), Posture.FINISH, [RestCause.HOURS], 10 * HOUR_MS),
        (NIGHTS, Facts(Word(Posture.HAND_OVER)), Posture.HAND_OVER, [RestCause.OWNER, RestCause.HOURS], None),
        (NIGHTS, Facts(Word(Posture.HAND_OVER, NOW.unix_ms + 5)), Posture.HAND_OVER, [RestCause.OWNER, RestCause.HOURS], 10 * HOUR_MS),
        (WHEN_IDLE, Facts(use=Use(600.0)), Posture.SERVE, [], None),
        (WHEN_IDLE, Facts(use=Use(599.0)), Posture.HAND_OVER, [RestCause.IN_USE], 1000),
        (WHEN_IDLE, Facts(use=Use(None, "no logind")), Posture.FINISH, [RestCause.IN_USE], None),
        (Rules(), Facts(use=Use(0.0)), Posture.SERVE, [], None),
        (Rules(), Facts(cards=(card(TAKEN_BYTES),)), Posture.HAND_OVER, [RestCause.OTHER_PROGRAM], None),
        (Rules(), Facts(cards=(card(TAKEN_BYTES - 1),)), Posture.SERVE, [], None),
        (Rules(), Facts(cards=(card(TAKEN_BYTES, ours=False),)), Posture.SERVE, [], None),
        (Rules(), Facts(cards=(card(None),)), Posture.SERVE, [], None),
        (Rules(), Facts(others=(HOT,)), Posture.FINISH, [RestCause.HEAT], None),
        (Rules(), Facts(others=(replace(HOT, posture=Posture.SERVE),)), Posture.SERVE, [], None),
        (
            NIGHTS,
            Facts(cards=(card(9 * GIB),), others=(HOT,)),
            Posture.HAND_OVER,
            [RestCause.OTHER_PROGRAM, RestCause.HOURS, RestCause.HEAT],
            None,
        ),
    ],
)
def test_the_strictest_reason_wins_and_all_are_told(rules, facts, posture, causes, until_in_ms):
    rest, _ = decide(rules, facts, Memory(), NOW)
    assert (rest.posture, [reason.cause for reason in rest.reasons]) == (posture, causes)
    assert rest.until_unix_ms == (None if until_in_ms is None else NOW.unix_ms + until_in_ms)
    assert (rest == SERVING) == (posture is Posture.SERVE)


def test_every_reason_says_what_ends_it_where_no_date_does():
    facts = Facts(FIRST_WORD, Use(None, "no logind"), (replace(card(8 * GIB), program_names=("blender",)),))
    rest, _ = decide(WHEN_IDLE, facts, Memory(), NOW)
    words = {reason.cause: reason.words for reason in rest.reasons}
    assert "`potluck node resume`" in words[RestCause.FIRST_RUN]
    assert "idle_minutes" in words[RestCause.IN_USE]
    assert "no logind" in words[RestCause.IN_USE]
    assert "blender" in words[RestCause.OTHER_PROGRAM]
    assert "8.0 GiB of card GPU-a" in words[RestCause.OTHER_PROGRAM]
    (paused,) = decide(Rules(), Facts(Word(Posture.HAND_OVER)), Memory(), NOW)[0].reasons
    assert "`potluck node resume`" in paused.words
    (unread,) = decide(Rules(), Facts(UNREADABLE_WORD), Memory(), NOW)[0].reasons
    assert "control.json" in unread.words
    assert "`potluck node resume`" in unread.words


def postures(looks: list[tuple[float, int | None, bool]], rules: Rules = Rules()) -> list[str]:  # noqa: B008 - it is frozen
    """What is decided at each look: seconds, what others hold of the card, whether an engine of ours was given it."""
    memory, told = Memory(), []
    for seconds, foreign_bytes, ours in looks:
        rest, memory = decide(rules, Facts(cards=(card(foreign_bytes, ours=ours),)), memory, later(seconds))
        told.append(rest.posture.value)
    return told


def test_a_card_that_was_taken_is_used_again_only_after_it_stayed_free():
    gone = LEFT_BYTES - 1
    looks = [
        (0, 0, True),
        (5, 8 * GIB, True),
        (10, 8 * GIB, False),
        (20, gone, False),
        (30, LEFT_BYTES, False),  # back, if with little
        (40, gone, False),
        (40 + LEFT_SECONDS - 1, gone, False),
        (40 + LEFT_SECONDS, gone, False),
        (41 + LEFT_SECONDS, gone, True),
    ]
    assert postures(looks) == ["serve", *["hand_over"] * 6, "serve", "serve"]


@pytest.mark.parametrize(
    ("desktop", "back", "left"),
    [
        (0, LEFT_BYTES - 1, True),
        (0, LEFT_BYTES, False),
        (5 * GIB // 4, 5 * GIB // 4, True),
        (5 * GIB // 4, 5 * GIB // 4 + EDGE_BYTES, False),
        (TAKEN_BYTES - EDGE_BYTES, TAKEN_BYTES - EDGE_BYTES - 1, True),
        # So near to what takes a card it would be taken again by the first ripple.
        (TAKEN_BYTES - 1, TAKEN_BYTES - EDGE_BYTES, False),
    ],
)
def test_a_card_whose_desktop_holds_much_is_free_again_when_the_game_has_left(desktop, back, left):
    looks = [(second, desktop, True) for second in range(0, 200, 5)]
    # It loads for half a minute.
    looks += [(200 + second, desktop + second * (TAKEN_BYTES - desktop) // 30, True) for second in range(0, 35, 5)]
    looks += [(240, 8 * GIB, False), (250, back, False), (250 + LEFT_SECONDS, back, False), (255 + LEFT_SECONDS, back, True)]
    told = postures(looks)
    assert (told[40:46], told[47:49]) == (["serve"] * 6, ["hand_over"] * 2)
    assert told[-2:] == (["serve"] * 2 if left else ["hand_over"] * 2)


@pytest.mark.parametrize(
    ("idle_seconds", "passed_seconds", "posture"),
    [
        (590.0, 5.0, Posture.HAND_OVER),
        (590.0, 10.0, Posture.SERVE),
        (9_000.0, USE_KEPT_SECONDS, Posture.SERVE),
        (9_000.0, USE_KEPT_SECONDS + 1, Posture.FINISH),
    ],
)
def test_a_look_at_the_use_that_tells_nothing_is_made_up_for_by_the_last_one(idle_seconds, passed_seconds, posture):
    _, memory = decide(WHEN_IDLE, Facts(use=Use(idle_seconds)), Memory(), NOW)
    rest, memory = decide(WHEN_IDLE, Facts(use=Use(None, "no logind")), memory, later(passed_seconds))
    assert rest.posture is posture
    rest, _ = decide(WHEN_IDLE, Facts(use=Use(0.0)), memory, later(passed_seconds))
    assert rest.posture is Posture.HAND_OVER, "what is told counts at once"


@pytest.mark.parametrize(
    ("word", "passed_seconds", "posture"),
    [
        (NO_WORD, WORD_KEPT_SECONDS, Posture.SERVE),
        (NO_WORD, WORD_KEPT_SECONDS + 1, Posture.HAND_OVER),
        (Word(Posture.FINISH), WORD_KEPT_SECONDS, Posture.FINISH),
        (Word(Posture.FINISH, NOW.unix_ms + 1), 5.0, Posture.SERVE),
    ],
)
def test_a_word_that_cannot_be_read_for_once_is_as_it_was(word, passed_seconds, posture):
    _, memory = decide(Rules(), Facts(word), Memory(), NOW)
    rest, _ = decide(Rules(), Facts(UNREADABLE_WORD), memory, later(passed_seconds))
    assert rest.posture is posture


def test_what_cannot_be_told_changes_nothing():
    looks = [(0, None, True), (5, 8 * GIB, True), (10, None, False), (10 + 2 * LEFT_SECONDS, None, False)]
    assert postures(looks) == ["serve", "hand_over", "hand_over", "hand_over"]


def test_a_ripple_about_either_bound_starts_and_stops_nothing():
    looks = [(second, TAKEN_BYTES + (-1 if second % 2 else 1), True) for second in range(0, 300, 5)]
    assert postures(looks) == ["hand_over"] * len(looks)
    looks = [(second, LEFT_BYTES + (-1 if second % 2 else 1), True) for second in range(0, 300, 5)]
    assert postures(looks) == ["serve"] * len(looks)


def test_a_card_that_fell_off_keeps_nobody_from_serving_for_ever():
    _, memory = decide(Rules(), Facts(cards=(card(8 * GIB),)), Memory(), NOW)
    rest, memory = decide(Rules(), Facts(), memory, later(1))
    assert rest.posture is Posture.HAND_OVER
    rest, _ = decide(Rules(), Facts(), memory, later(1 + LEFT_SECONDS))
    assert rest == SERVING


def test_the_owners_own_server_on_a_card_is_no_other_program_and_one_beside_it_is():
    shared = Rules(others_expected=True)
    looks = [(0, 10 * GIB, False), (5, 10 * GIB, True), (10, 10 * GIB + TAKEN_BYTES, True), (15, 10 * GIB, False)]
    assert postures(looks, shared) == ["serve", "serve", "hand_over", "hand_over"]
    looks += [(15 + LEFT_SECONDS, 10 * GIB, False), (20 + LEFT_SECONDS, 10 * GIB, True)]
    assert postures(looks, shared)[-2:] == ["serve", "serve"]
    assert postures(looks)[1] == "hand_over", "without such a server it is one"


def test_the_wait_after_another_program_left_has_its_end_told():
    _, memory = decide(Rules(), Facts(cards=(card(8 * GIB),)), Memory(), NOW)
    _, memory = decide(Rules(), Facts(cards=(card(0, ours=False),)), memory, later(10))
    rest, _ = decide(Rules(), Facts(cards=(card(0, ours=False),)), memory, later(30))
    assert rest.until_unix_ms == later(10 + LEFT_SECONDS).unix_ms
