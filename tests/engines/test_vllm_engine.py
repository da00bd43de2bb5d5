"""A real vLLM on this machine's processors, started as the node starts it: what it answers, what it tells, and that nothing of it stays.

vLLM takes half a minute to start here, so the tests share one, in the order in which they stand; the last one ends it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import psutil
import pytest
import pytest_asyncio

from potluck_node.engines.asking import ask_load
from potluck_node.engines.base import EngineLaunch
from potluck_node.engines.llamacpp import LlamaCppEngine
from potluck_node.engines.process import EngineProcess
from potluck_node.engines.vllm import VllmEngine
from potluck_protocol.values import EngineShape, FailureKind, ModelId
from tests.engines import one_process as one_process_module
from tests.engines.one_process import TOLERANCE, predicted, shared_memory_of, told
from tests.support.coordinator_process import runs
from tests.support.pool import until
from tests.support.safetensors_model import built_in_folder, built_in_gguf

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

MODEL = ModelId("smollm2")
SLOT_COUNT, CONTEXT_LENGTH_TOKENS = 4, 2048
CACHE_BYTES = 256 * 1024 * 1024
READY_SECONDS_MAX = 240.0
TRICKY_TEXTS = (
    "In 1987 there were 3.14159 of 12,000.",
    "  two  spaces\n\n\ttab\n",
    "naïve café 你好 🍲🍲",
    "<|im_end|>x I'll, they'RE",
    "def f(x):\n    return x",
)
QUESTIONS = ("What is soup? Answer in two sentences.", "Name three colours.", "Write a short poem about sharing a GPU.")


def chat(question: str) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 48}


@pytest.fixture(scope="module")
def folder() -> Path:
    return built_in_folder()


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    return built_in_gguf()


class Running:
    """The engine that the tests share."""

    def __init__(self, process: EngineProcess, session: aiohttp.ClientSession, temporary_folder: Path | None = None) -> None:
        self.process = process
        self.session = session
        self.temporary_folder = temporary_folder

    async def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.process.address.url}/v1/chat/completions"
        async with self.session.post(url, data=json.dumps(body), headers=self.process.address.headers) as response:
            assert response.status == 200, await response.text()
            return await response.json()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(vllm_engine: VllmEngine, folder: Path) -> AsyncIterator[Running]:
    launch = EngineLaunch(MODEL, folder, SLOT_COUNT, CONTEXT_LENGTH_TOKENS, EngineShape(kv_cache_bytes=CACHE_BYTES))
    # Not pytest's, which is too deep for sockets; nor the machine's, where other engines leave and take things meanwhile.
    with TemporaryDirectory() as temporary:
        async with aiohttp.ClientSession() as session:
            process = await EngineProcess.start(vllm_engine, launch, {**os.environ, "TMPDIR": temporary}, session)
            try:
                yield Running(process, session, Path(temporary))
            finally:
                await process.stop()


@contextmanager
def started_by_hand(python: Path, folder: Path) -> Iterator[str]:
    """The URL of a vLLM that was started by its own command, with nothing of ours."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(python), "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", MODEL]
    limits = ["--max-model-len", str(CONTEXT_LENGTH_TOKENS), "--kv-cache-memory-bytes", str(CACHE_BYTES), "--enforce-eager"]
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [*command, *limits, "--host", "127.0.0.1", "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def is_well() -> bool:
        assert server.poll() is None
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
                return response.status == 200
        except OSError:
            return False

    try:
        assert until(is_well, READY_SECONDS_MAX)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.fixture(scope="module")
def texts_by_hand(vllm_engine: VllmEngine, folder: Path) -> list[str]:
    """What vLLM says to whoever starts and asks it directly."""
    texts = []
    with started_by_hand(vllm_engine.python, folder) as url:
        for question in QUESTIONS:
            request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(chat(question)).encode())
            request.add_header("content-type", "application/json")
            with urllib.request.urlopen(request, timeout=60) as response:
                texts.append(json.load(response)["choices"][0]["message"]["content"])
    return texts


async def test_it_says_what_vllm_says_when_asked_directly(texts_by_hand, running):
    answers = [await running.ask(chat(question)) for question in QUESTIONS]
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == texts_by_hand
    assert len(set(texts_by_hand)) == len(QUESTIONS)


