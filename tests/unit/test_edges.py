"""What the log says of a failure that nobody foresaw: where it was, in either form of the log, and never the exception's own words."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
from potluck_coordinator.gateway.edges import log_unexpected
from potluck_protocol.observe import configure_logging

configure_logging(json={json})

def somewhere():
    raise RuntimeError("canary of a prompt")

try:
    somewhere()
except RuntimeError as error:
    log_unexpected("failed_unexpectedly", "req_1", error, method="M")
"""


@pytest.mark.parametrize("json", [True, False])
def test_an_unforeseen_failure_is_logged_with_its_place_and_without_its_words(json: bool) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(json=json)], capture_output=True, text=True, timeout=60, check=True)
    logged = done.stdout + done.stderr
    for word in ("failed_unexpectedly", "req_1", "RuntimeError", "in somewhere", "method"):
        assert word in logged
    assert "canary" not in logged
