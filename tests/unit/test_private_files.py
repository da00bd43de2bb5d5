"""Small files that are found whole or not at all, by their owner only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from potluck_protocol.private_files import write_private


@pytest.mark.parametrize("durable", [True, False])
def test_private_files_are_private_and_whole(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "node.key"
    path.write_text("old")
    path.chmod(0o644)
    previous = os.umask(0)
    try:
        write_private(path, b"secret", durable=durable)
    finally:
        os.umask(previous)
    assert path.read_bytes() == b"secret"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["node.key"]


def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_private(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["node.key"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root writes into other users' folders")
def test_what_root_writes_into_another_users_folder_is_that_users(tmp_path: Path) -> None:
    os.chown(tmp_path, 65_534, 65_533)
    path = tmp_path / "control.json"
    write_private(path, b"paused")
    assert (path.stat().st_uid, path.stat().st_gid, path.stat().st_mode & 0o777) == (65_534, 65_533, 0o600)
