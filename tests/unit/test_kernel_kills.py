"""Kills for want of memory count for an end that comes with them, and for no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from potluck_node.probe.control_groups import ControlGroups
from potluck_node.probe.kernel_kills import LOOK_SECONDS, MACHINE_SECONDS_MAX, OWN_SECONDS_MAX, KernelKills

VERSIONS = {
    "version 2": ("0::/a\n", "a/memory.events", "low 0\noom 9\noom_kill {}\noom_group_kill 0"),
    "version 1": ("4:memory:/a\n", "memory/a/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill {}"),
    "version 1, outside path": ("4:memory:/docker/a\n", "memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill {}"),
}


class Machine:
    """Whose kernel kills, in the own control group or anywhere."""

    def __init__(self, folder: Path, version: str = "version 2") -> None:
        membership, name, self._form = VERSIONS[version]
        (folder / "membership").write_text(membership)
        self._own, self._all = folder / "groups" / name, folder / "vmstat"
        self._own.parent.mkdir(parents=True)
        self.now_seconds = 1000.0
        self.count(own=3, machine=7)
        groups = ControlGroups(folder / "groups", folder / "membership")
        self.kills = KernelKills(groups, self._all, lambda: self.now_seconds)

    def count(self, *, own: int, machine: int) -> None:
        self._own.write_text(self._form.format(own))
        self._all.write_text(f"oom_killers_name 3\noom_kill {machine}\nnr_free_pages 1\n")

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds / LOOK_SECONDS)):
            self.now_seconds += LOOK_SECONDS
            self.kills.look()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_kill_in_the_own_group_counts_until_the_last_of_an_engine_has_noticed(tmp_path, version):
    machine = Machine(tmp_path, version)
    machine.wait(3_600)
    assert not machine.kills.came_lately()
    machine.count(own=4, machine=7)
    machine.wait(OWN_SECONDS_MAX - LOOK_SECONDS)
    assert machine.kills.came_lately()
    machine.wait(2 * LOOK_SECONDS)
    assert not machine.kills.came_lately()


def test_a_kill_anywhere_counts_only_if_it_came_with_the_end(tmp_path):
    machine = Machine(tmp_path)
    machine.wait(60)
    machine.count(own=3, machine=8)
    assert machine.kills.came_lately()
    machine.wait(MACHINE_SECONDS_MAX - LOOK_SECONDS)
    assert machine.kills.came_lately()
    machine.wait(2 * LOOK_SECONDS)
    assert not machine.kills.came_lately()


def test_a_process_that_stood_still_while_the_kernel_killed_has_not_missed_it(tmp_path):
    machine = Machine(tmp_path)
    machine.wait(60)
    machine.count(own=4, machine=8)
    machine.now_seconds += 100
    assert machine.kills.came_lately()


def test_where_nothing_counts_nothing_was_killed(tmp_path):
    kills = KernelKills(ControlGroups(tmp_path / "no", tmp_path / "no"), tmp_path / "no", lambda: 0.0)
    assert not kills.came_lately()
