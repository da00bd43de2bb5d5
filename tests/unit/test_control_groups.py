"""What control groups leave a node: both versions of the kernel's interface, written as folders."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from potluck_node.probe import host
from potluck_node.probe.control_groups import ControlGroups

GIB = 2**30
V1_UNLIMITED = 9_223_372_036_854_771_712


def groups(tmp_path: Path, membership: str, files: dict[str, str]) -> ControlGroups:
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(f"{text}\n"))
    (tmp_path / "membership").write_bytes(os.fsencode(membership))
    return ControlGroups(tmp_path / "cgroup", tmp_path / "membership")


@pytest.mark.parametrize(
    ("membership", "files", "limit", "free", "processors"),
    [
        pytest.param("0::/\n", {"cgroup.controllers": "cpu memory"}, None, None, None, id="version 2, the root, which has no limits"),
        pytest.param(
            "0::/user.slice/a\n", {"user.slice/a/memory.max": "max", "user.slice/a/cpu.max": "max 100000"}, None, None, None, id="none"
        ),
        pytest.param(
            "0::/\n",
            {"memory.max": 8 * GIB, "memory.current": 3 * GIB, "memory.stat": f"anon 1\ninactive_file {GIB}", "cpu.max": "250000 100000"},
            8 * GIB,
            6 * GIB,
            2.5,
            id="a container of version 2, which sees its own group as the root",
        ),
        pytest.param(
            "0::/a/b\n",
            {
                "a/memory.max": 4 * GIB,
                "a/memory.current": 4 * GIB,
                "a/b/memory.max": 6 * GIB,
                "a/b/memory.current": GIB,
                "a/cpu.max": "50000 100000",
            },
            4 * GIB,
            0,
            0.5,
            id="the group above is tighter, and full",
        ),
        pytest.param(
            "5:memory:/a\n3:cpuacct,cpu:/a\n0::/\n",
            {
                "memory/memory.limit_in_bytes": V1_UNLIMITED,
                "memory/a/memory.limit_in_bytes": 2 * GIB,
                "memory/a/memory.usage_in_bytes": 2 * GIB,
                "memory/a/memory.stat": f"cache 1\ninactive_file 7\ntotal_inactive_file {GIB}",
                "cpu/cpu.cfs_quota_us": -1,
                "cpu/cpu.cfs_period_us": 100_000,
                "cpu/a/cpu.cfs_quota_us": 400_000,
                "cpu/a/cpu.cfs_period_us": 100_000,
            },
            2 * GIB,
            GIB,
            4.0,
            id="version 1",
        ),
        pytest.param(
            "5:memory:/docker/0123\n4:cpu,cpuacct:/docker/0123\n",
            {
                "memory/memory.limit_in_bytes": 2 * GIB,
                "memory/memory.usage_in_bytes": GIB,
                "memory/memory.stat": "",
                "cpu/cpu.cfs_quota_us": 150_000,
                "cpu/cpu.cfs_period_us": 100_000,
            },
            2 * GIB,
            GIB,
            1.5,
            id="a container of version 1 that is told its path outside",
        ),
        pytest.param(
            "no such line\n\n7\n0::/\udcff\r\u2028a: \n",
            {"\udcff\r\u2028a: /memory.max": GIB, "\udcff\r\u2028a: /memory.current": 1, "\udcff\r\u2028a: /cpu.max": "50000 100000"},
            GIB,
            GIB - 1,
            0.5,
            id="a group whose name is no text, among lines of a kernel to come",
        ),
        pytest.param(
            "0::/a\n", {"a/memory.max": "max", "a/memory.high": 4 * GIB, "a/memory.current": GIB}, 4 * GIB, 3 * GIB, None, id="MemoryHigh="
        ),
        pytest.param("0::/\n", {"memory.max": "\udcff", "cpu.max": "\udcff 1"}, None, None, None, id="bytes that no kernel writes"),
        pytest.param("0::/../other\n", {"memory.max": GIB}, None, None, None, id="a group beside the mount is not ours to read"),
        pytest.param("0::/\n", {"memory.max": "many", "cpu.max": "1 0"}, None, None, None, id="words that no kernel writes"),
    ],
)
def test_the_tightest_group_says_what_there_is(tmp_path, membership, files, limit, free, processors):
    found = groups(tmp_path, membership, {name: str(text) for name, text in files.items()})
    assert (found.memory_limit_bytes(), found.memory_free_bytes(), found.processor_limit()) == (limit, free, processors)


def test_where_there_are_no_control_groups_the_machine_is_the_limit(tmp_path):
    none = ControlGroups(tmp_path / "nothing", tmp_path / "nothing")
    assert (none.memory_limit_bytes(), none.memory_free_bytes(), none.processor_limit()) == (None, None, None)
    assert host.memory_bytes(none) == psutil.virtual_memory().total
    assert host.cpu_count(none) == len(os.sched_getaffinity(0))


def test_a_node_in_a_container_has_what_the_container_has(tmp_path):
    files = {"memory.max": str(GIB), "memory.current": str(GIB // 4), "cpu.max": "10000 100000"}
    container = groups(tmp_path, "0::/\n", files)
    assert host.memory_bytes(container) == GIB
    assert host.memory_available_bytes(container) == GIB - GIB // 4
    assert host.cpu_count(container) == 1


def test_a_container_larger_than_its_machine_has_what_the_machine_has(tmp_path):
    container = groups(tmp_path, "0::/\n", {"memory.max": str(1 << 50), "memory.current": "0", "cpu.max": "100000000 100000"})
    assert host.memory_bytes(container) == psutil.virtual_memory().total
    assert host.cpu_count(container) == len(os.sched_getaffinity(0))
