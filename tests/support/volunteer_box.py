"""One volunteer's machine: `potluck node` as processes in folders of their own, with a coordinator on real gRPC that a test directs."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from potluck_protocol.connection import Invite
from potluck_protocol.engine_codec import desired_state_message
from potluck_protocol.metadata import CONNECTION_PATH
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import DesiredState, TokenId
from tests.support.engines import pinned, script_file, wished
from tests.support.link_coordinator import LinkCoordinator, ServedLink, link_coordinator

COMMAND = [sys.executable, "-c", "from potluck_node.command import app; app()"]
SECRET = "s" * 43


@dataclass
class Box:
    """One volunteer's machine: its folders, and a coordinator to reach."""

    coordinator: LinkCoordinator
    folder: Path
    url: str

    @property
    def state_dir(self) -> Path:
        return self.folder / "node"

    @property
    def environment(self) -> dict[str, str]:
        places = {"POTLUCK_NODE_STATE_DIR": str(self.state_dir), "POTLUCK_NODE_CACHE_DIR": str(self.folder / "cache")}
        return {**os.environ, **places, "XDG_CONFIG_HOME": str(self.folder / "config"), "POTLUCK_NODE_SCRIPTED_ENGINE": "true"}

    @property
    def invite(self) -> str:
        return Invite(self.url, self.coordinator.connection.ca_hash, TokenId("token-id-123"), SECRET).encode()

    async def node(self, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(
            subprocess.run,
            [*COMMAND, *arguments],
            env=self.environment,
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @asynccontextmanager
    async def agent(self, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
        log = (self.folder / "agent.log").open("ab")
        process = await asyncio.create_subprocess_exec(*COMMAND, "run", *arguments, env=self.environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            log.close()
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def linked(self) -> ServedLink:
        link = await self.coordinator.next_link(30)
        await link.welcome(epoch=1)
        return link

    def output(self) -> str:
        return (self.folder / "agent.log").read_text()


@asynccontextmanager
async def volunteer_box(tmp_path: Path) -> AsyncIterator[Box]:
    async with link_coordinator(tmp_path) as coordinator:

        async def document(_request: web.Request) -> web.Response:
            return web.Response(body=coordinator.connection.to_json(), content_type="application/json")

        application = web.Application()
        application.router.add_get(CONNECTION_PATH, document)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield Box(coordinator, tmp_path, f"http://127.0.0.1:{runner.addresses[0][1]}")
        finally:
            await runner.cleanup()


async def until_status(box: Box, condition: Any, limit_seconds: float = 30) -> dict[str, Any]:
    async with asyncio.timeout(limit_seconds):
        while True:
            facts = json.loads((await box.node("status", "--json")).stdout)
            if facts["status"] and condition(facts["status"]):
                return facts
            await asyncio.sleep(0.1)


async def ready_link(box: Box, **script: Any) -> ServedLink:
    """A linked agent whose scripted engine is ready."""
    link = await box.linked()
    file = pinned(script_file(box.folder, **script))
    await link.send(desired=desired_state_message(DesiredState(1, (wished(file),))))
    await link.until(lambda: any(engine.state == node_pb2.ENGINE_STATE_READY for f in link.frames for engine in f.heartbeat.engines), 30)
    return link
