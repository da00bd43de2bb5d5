"""The memory limits that tests make, taken down among processes that end by themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support import memory_limits


def test_a_process_that_ends_on_its_own_while_its_group_is_emptied_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    members = tmp_path / "cgroup.procs"
    members.write_text(f"{ended.pid}\n")
    # A moment ago it was there, and a moment later the kernel has taken it out.
    monkeypatch.setattr(psutil, "pid_exists", lambda _: True)
    monkeypatch.setattr(memory_limits.time, "sleep", lambda _: members.write_text(""))
    memory_limits._empty(tmp_path)
    assert members.read_text() == ""
