"""Which gateway an agent dials: the last one first, then others, over losses, goodbyes and restarts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_node.domain import gateways
from potluck_node.domain.gateways import LAST_ALONE_SECONDS, MOVE_SPREAD_SECONDS, Ways
from potluck_node.gateway_ways import FILE_NAME, GatewayWays
from potluck_protocol.connection import ConnectionDocument

HOME, ONE, TWO, THREE = "home:8602", "home:8603", "home:8604", "10.0.0.2:8605"
LINKED = gateways.after_welcome(HOME, HOME, (ONE, TWO, THREE))


def dials(ways: Ways, count: int, *, seconds_each: float = 0.1, now: float = 100.0) -> list[str]:
    """So many in vain, one after another."""
    made = []
    for _ in range(count):
        made.append(gateways.target(ways, now))
        now += seconds_each
        ways = gateways.after_failed_dial(ways, made[-1])
    return made


def test_a_link_that_stands_moves_within_its_gateway():
    assert gateways.target(LINKED, 100.0) == ONE
    assert LINKED.known == (TWO, THREE, HOME)


def test_the_last_gateway_alone_first_then_every_other_then_again():
    lost = gateways.after_loss(LINKED, 100.0, is_let_go=False, seed=1)
    made = dials(lost, 12, seconds_each=0.11)
    assert made[:5] == [ONE] * 5
    assert sorted(made[5:9]) == sorted([ONE, TWO, THREE, HOME])
    assert made[8] == ONE, "it may be back by then"
    assert made[9:] == made[5:8], "round and round"


def test_whoever_is_let_go_dials_another_one_at_once():
    let_go = gateways.after_loss(LINKED, 100.0, is_let_go=True, seed=1)
    assert dials(let_go, 4)[3] == ONE
    assert gateways.move_delay_seconds(let_go, 100.0, 0.5) == 0.5 * MOVE_SPREAD_SECONDS


def test_only_the_first_move_waits():
    lost = gateways.after_loss(LINKED, 100.0, is_let_go=False, seed=1)
    assert gateways.move_delay_seconds(lost, 100.0, 1.0) == 0.0, "the last gateway is dialled at once"
    assert gateways.move_delay_seconds(lost, 100.0 + LAST_ALONE_SECONDS, 1.0) == MOVE_SPREAD_SECONDS
    tried = gateways.after_failed_dial(lost, gateways.target(lost, 100.0 + LAST_ALONE_SECONDS))
    assert gateways.move_delay_seconds(tried, 101.0, 1.0) == 0.0


def test_the_only_gateway_is_dialled_for_ever_and_at_once():
    alone = gateways.after_loss(gateways.after_welcome(HOME, HOME, ()), 100.0, is_let_go=True, seed=1)
    assert dials(alone, 9) == [HOME] * 9
    assert gateways.move_delay_seconds(alone, 101.0, 1.0) == 0.0
    assert gateways.greeting_seconds_max(alone) > gateways.greeting_seconds_max(LINKED)


def test_patience_is_short_for_the_first_try_at_each_gateway_and_long_from_then_on():
    """A machine that is gone is left soon; a gateway with a thousand handshakes before ours is not left to stand at the end again."""
    ways, patience = gateways.after_loss(LINKED, 100.0, is_let_go=True, seed=1), []
    for _ in range(6):
        patience.append(gateways.greeting_seconds_max(ways))
        ways = gateways.after_failed_dial(ways, gateways.target(ways, 101.0))
    short, long = gateways.GREETING_SECONDS_MAX_OF_SEVERAL, gateways.GREETING_SECONDS_MAX
    assert patience == [short, short, short, long, long, long]


@given(seeds=st.sets(st.integers(0, 2**32 - 1), min_size=200, max_size=200))
def test_a_lost_gateways_nodes_spread_over_the_others(seeds):
    firsts = [gateways.target(gateways.after_loss(LINKED, 100.0, is_let_go=True, seed=seed), 100.0) for seed in seeds]
    assert {address for address in firsts if firsts.count(address) > 200 / 3 / 2} == {TWO, THREE, HOME}


@pytest.mark.parametrize(
    ("said", "usable"),
    [
        ((":8603", "gw2:8603", "[fd00::1]:9", "10.0.0.1:1"), ("home:8603", "gw2:8603", "[fd00::1]:9", "10.0.0.1:1")),
        (
            (
                "",
                "gw",
                "gw:",
                "gw:0",
                "gw:65536",
                "gw:8x",
                "a b:1",
                "a/b:1",
                "fd00::1:9",
                "[]:1",
                "user@gw:1",
                "x" * 300 + ":1",
                "g\u00e9:1",
            ),
            (),
        ),
        (("gw:1", "gw:1"), ("gw:1",)),
        (tuple(f"gw{number}:1" for number in range(1000)), tuple(f"gw{number}:1" for number in range(64))),
    ],
)
def test_what_is_taken_for_an_address(said, usable):
    assert gateways.usable(said, "home") == usable


def test_a_host_of_six_groups_stands_in_brackets():
    assert gateways.usable((":8603",), "fd00::2") == ("[fd00::2]:8603",)


class Clock:
    seconds = 100.0

    def monotonic_seconds(self) -> float:
        return self.seconds

    def unix_ms(self) -> int:
        return 0


CONNECTION = ConnectionDocument(1, "pool", 8601, 8602, "home", "")


def ways_of(folder, clock) -> GatewayWays:
    return GatewayWays(folder, lambda: CONNECTION, clock)


def test_an_agent_that_starts_anew_knows_the_gateways(tmp_path):
    clock = Clock()
    ways = ways_of(tmp_path, clock)
    assert ways.target == HOME
    ways.linked((":8603", "gw2:8604"))
    assert ways.target == ONE
    again = ways_of(tmp_path, clock)
    made = set()
    for _ in range(3):
        again.begin_dial()
        made.add(again.target)
        again.failed()
    assert made == {"gw2:8604", HOME, ONE}
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"last": 1, "known": []}', '{"last": "gw:1", "known": [1]}', '{"known": "gw:1"}'])
def test_a_damaged_file_costs_only_what_it_knew(tmp_path, content):
    (tmp_path / FILE_NAME).write_text(content)
    assert ways_of(tmp_path, Clock()).target == HOME


def test_where_the_coordinator_has_moved_what_was_known_is_forgotten(tmp_path):
    ways = ways_of(tmp_path, Clock())
    ways.linked(("gw1:1", "gw2:1"))
    ways.moved()
    assert ways.target == HOME


def test_a_coordinator_of_before_says_nothing_and_its_port_stays_the_way(tmp_path):
    ways = ways_of(tmp_path, Clock())
    ways.linked(())
    ways.lost(is_let_go=True)
    ways.begin_dial()
    assert ways.target == HOME
    assert not json.loads((tmp_path / FILE_NAME).read_text())["known"] if (tmp_path / FILE_NAME).exists() else True


def test_a_dial_of_the_last_gateway_that_takes_long_leaves_the_others_untried_and_their_nodes_spread(tmp_path):
    clock = Clock()
    ways = ways_of(tmp_path, clock)
    ways.linked(("one:1", "two:1"))
    ways.lost(is_let_go=False)
    ways.begin_dial()
    clock.seconds += 2 * LAST_ALONE_SECONDS
    assert ways.target == "one:1", "its error is worded now"
    ways.failed()
    assert ways.delay_seconds(1.0) == MOVE_SPREAD_SECONDS
    ways.begin_dial()
    assert ways.target != "one:1"
    ways.failed()
    assert ways.delay_seconds(1.0) == 0.0
