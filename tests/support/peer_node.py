"""A node that does nothing but measure its peers: `python -m tests.support.peer_node SETTINGS`, for hosts that are namespaces.

The settings are JSON: "node_id", "address", "port", "peers" (of `Peer`, the secret in hex) and "seconds". It prints one line of JSON for
every change of what it knows, among the log's lines.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from typing import Any

from potluck_node.peer_measurement import PeerMeasuring
from potluck_protocol.clock import SystemClock
from potluck_protocol.values import GroupOffer, NodeId, Peer


async def run(settings: dict[str, Any]) -> None:
    def show() -> None:
        print(json.dumps([asdict(known) for known in measuring.measurements()]), flush=True)

    offer = GroupOffer("lab", settings["address"], settings["port"])
    measuring = PeerMeasuring(NodeId(settings["node_id"]), offer, SystemClock())
    measuring.on_change(show)
    peers = [{**peer, "secret": bytes.fromhex(peer["secret"])} for peer in settings["peers"]]
    measuring.set_peers(tuple(Peer(**peer) for peer in peers))
    running = asyncio.create_task(measuring.run())
    await asyncio.sleep(settings["seconds"] / 2)
    measuring.set_peers(())
    await asyncio.sleep(settings["seconds"] / 2)
    running.cancel()


if __name__ == "__main__":
    asyncio.run(run(json.loads(sys.argv[1])))
