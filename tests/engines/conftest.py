"""What the tests of real engines start from: an environment with vLLM in it, which `make test-engines` makes."""

from __future__ import annotations

import asyncio
import json
import os

import aiohttp
import pytest

from potluck_node.engines.base import EngineLaunch
from potluck_node.engines.process import EngineProcess
from potluck_node.engines.vllm import VllmEngine, environment_of
from potluck_protocol.errors import PotluckError
from potluck_protocol.values import ModelId
from tests.engines.group_loss import PROMPT, TOKENS
from tests.support.group_pool import CONTEXT_LENGTH_TOKENS, MODEL, SLOT_COUNT
from tests.support.safetensors_model import ROOT, built_in_folder

VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"


@pytest.fixture(scope="session")
def vllm_engine() -> VllmEngine:
    """vLLM for processors. Without it a test fails: skipped, it would be missed by nobody."""
    try:
        return environment_of(VLLM_PYTHON)
    except PotluckError:
        pytest.fail(f"There is no vLLM in {VLLM_PYTHON.parent.parent}; `make test-engines` puts it there.", pytrace=False)


@pytest.fixture(scope="session")
def text_of_one_process(vllm_engine: VllmEngine) -> str:
    """What one vLLM says that has the whole model and is asked directly."""
    launch = EngineLaunch(ModelId(MODEL), built_in_folder(), SLOT_COUNT, CONTEXT_LENGTH_TOKENS)

    async def ask() -> str:
        async with aiohttp.ClientSession() as session:
            engine = await EngineProcess.start(vllm_engine, launch, os.environ, session)
            try:
                body = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": TOKENS}
                url = f"{engine.address.url}/v1/chat/completions"
                async with session.post(url, data=json.dumps(body), headers=engine.address.headers) as response:
                    return (await response.json())["choices"][0]["message"]["content"]
            finally:
                await engine.stop()

    return asyncio.run(ask())
