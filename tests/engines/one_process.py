"""One vLLM that has the whole model, started with what the fit says, asked directly, and killed; and what the fit says."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from potluck_coordinator.domain.fit.architecture import GIB, ModelArchitecture
from potluck_coordinator.domain.fit.config_json import architecture_of_config
from potluck_coordinator.domain.fit.engines import VLLM
from potluck_coordinator.domain.fit.fitting import fit
from potluck_coordinator.domain.fit.hardware import NodeHardware, NodeProcessor
from potluck_coordinator.domain.fit.report import ShapeFit
from potluck_node.engines.asking import ask_load
from potluck_node.engines.base import EngineLaunch
from potluck_node.engines.process import EngineProcess
from potluck_node.engines.vllm import VllmEngine
from potluck_protocol.values import EngineShape, ModelId
from tests.support.group_pool import MODEL, PROMPT, TOKENS, WEIGHTS

CONTEXT_LENGTH_TOKENS, SLOT_COUNT = 1000, 3
"""Not a whole number of blocks, nor the context of the other engines."""
TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class OneProcess:
    """What it was told, said, and left."""

    found: ShapeFit
    text: str
    kv_capacity_tokens: int | None
    shared: frozenset[Path]
    left: frozenset[Path]
    """Of what it shared, after it was killed with its launcher and stopped."""


def architecture(folder: Path) -> ModelArchitecture:
    """The model's, by its folder."""
    config = json.loads((folder / "config.json").read_text())
    return architecture_of_config(config, model_id=MODEL, weight_bytes=(folder / WEIGHTS).stat().st_size)


def predicted(folder: Path, context_length_tokens: int, slot_count: int, memory_budget_bytes: int = 16 * GIB) -> ShapeFit:
    """What the fit says of vLLM on processors."""
    node = NodeHardware(processor=NodeProcessor(memory_budget_bytes, 40.0, 2))
    report = fit(
        architecture(folder), [node], engine_kind=VLLM, context_length_tokens=context_length_tokens, sequence_count_wanted=slot_count
    )
    assert report.best is not None, report.reason
    return report.best


def told(found: ShapeFit, name: str) -> int:
    """A number of the flags that the fit gives."""
    arguments = found.flags.arguments
    return int(arguments[arguments.index(name) + 1])


async def run(vllm_engine: VllmEngine, folder: Path) -> OneProcess:
    """Starts it as the fit says, asks it, and kills it as a hung one is."""
    found = predicted(folder, CONTEXT_LENGTH_TOKENS, SLOT_COUNT)
    launch = EngineLaunch(
        ModelId(MODEL),
        folder,
        SLOT_COUNT,
        told(found, "--max-model-len"),
        EngineShape(kv_cache_bytes=told(found, "--kv-cache-memory-bytes")),
    )
    async with aiohttp.ClientSession() as session:
        engine = await EngineProcess.start(vllm_engine, launch, os.environ, session)
        try:
            text = (await _chat(engine, session))["choices"][0]["message"]["content"]
            load = await ask_load(session, vllm_engine.kind, engine.address)
            shared = shared_memory_of(psutil.Process(engine.pid).children(recursive=True))
            engine.condemn("nobody asks it any more")
        finally:
            await engine.stop()
    return OneProcess(found, text, load.kv_capacity_tokens, shared, frozenset(path for path in shared if path.exists()))


async def _chat(engine: EngineProcess, session: aiohttp.ClientSession) -> Any:
    body = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": TOKENS}
    async with session.post(f"{engine.address.url}/v1/chat/completions", data=json.dumps(body), headers=engine.address.headers) as response:
        return await response.json()


def shared_memory_of(processes: list[psutil.Process]) -> frozenset[Path]:
    """The named shared memory that they have open; of those that have just ended, none."""
    found: set[Path] = set()
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        except OSError:
            continue
        found |= {Path(line[line.index("/dev/shm/") :]) for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")}
    return frozenset(found)
