"""The kernel's count of what it killed for want of memory, as a file of the test's, and no control group's."""

from __future__ import annotations

from pathlib import Path

import pytest

from potluck_node.engines import process
from potluck_node.probe.control_groups import ControlGroups
from potluck_node.probe.kernel_kills import KernelKills


def count_kills(monkeypatch: pytest.MonkeyPatch, machine_counts: Path) -> None:
    """Engines that start from now on look there."""
    nowhere = machine_counts.parent / "no" / "groups"
    monkeypatch.setattr(process, "KernelKills", lambda: KernelKills(ControlGroups(nowhere, nowhere), machine_counts))
