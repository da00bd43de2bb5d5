"""What an owner reads of their cards' heat."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from potluck_node.control import AgentStatus, CardLine, read_status, write_status
from potluck_node.domain.thermal_ladder import ThermalRung
from potluck_node.heat_words import card_words, heat_lines

COOL = CardLine("GPU-1", 58, 83, 350_000, capped=False, rung=0, throttle_seconds=0.0)
STATUS = AgentStatus(
    pid=1,
    node_id="n",
    phase="serving",
    state="serving",
    epoch=1,
    lease_left_seconds=9.0,
    attempt_count=0,
    progress_count=0,
    certificate_valid_until_unix_ms=0,
    updated_at_unix_ms=0,
    trouble="",
    engines=(),
    cards=(COOL,),
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "GPU-1: 58 of 83 °C, gets 350 W"),
        ({"rung": 2, "capped": True, "power_limit_milliwatts": 250_000}, "GPU-1: 58 of 83 °C, gets 250 W until it is cooler"),
        (
            {"rung": 4, "capped": True, "power_limit_milliwatts": 220_000},
            "GPU-1: 58 of 83 °C, gets 220 W and half of its slots until it is cooler",
        ),
        ({"rung": 6}, "GPU-1: 58 of 83 °C, gets one answer at a time until it is cooler"),
        ({"rung": 8}, "GPU-1: 58 of 83 °C, gets no work until it is cooler"),
        ({"temperature_celsius": None, "power_limit_milliwatts": None}, "GPU-1: temperature unknown"),
        (
            {"temperature_celsius": None, "rung": 4, "capped": True, "power_limit_milliwatts": 190_000},
            "GPU-1: temperature unknown, gets 190 W and half of its slots until it is known to be cooler",
        ),
        ({"temperature_celsius": None, "rung": 8}, "GPU-1: temperature unknown, gets no work until it is known to be cooler"),
        ({"lost": True, "rung": 8}, "GPU-1: the driver no longer reaches it"),
        ({"throttle_seconds": 12.4}, "GPU-1: 58 of 83 °C, gets 350 W; slowed down by heat for 12 s since the agent started"),
    ],
)
def test_a_card_in_words(changes, words):
    assert card_words(replace(COOL, **changes)) == words


def test_every_rung_has_words():
    said = {card_words(replace(COOL, rung=int(rung), capped=True)) for rung in ThermalRung if rung not in {1, 2}}
    assert len(said) == len(ThermalRung) - 2


def test_why_power_is_not_capped_is_said_with_who_knows_the_way_out():
    lines = heat_lines(replace(STATUS, cap_refusal="the driver says: Insufficient Permissions"))
    assert lines[0] == "card         GPU-1: 58 of 83 °C, gets 350 W"
    assert "Insufficient Permissions" in lines[1]
    assert "`potluck node doctor`" in lines[1]
    assert len(heat_lines(STATUS)) == 1


def test_the_agents_status_keeps_it_for_the_command(tmp_path):
    status = replace(STATUS, cards=(replace(COOL, rung=int(ThermalRung.HALF)),), cap_refusal="no")
    write_status(tmp_path, status)
    assert read_status(tmp_path) == status
    assert json.loads(json.dumps(asdict(status)))["cards"][0]["rung"] == 4
