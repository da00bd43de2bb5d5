"""llama.cpp as a process of its own: `python -m potluck_node.engines.llamacpp_server --model FILE.gguf --alias NAME --context N --slots N`.

Loads the model, prints one line of JSON with its URL, serves on loopback until llama.cpp stands still, and with `--lifeline` no longer than
its stdin lasts. Decides how much of the machine llama.cpp takes, and that it is reached through `llamacpp_front` only. xllamacpp is
imported here and nowhere else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any, Final

import uvloop

from potluck_node.engines.llamacpp_front import Front
from potluck_node.lifeline import exit_with_parent

PROMPT_CACHE_MIB: Final = 256
"""Prompts kept for slots that were reused; llama.cpp's own default of 8 GiB is not ours to take from a volunteer."""
CPU_BATCH_TOKENS: Final = 64
"""A cancelled prompt goes on to the end of its batch. After a hang-up in a prompt of 1,500 words, SmolLM2 135M on two busy CPU cores was
free within 0.98 s (median 0.27 s); with 128 within 2.0 s (0.9 s). How fast prompts are read differed less than it did from run to run.
"""
GPU_BATCH_TOKENS: Final = 2048
NO_PINGS: Final = -1
"""Seconds. A silent stream is silent: llama.cpp's HTTP thread would keep it alive by comments while the model hangs."""
EXIT_STANDSTILL: Final = 70
CARDS_BY: Final = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")
"""What CUDA, ROCm and Vulkan go by. The wheel that comes with the node has none of them."""
ERRORS_ONLY: Final = 1
"""llama.cpp's log level. Its warnings come with every request, and at 5 it writes prompts."""


def parameters(options: argparse.Namespace, *, has_gpu: bool) -> Any:
    """What llama.cpp is started with."""
    import xllamacpp  # noqa: PLC0415 - 100 MB of native code, loaded by this process only

    params = xllamacpp.CommonParams()
    params.model.path = str(first_file(options.model))
    params.model_alias = {options.alias}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    # Not guessable, as the door's own: no web page or neighbour on this machine gets past it.
    params.api_prefix = f"/{secrets.token_urlsafe(24)}"
    params.cors_origins = "http://127.0.0.1"
    params.cors_origins_explicit = True
    params.n_parallel = options.slots
    params.n_ctx = options.context * options.slots
    params.kv_unified = False  # the door's `/metrics` counts each slot's cache by itself
    params.n_batch = params.n_ubatch = min(GPU_BATCH_TOKENS if has_gpu else CPU_BATCH_TOKENS, params.n_ctx)
    if (thread_count := thread_count_max()) is not None:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = thread_count
    params.cache_ram_mib = PROMPT_CACHE_MIB
    params.sse_ping_interval = NO_PINGS
    params.offline = True
    params.ui = False
    # Both for the door alone, which tells the numbers in them: a slot's own page has more of a request than is anybody's business.
    params.endpoint_metrics = True
    params.endpoint_slots = True
    params.endpoint_props = False
    params.verbosity = ERRORS_ONLY
    return params


def thread_count_max() -> int | None:
    """The processors that this process may use, where those are not all of the machine's; None: they are, and llama.cpp knows best.

    llama.cpp counts the machine's, and its threads wait for each other by spinning: kept to one processor of two, SmolLM2 135M wrote 72
    tokens/s with two threads and 115 with one.
    """
    if not hasattr(os, "sched_getaffinity"):  # macOS keeps no process to some of its processors
        return None
    allowed_count = len(os.sched_getaffinity(0))
    return allowed_count if allowed_count < (os.cpu_count() or 1) else None


def first_file(model: Path) -> Path:
    """The file itself, or the first of several in a folder: their names are numbered, and llama.cpp finds the others beside it."""
    return min(model.rglob("*.gguf"), default=model) if model.is_dir() else model


def start_engine(options: argparse.Namespace) -> tuple[Any, str]:
    """Loads the model; the server, which stops when it is dropped, and its URL."""
    # Coordinators plan llama.cpp for the processors: a card that another build finds is promised to other engines, and to its owner.
    os.environ.update(dict.fromkeys(CARDS_BY, ""))
    import xllamacpp  # noqa: PLC0415 - as above, and after the cards are hidden

    has_gpu = any("GPU" in device["type"].name for device in xllamacpp.get_device_info())
    params = parameters(options, has_gpu=has_gpu)
    server = xllamacpp.Server(params)
    return server, server.listening_address + params.api_prefix


def end_at_standstill() -> None:
    """Ends this process as it is: threads of llama.cpp's that never return would keep it from ending well. Its supervisor begins anew."""
    print("llama.cpp has work and says nothing any more: ended", file=sys.stderr, flush=True)  # noqa: T201 - the supervisor's tail
    os._exit(EXIT_STANDSTILL)


async def _run(engine_url: str) -> None:
    async with Front(engine_url, end_at_standstill).serve() as url:
        print(json.dumps({"url": url}), flush=True)  # noqa: T201 - how the supervisor learns the port
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="potluck_node.engines.llamacpp_server", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the GGUF file, or a folder of its parts")
    parser.add_argument("--alias", required=True, help="the model's name in answers")
    parser.add_argument("--context", type=int, required=True, help="tokens of one slot, prompt and answer together")
    parser.add_argument("--slots", type=int, required=True, help="requests answered at a time")
    parser.add_argument("--lifeline", action="store_true", help="exit when stdin ends")
    options = parser.parse_args()
    if options.lifeline:
        exit_with_parent()
    try:
        _server, engine_url = start_engine(options)
    except RuntimeError as error:
        # llama.cpp has said on stderr what is wrong; a traceback would push that out of the supervisor's tail.
        raise SystemExit(f"llama.cpp did not load {options.model.name}: {error}") from None
    uvloop.run(_run(engine_url))


if __name__ == "__main__":
    main()
