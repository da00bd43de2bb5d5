"""What the tests of real engines start from: an environment with vLLM in it, which `make test-engines` makes."""

from __future__ import annotations

import asyncio

import pytest

from potluck_node.engines.vllm import VllmEngine, environment_of
from potluck_protocol.errors import PotluckError
from tests.engines.one_process import OneProcess, run
from tests.support.group_pool import VLLM_PYTHON
from tests.support.safetensors_model import built_in_folder


@pytest.fixture(scope="session")
def vllm_engine() -> VllmEngine:
    """vLLM for processors. Without it a test fails: skipped, it would be missed by nobody."""
    try:
        return environment_of(VLLM_PYTHON)
    except PotluckError:
        pytest.fail(f"There is no vLLM in {VLLM_PYTHON.parent.parent}; `make test-engines` puts it there.", pytrace=False)


@pytest.fixture(scope="session")
def one_process(vllm_engine: VllmEngine) -> OneProcess:
    """One vLLM that had the whole model."""
    return asyncio.run(run(vllm_engine, built_in_folder()))


@pytest.fixture(scope="session")
def text_of_one_process(one_process: OneProcess) -> str:
    """What it said when it was asked directly."""
    return one_process.text
