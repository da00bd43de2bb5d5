"""Two agents of one machine that serve the same folder of their owner's: what one does to its links is no fault to the other."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from threading import Event

import pytest

from potluck_node.model_store import store, verification
from potluck_node.model_store.verification import TRIES_MAX, FileMismatchError
from tests.integration.test_model_store import ensured, store_in
from tests.support.tiny_model_folder import SHARDS, good_files, pinned_folder

GOOD = good_files()
STORE_COUNT = 4


class AnotherAgent:
    """Links a file of the owner's into a folder of its own, whenever it is told to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = count()
        folder.mkdir()

    def link(self, path: Path) -> None:
        os.link(path, self._folder / str(next(self._numbers)))


@pytest.fixture
def another(tmp_path: Path) -> AnotherAgent:
    return AnotherAgent(tmp_path / "another")


@pytest.fixture
def while_hashed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], None]], list[str]]:
    """Has something done after each hash, before anybody looks at it; the names of what was hashed."""

    def start(work: Callable[[Path], None]) -> list[str]:
        real, names = verification.sha256_of, []

        def hashed(path: Path, stop: Event) -> str:
            found = real(path, stop)
            names.append(path.name)
            work(path)
            return found

        monkeypatch.setattr(verification, "sha256_of", hashed)
        return names

    return start


async def test_stores_that_take_one_folder_at_the_same_time_all_have_it(tmp_path):
    model = pinned_folder(tmp_path / "owners", GOOD)
    for number in range(5):
        stores = [store_in(tmp_path / f"{number}-{each}") for each in range(STORE_COUNT)]
        folders = await asyncio.gather(*(ensured(each, model) for each in stores))
        assert len(set(folders)) == STORE_COUNT
        for folder in folders:
            assert all((folder / name).samefile(tmp_path / "owners" / name) for name in GOOD)


async def test_a_link_made_while_a_file_is_hashed_costs_another_hash_and_no_refusal(tmp_path, another, while_hashed):
    model = pinned_folder(tmp_path / "owners", GOOD)
    linked: set[str] = set()

    def link_once(path: Path) -> None:
        if path.name not in linked:
            linked.add(path.name)
            another.link(path)

    hashed = while_hashed(link_once)
    folder = await ensured(store_in(tmp_path), model)
    assert sorted(hashed) == sorted([*GOOD, *GOOD])
    hashed.clear()
    assert await ensured(store_in(tmp_path), model) == folder
    assert hashed == []


async def test_a_link_made_while_a_file_is_looked_into_costs_another_look_and_no_refusal(tmp_path, another, monkeypatch):
    model = pinned_folder(tmp_path / "owners", GOOD)
    real, looked_into = store.check_files, []

    async def check(root, names, checked, environment):
        await real(root, names, checked, environment)
        looked_into.append(checked)
        if len(looked_into) == 1:
            another.link(root / SHARDS[0])

    monkeypatch.setattr(store, "check_files", check)
    await ensured(store_in(tmp_path), model)
    assert [sorted(names) for names in looked_into] == [sorted(GOOD), [SHARDS[0]]]


async def test_a_file_that_changes_whenever_it_is_hashed_is_refused(tmp_path, another, while_hashed):
    model = pinned_folder(tmp_path / "owners", {"tiny.gguf": b"never looked into"})
    hashed = while_hashed(another.link)
    with pytest.raises(FileMismatchError, match=r"tiny\.gguf"):
        await ensured(store_in(tmp_path), model)
    assert hashed == ["tiny.gguf"] * TRIES_MAX


async def test_a_file_that_changes_whenever_it_is_looked_into_is_refused(tmp_path, another, monkeypatch):
    model = pinned_folder(tmp_path / "owners", GOOD)
    real = store.check_files

    async def check(root, names, checked, environment):
        await real(root, names, checked, environment)
        another.link(root / SHARDS[0])

    monkeypatch.setattr(store, "check_files", check)
    with pytest.raises(FileMismatchError, match="whenever it was checked"):
        await ensured(store_in(tmp_path), model)


async def test_bytes_written_while_a_file_is_hashed_are_still_found(tmp_path, while_hashed):
    model = pinned_folder(tmp_path / "owners", GOOD)

    def overwrite(path: Path) -> None:
        if path.name == SHARDS[0]:
            before = path.stat()
            path.write_bytes(b"\0" + GOOD[SHARDS[0]][1:])
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    while_hashed(overwrite)
    with pytest.raises(FileMismatchError):
        await ensured(store_in(tmp_path), model)
