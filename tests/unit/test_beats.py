"""Which of a node's heartbeats say everything, and which that nothing has changed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_node.beats import TELEMETRY_BUSY_SECONDS, TELEMETRY_IDLE_SECONDS, Beats
from potluck_protocol.cards import CardTelemetry
from potluck_protocol.codec import heartbeat_message, heartbeat_value
from potluck_protocol.rest import RestCause
from potluck_protocol.values import Heartbeat, NodeId, NodeState
from tests.support.request_queue import hello_of, status_of

STATUS = status_of(NodeId("a"))
CARD = CardTelemetry("gpu-1", temperature_celsius=50, power_milliwatts=100_000)


class Report:
    """What a test wants said."""

    def __init__(self):
        self.said = Heartbeat(0, NodeState.SERVING, (STATUS,), 10, cards=(CARD,))

    def hello(self, in_flight):
        return hello_of(NodeId("a"))

    def heartbeat(self):
        self.said = replace(self.said, number=self.said.number + 1)
        return self.said


@pytest.fixture
def report():
    return Report()


@pytest.fixture
def beats(report):
    beats = Beats(report)
    beats.hello(())
    beats.welcomed(takes_brief=True)
    return beats


@pytest.mark.parametrize(
    ("changes", "is_said"),
    [
        ({}, False),
        ({"progress_count": 7}, False),
        ({"disk_free_bytes": 11}, False),
        ({"cards": (replace(CARD, temperature_celsius=80),)}, False),
        ({"cards": (replace(CARD, lost=True),)}, True),
        ({"cards": (replace(CARD, thermal_rung=4),)}, True),
        ({"cards": (replace(CARD, newest_xid=79, xid_count=1),)}, True),
        ({"cards": ()}, True),
        ({"state": NodeState.PAUSED, "rest_causes": (RestCause.OWNER,)}, True),
        ({"engines": (replace(STATUS, running_count=1),)}, True),
        ({"engines": ()}, True),
    ],
)
@pytest.mark.parametrize(("busy", "fresh_seconds"), [(True, TELEMETRY_BUSY_SECONDS), (False, TELEMETRY_IDLE_SECONDS)])
def test_everything_is_said_where_there_is_news_and_from_time_to_time(report, beats, changes, is_said, busy, fresh_seconds):
    assert beats.next(100.0, busy=busy) == report.said, "the first one says everything"
    report.said = replace(report.said, **changes)
    assert beats.next(101.0, busy=busy) == replace(report.said, unchanged=not is_said)
    assert beats.next(101.0 + fresh_seconds, busy=busy) == report.said


def test_a_heartbeat_without_news_is_a_few_bytes_and_what_it_leaves_out_stays_as_it_was(beats):
    full, brief = (heartbeat_message(beats.next(100.0, busy=False)) for _ in range(2))
    assert (full.unchanged, brief.unchanged, brief.number) == (False, True, 2)
    assert brief.ByteSize() <= 8 < full.ByteSize()


def test_a_new_connection_begins_with_everything(report, beats):
    beats.next(100.0, busy=False)
    beats.hello(())
    beats.welcomed(takes_brief=True)
    assert beats.next(100.5, busy=False) == report.said


def test_after_a_hello_that_led_to_nothing_all_is_said_on_the_former_connection(report, beats):
    beats.next(100.0, busy=False)
    beats.hello(())
    assert [beats.next(100.5 + second, busy=False) == report.said for second in range(2)] == [True] * 2


def test_a_coordinator_that_does_not_know_brief_heartbeats_gets_none(report, beats):
    beats.hello(())
    beats.welcomed(takes_brief=False)
    assert [beats.next(100.0 + second, busy=True) == report.said for second in range(3)] == [True] * 3


def test_a_heartbeat_in_full_is_read_as_it_was_said(report, beats):
    assert heartbeat_value(heartbeat_message(beats.next(100.0, busy=True))) == report.said
