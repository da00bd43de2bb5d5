"""docs/tiers.md says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from potluck.commands.root import build_app
from potluck_coordinator.domain import admission, fairness, tiers
from potluck_coordinator.gateway import grammar_bounds, openai_request
from potluck_coordinator.gateway.rate_windows import Allowance, rate_headers
from potluck_coordinator.settings import Settings
from potluck_protocol.errors import CATALOGUE, ErrorCode
from potluck_protocol.metadata import TIER_HEADER

PAGE = (Path(__file__).parents[2] / "docs" / "tiers.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", PAGE, re.MULTILINE)


def test_the_page_has_every_setting_of_the_tiers_and_the_queue():
    named = {name for name in Settings.model_fields if name.startswith(("default_tier_", "queue_"))}
    assert {name for name, _ in ROWS} == named


@pytest.mark.parametrize(("name", "default"), ROWS)
def test_the_defaults_are_those_of_the_page(name, default):
    assert str(Settings.model_fields[name].default) == default


@pytest.mark.parametrize(("code", "status"), re.findall(r"^\| `(\w+)` \| (\d{3}) \|", PAGE, re.MULTILINE))
def test_the_statuses_are_those_of_the_page(code, status):
    assert CATALOGUE[ErrorCode(code)].http_status == int(status)


@pytest.mark.parametrize(
    "words",
    [
        f"{grammar_bounds.SCHEMA_BYTES_MAX} bytes, {grammar_bounds.SCHEMA_DEPTH_MAX} levels and {grammar_bounds.SCHEMA_NODES_MAX} values",
        f"{grammar_bounds.GRAMMAR_CHARACTERS_MAX} characters of a grammar",
        f"{grammar_bounds.PATTERN_CHARACTERS_MAX} of a pattern",
        f"{grammar_bounds.REPEAT_MAX} repetitions",
        f"{grammar_bounds.CHOICE_COUNT_MAX} choices",
        f"{grammar_bounds.TOOL_COUNT_MAX} tools with {grammar_bounds.TOOLS_BYTES_MAX} bytes",
        f"{openai_request.STOP_COUNT_MAX} stop sequences",
        f"{openai_request.ANSWER_COUNT_MAX} answers",
        f"never more than {admission.AdmissionLimits().retry_after_seconds_max:.0f} s",
        f"in the last {fairness.EARNED_DAYS} days has up to {fairness.WEIGHT_MAX:.0f} turns",
        TIER_HEADER,
        *(name for name, _ in rate_headers(Allowance(1, 1, 0.0, 1))),
        *(f"`{tier}`" for tier in tiers.AskedTier),
    ],
)
def test_the_numbers_and_names_are_those_of_the_page(words):
    assert words in " ".join(PAGE.split())


def test_six_times_the_deadline_and_ten_minutes_are_what_the_page_says():
    assert (admission.HORIZON_SHARE, tiers.RESERVE_IDLE_SECONDS) == (6.0, 600.0)


@pytest.mark.parametrize("command", [["keys", "create"], ["keys", "set"]])
def test_the_options_of_the_page_are_there(command):
    shown = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(build_app(None), [*command, "--help"]).stdout
    for option in ("--requests-per-day", "--tokens-per-day", "--concurrent-max", "--spend-per-day"):
        assert option in shown
        assert option in PAGE
