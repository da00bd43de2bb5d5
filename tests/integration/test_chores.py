"""What the directory does each second: a chore that fails keeps no other from being done, unless the database is away."""

from __future__ import annotations

import pytest

from potluck_coordinator.directory.directory import Directory
from potluck_coordinator.settings import Settings
from potluck_protocol.errors import ErrorCode, PotluckError
from tests.support.books import MovableClock


@pytest.mark.parametrize(("code", "others_are_done"), [(ErrorCode.INTERNAL_ERROR, True), (ErrorCode.COORDINATOR_UNAVAILABLE, False)])
async def test_a_chore_that_fails(tmp_path, monkeypatch, code, others_are_done):
    directory = await Directory.open(Settings(data_dir=tmp_path), MovableClock())
    done = []

    async def fail() -> None:
        raise PotluckError(code)

    async def forget_old() -> None:
        done.append("forget_old")

    try:
        monkeypatch.setattr(directory.nodes, "judge_minutes", fail)
        monkeypatch.setattr(directory.lethal, "forget_old", forget_old)
        await directory.do_chores()
        assert done == (["forget_old"] if others_are_done else [])
        monkeypatch.undo()
        await directory.do_chores()
    finally:
        directory.close()
