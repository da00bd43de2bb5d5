"""A whole coordinator inside the test's process: real SQLite, real ports on loopback, no Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potluck_coordinator.directory.directory import Directory
from potluck_coordinator.domain.gateways import GatewayRecord
from potluck_coordinator.gateway import gateway as gateway_module
from potluck_coordinator.gateway.gateway import Endpoints, Gateway
from potluck_coordinator.settings import Settings
from potluck_coordinator.storage.state import StateName
from potluck_protocol.clock import Clock, SystemClock
from potluck_protocol.values import ModelId

TINY_CATALOGUE = """
[[model]]
model_id = "tiny"
source = "path:/nowhere"
file_name = "tiny.json"
sha256 = "{sha256}"
size_bytes = 10
engine_kind = "scripted"
context_length_tokens = 512
slot_count = 2
prompt_price_micro_credits = 1
completion_price_micro_credits = 4
licence = "Apache-2.0"
endpoints = ["/v1/chat/completions", "/v1/completions"]
created_at_unix_seconds = 1
""".format(sha256="0" * 64)
TINY = ModelId("tiny")


@dataclass(frozen=True, slots=True)
class Coordinator:
    directory: Directory
    gateway: Gateway
    endpoints: Endpoints
    settings: Settings
    operator_key: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.endpoints.http_port}"


async def replace_gateway_in_books(coordinator: Coordinator) -> None:
    """What comes of a new gateway's registration in the books; the one that runs is not told, and goes on as a ghost."""
    store = coordinator.directory._store
    epoch = await store.run(lambda work: work.state.advance(StateName.GATEWAY_EPOCH))
    await store.run(lambda work: work.gateways.put(GatewayRecord(0, epoch)))
    await coordinator.directory.ledger.settle_orphans()


@asynccontextmanager
async def running_coordinator(folder: Path, clock: Clock | None = None, **changes: Any) -> AsyncIterator[Coordinator]:
    """Starts one on ephemeral ports with the catalogue above, and stops it."""
    async with running_gateways(folder, 1, clock, **changes) as (coordinator,):
        yield coordinator


@asynccontextmanager
async def running_gateways(
    folder: Path, count: int = 2, clock: Clock | None = None, **changes: Any
) -> AsyncIterator[tuple[Coordinator, ...]]:
    """The same with several gateways, each on ports of its own, over one directory; each is given with the ports of its own."""
    clock = clock or SystemClock()
    folder.mkdir(parents=True, exist_ok=True)
    catalogue = folder / "catalogue.toml"
    catalogue.write_text(TINY_CATALOGUE)
    settings = Settings(
        **{"data_dir": folder, "http_port": 0, "grpc_port": 0, "link_port": 0, "catalogue_file": catalogue, "gateways": count, **changes},
    )
    directory = await Directory.open(settings, clock)
    gateways = [Gateway(settings, directory, clock, number) for number in range(count)]
    # In a test the first unforeseen failure is one too many.
    gateway_module.FAILURES_IN_A_ROW_MAX = 0
    background = asyncio.ensure_future(directory.run_background())
    test, parts = asyncio.current_task(), [background]

    def has_ended(part: asyncio.Future[None]) -> None:
        # A part that dies would leave the test waiting for what never comes: its failure is the test's.
        if not part.cancelled() and test is not None:
            test.cancel(f"{part.exception()!r}")

    try:
        started = [await gateway.start() for gateway in gateways]
        operator_key = json.loads(settings.operator_file.read_text())["api_key"]
        parts += [asyncio.ensure_future(gateway.run()) for gateway in gateways]
        for part in parts[1:]:
            part.add_done_callback(has_ended)
        yield tuple(
            Coordinator(directory, gateway, endpoints, settings, operator_key) for gateway, endpoints in zip(gateways, started, strict=True)
        )
    except asyncio.CancelledError:
        for part in parts:
            if part.done() and not part.cancelled():
                part.result()
        raise
    finally:
        for part in parts[1:]:
            part.cancel()
        await asyncio.gather(*parts[1:], return_exceptions=True)
        for gateway in gateways:
            await gateway.stop()
        background.cancel()
        await asyncio.gather(background, return_exceptions=True)
        directory.close()
