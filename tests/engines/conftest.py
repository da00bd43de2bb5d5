"""What the tests of real engines start from: an environment with vLLM in it, which `make test-engines` makes."""

from __future__ import annotations

import pytest

from potluck_node.engines.vllm import VllmEngine, environment_of
from potluck_protocol.errors import PotluckError
from tests.support.safetensors_model import ROOT

VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"


@pytest.fixture(scope="session")
def vllm_engine() -> VllmEngine:
    """vLLM for processors. Without it a test fails: skipped, it would be missed by nobody."""
    try:
        return environment_of(VLLM_PYTHON)
    except PotluckError:
        pytest.fail(f"There is no vLLM in {VLLM_PYTHON.parent.parent}; `make test-engines` puts it there.", pytrace=False)
