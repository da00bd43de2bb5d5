"""The agent on a machine with one card, which llama.cpp's engine counts as given, and to which another program may come.

There is no card: the driver's library is the one of `nvml_dump`. The visitor is what `visitor.json` in the state folder says of it, a
process id and the bytes that it holds; without that file nobody is there. The engine's own processes, which are real, hold some of it, too.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil

from tests.support.nvml_dump import DumpedDriver, load_dump

OWN_BYTES = 512 << 20
"""Of each process of an engine."""
DESKTOP_BYTES = 630 << 20
VISITOR = "visitor.json"
UUID = "GPU-00000000-0000-4000-8000-000000000000"


class VisitedCard(DumpedDriver):
    """A healthy RTX 3090 whose holders are looked up at every question."""

    def __init__(self, visitor: Path) -> None:
        super().__init__(load_dump("healthy_3090"))
        self._visitor = visitor

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> Any:
        holders = [{"pid": child.pid, "usedGpuMemory": OWN_BYTES} for child in psutil.Process(os.getpid()).children(recursive=True)]
        if self._visitor.exists():
            visitor = json.loads(self._visitor.read_text())
            holders.append({"pid": visitor["pid"], "usedGpuMemory": visitor["bytes"]})
        device = self.devices[0]
        used = DESKTOP_BYTES + sum(holder["usedGpuMemory"] for holder in holders)
        device["nvmlDeviceGetComputeRunningProcesses_v3"] = holders
        device["nvmlDeviceGetMemoryInfo"] = {**device["nvmlDeviceGetMemoryInfo"], "used": used}
        return super()._answer(name, arguments)


def main() -> None:
    sys.modules["pynvml"] = VisitedCard(Path(os.environ["POTLUCK_NODE_STATE_DIR"]) / VISITOR)
    from potluck.command import main as run
    from potluck_node import supervisor
    from potluck_node.domain.plan import HOLDING

    def cards_given(self: supervisor.EngineSupervisor) -> frozenset[str]:
        """llama.cpp is planned for processors; here its engine has the card as vLLM's would."""
        return frozenset({UUID}) if any(replica.observed.phase in HOLDING for replica in self._replicas.values()) else frozenset()

    supervisor.EngineSupervisor.cards_given = cards_given  # type: ignore[method-assign]
    run()


if __name__ == "__main__":
    main()