async def test_the_folder_made_of_the_gguf_speaks_english(running):
    """Rows in the wrong order would still give text, and no sense."""
    answer = await running.ask(chat("What is the capital of France?"))
    assert "Paris" in answer["choices"][0]["message"]["content"]


async def test_the_folder_made_of_the_gguf_counts_tokens_as_llama_cpp_does(running, gguf_file):
    launch = EngineLaunch(MODEL, gguf_file, 1, CONTEXT_LENGTH_TOKENS)
    llamacpp = Running(await EngineProcess.start(LlamaCppEngine(), launch, os.environ, running.session), running.session)
    try:
        for text in TRICKY_TEXTS:
            body = {**chat(text), "max_tokens": 1}
            ours, theirs = [(await engine.ask(body))["usage"]["prompt_tokens"] for engine in (running, llamacpp)]
            assert ours == theirs, text
    finally:
        await llamacpp.process.stop()


async def test_its_metrics_are_understood(running):
    load = await ask_load(running.session, "vllm", running.process.address)
    assert (load.running_count, load.waiting_count) == (0, 0)
    # 30 layers, keys and values of 3 heads of 64 numbers of two bytes.
    assert load.kv_capacity_tokens == pytest.approx(CACHE_BYTES / (30 * 2 * 3 * 64 * 2), rel=0.02)
    assert load.kv_used_ratio is not None
    assert load.prefix_queried_tokens
    assert load.prefix_hit_tokens is not None


async def test_its_cache_holds_what_the_fit_says_of_a_node_with_so_much_memory(running, folder):
    (whole,) = predicted(folder, CONTEXT_LENGTH_TOKENS, SLOT_COUNT).memory
    found = predicted(folder, CONTEXT_LENGTH_TOKENS, SLOT_COUNT, whole.weight_bytes + whole.overhead_bytes + CACHE_BYTES)
    (memory,) = found.memory
    assert memory.kv_available_bytes == CACHE_BYTES
    load = await ask_load(running.session, "vllm", running.process.address)
    assert load.kv_capacity_tokens == pytest.approx(found.kv_capacity_tokens, rel=TOLERANCE)


async def test_a_cache_as_big_as_the_fit_says_holds_the_sequences_that_were_wished(one_process):
    found = one_process.found
    given_tokens = told(found, "--kv-cache-memory-bytes") / found.kv_bytes_per_token
    assert one_process.kv_capacity_tokens == pytest.approx(given_tokens, rel=TOLERANCE)
    assert one_process.kv_capacity_tokens >= one_process_module.SLOT_COUNT * one_process_module.CONTEXT_LENGTH_TOKENS


async def test_of_one_that_was_killed_with_its_launcher_no_shared_memory_stays(one_process):
    assert one_process.shared
    assert one_process.left == frozenset()


async def test_nobody_without_the_key_gets_anything_of_it(running):
    url = running.process.address.url
    for path, status in {"/health": 200, "/metrics": 200, "/v1/models": 200, "/invocations": 404, "/tokenize": 404, "/docs": 404}.items():
        async with (
            running.session.get(url + path) as without,
            running.session.get(url + path, headers=running.process.address.headers) as own,
        ):
            assert (without.status, own.status) == (403, status), path


async def test_it_listens_on_loopback_only(running):
    listening = {
        connection.laddr.ip
        for process in psutil.Process(running.process.pid).children(recursive=True)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


async def test_a_killed_worker_ends_all_of_it_at_once(running):
    """vLLM alone goes on waiting for it, and says that it is well."""
    everything = psutil.Process(running.process.pid).children(recursive=True)
    shared = shared_memory_of(everything)
    assert shared
    assert any(path.is_socket() for path in running.temporary_folder.rglob("*"))
    worker = next(process for process in everything if title_of(process).startswith("VLLM::Worker"))
    worker.kill()
    began = time.monotonic()
    failure = await running.process.wait()
    assert time.monotonic() - began < 5.0
    assert failure.kind in {FailureKind.CRASHED, FailureKind.KILLED}, failure
    await running.process.stop()
    assert until(lambda: not any(runs(process) for process in everything), 5.0)
    assert not [path for path in shared if path.exists()]
    left = [path.name for path in running.temporary_folder.iterdir() if not path.name.startswith("torchinductor_")]
    assert left == [], "sockets, and what its workers met by"


def title_of(process: psutil.Process) -> str:
    """Empty for one that has ended meanwhile: vLLM starts processes that last for a moment."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
