"""docs/tiers.md says what is so."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import httpx2
import openai
import pytest
from openai._constants import MAX_RETRY_AFTER_DELAY as OPENAI_WAITS_SECONDS_MAX
from typer.testing import CliRunner

from potluck.commands.root import build_app
from potluck_coordinator.domain import admission, fairness, grammar_readings, grammar_stacks, grammar_walk, schema_branches, tiers
from potluck_coordinator.gateway import grammar_bounds, openai_request
from potluck_coordinator.gateway.openai_errors import http_error
from potluck_coordinator.gateway.rate_windows import Allowance, rate_headers
from potluck_coordinator.settings import Settings
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.metadata import TIER_HEADER

PAGE = (Path(__file__).parents[2] / "docs" / "tiers.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|(?! \d{3} )", PAGE, re.MULTILINE)


def test_the_page_has_every_setting_of_the_tiers_and_the_queue():
    named = {name for name in Settings.model_fields if name.startswith(("default_tier_", "queue_", "answer_"))}
    assert {name for name, _ in ROWS} == named


@pytest.mark.parametrize(("name", "default"), ROWS)
def test_the_defaults_are_those_of_the_page(name, default):
    assert str(Settings.model_fields[name].default) == default


REFUSALS = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (\d{3}) \|", PAGE, re.MULTILINE)


def test_the_page_has_the_refusals_of_tiers_quotas_and_queue():
    assert {code for code, _, _ in REFUSALS} == {"rate_limited", "quota_exceeded", "queue_full", "queue_timeout", "no_capacity"}


@pytest.mark.parametrize(("code", "over_http", "status"), REFUSALS)
def test_the_names_and_statuses_are_those_of_the_page(code, over_http, status):
    told = http_error(PotluckError(ErrorCode(code), "No."))
    assert (told.status, json.loads(told.body)["error"]["code"]) == (int(status), over_http)


@pytest.mark.parametrize(
    ("retry_after_seconds", "asked_count"), [(0.02, 3), (OPENAI_WAITS_SECONDS_MAX + 1, 1), (3600 - OPENAI_WAITS_SECONDS_MAX, 1)]
)
def test_openais_client_waits_as_long_as_the_page_says(retry_after_seconds, asked_count):
    assert f"only up to {OPENAI_WAITS_SECONDS_MAX} s" in PAGE
    asked = []

    def refuse(request):
        asked.append(request)
        headers = {"retry-after": str(math.ceil(retry_after_seconds)), "retry-after-ms": str(round(retry_after_seconds * 1000))}
        return httpx2.Response(429, headers=headers, json={"error": {"code": "rate_limit_exceeded", "message": "No."}})

    http_client = httpx2.Client(transport=httpx2.MockTransport(refuse))
    with (
        openai.OpenAI(base_url="http://pool/v1", api_key="sk", max_retries=2, http_client=http_client) as client,
        pytest.raises(openai.RateLimitError) as raised,
    ):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    assert len(asked) == asked_count
    assert "retry-after" in raised.value.response.headers


def test_what_the_page_tells_of_a_request_too_many_follows_from_the_defaults():
    assert Settings.model_fields["default_tier_rate"].default == "100/hour"
    assert f"asked 100 times within two minutes is told some {3600 - 120:,} s" in " ".join(PAGE.split())
    assert admission.AdmissionLimits().retry_after_seconds_max < OPENAI_WAITS_SECONDS_MAX
    assert f"`openai` {'.'.join(openai.__version__.split('.')[:2])} for Python" in PAGE


@pytest.mark.parametrize(
    "words",
    [
        f"{grammar_bounds.SCHEMA_BYTES_MAX} bytes, {grammar_bounds.SCHEMA_DEPTH_MAX} levels and {grammar_bounds.SCHEMA_NODES_MAX} values",
        f"{grammar_bounds.GRAMMAR_CHARACTERS_MAX} characters of a grammar",
        f"{grammar_bounds.PATTERN_CHARACTERS_MAX} of a pattern",
        f"{grammar_bounds.REPEAT_MAX} repetitions",
        f"{grammar_bounds.CHOICE_COUNT_MAX} choices",
        f"{grammar_bounds.TOOL_COUNT_MAX} tools with {grammar_bounds.TOOLS_BYTES_MAX} bytes",
        f"{grammar_stacks.STACKS_MAX} ways open at one place",
        f"{grammar_readings.READINGS_MAX} readings of one text of {grammar_readings.TOKEN_CHARACTERS} characters",
        f"ends after {grammar_walk.STEPS_MAX} steps",
        f"may begin in {schema_branches.BRANCHES_MAX} ways, {schema_branches.OPTIONAL_MAX} properties",
        f"in each other up to {grammar_stacks.STACKS_MAX} times",
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
