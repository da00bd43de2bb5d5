"""What engines share in memory does not stay, whoever is killed, and nobody else's goes with it."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from potluck_node.child_process import ChildProcess
from potluck_node.engines.process import EngineProcess
from potluck_node.engines.shared_memory import FOLDER_PREFIX, RECORD_NAME, EngineFolder, free_what_the_dead_left

STAND_IN = Path(__file__).parents[1] / "support" / "foreign_engine.py"
SHARED = Path("/dev/shm")
SECONDS_MAX = 15.0
HOLD = f"""
import sys, time
from pathlib import Path
from potluck_node.engines.shared_memory import EngineFolder
folder = EngineFolder()
folder.note(int(word) for word in sys.argv[1:])
print(folder.path, flush=True)
time.sleep({SECONDS_MAX})
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers of other tests, dead or alive, are none of these tests' business."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def launcher(folder: Path) -> tuple[str, ...]:
    folder.mkdir()
    return ("-m", "potluck_node.engines.foreign_server", "--lifeline", "--", sys.executable, "-P", str(STAND_IN), "{port}", str(folder))


def memory_of(folder: Path) -> list[Path]:
    told = json.loads((folder / "told.json").read_text())
    return [SHARED / f"potluck-test-{told['pid']}", SHARED / f"sem.{told['semaphore'].lstrip('/')}"]


def folders(place: Path) -> list[Path]:
    return list(place.glob(f"{FOLDER_PREFIX}*"))


@contextmanager
def mapped(name: str) -> Iterator[Path]:
    """A file of shared memory that this process has open."""
    path = SHARED / name
    path.write_bytes(bytes(mmap.PAGESIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), mmap.PAGESIZE):
        yield path
    path.unlink(missing_ok=True)


@contextmanager
def noting(*process_ids: int) -> Iterator[subprocess.Popen[str]]:
    """A launcher that has noted what these processes share, and is killed."""
    command = [sys.executable, "-P", "-c", HOLD, *map(str, process_ids)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process
        process.kill()


async def test_the_next_start_frees_what_an_engine_shared_that_was_killed_with_its_launcher(tmp_path):
    dead = ChildProcess.spawn(launcher(tmp_path / "dead"), os.environ)
    assert await asyncio.wait_for(dead.first_line(), SECONDS_MAX)
    left = memory_of(tmp_path / "dead")
    os.killpg(dead.pid, signal.SIGKILL)
    assert await dead.wait() == "signal SIGKILL"
    assert all(path.exists() for path in left)
    following = ChildProcess.spawn(launcher(tmp_path / "next"), os.environ)
    assert await asyncio.wait_for(following.first_line(), SECONDS_MAX)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in memory_of(tmp_path / "next"))
    assert len(folders(tmp_path)) == 1
    for child in (dead, following):
        await child.stop()
    assert folders(tmp_path) == []


@pytest.mark.parametrize("whom", ["the launcher alone", "all of it, as a hung one"])
async def test_the_agent_frees_what_an_engine_shared_whose_launcher_was_killed(tmp_path, whom):
    child = ChildProcess.spawn(launcher(tmp_path / "engine"), os.environ)
    assert await asyncio.wait_for(child.first_line(), SECONDS_MAX)
    left = memory_of(tmp_path / "engine")
    engine = EngineProcess(child)
    if whom == "the launcher alone":
        os.kill(child.pid, signal.SIGKILL)
        await engine.wait()
        assert all(path.exists() for path in left)
    else:
        engine.condemn("it says nothing")
    await engine.stop()
    assert not any(path.exists() for path in left)
    assert folders(tmp_path) == []


def test_what_a_living_launcher_noted_stays(tmp_path):
    folder = EngineFolder()
    with mapped("potluck-test-living") as memory:
        folder.note([os.getpid()])
        free_what_the_dead_left()
        assert memory.exists()
        assert folders(tmp_path) == [folder.path]
        folder.remove()
        assert not memory.exists()
        assert folders(tmp_path) == []


def test_what_was_there_before_the_engine_is_not_its_own(tmp_path):
    with mapped("potluck-test-before") as before:
        with noting(os.getpid()):
            pass
        free_what_the_dead_left()
        assert before.exists()
    assert folders(tmp_path) == []


@pytest.mark.parametrize("change", ["none", "another file of the name", "another start of the machine", "a cut line"])
def test_only_the_very_file_that_was_noted_is_freed(tmp_path, change):
    folder = EngineFolder()
    with mapped("potluck-test-noted") as memory:
        folder.note([os.getpid()])
        # As this process dies without having removed it.
        os.close(folder._record)
        record = folder.path / RECORD_NAME
        if change == "another file of the name":
            memory.rename(SHARED / "potluck-test-aside")
            memory.touch()
            (SHARED / "potluck-test-aside").unlink()
        elif change == "another start of the machine":
            record.write_text("some other\n" + record.read_text().partition("\n")[2])
        elif change == "a cut line":
            record.write_text(record.read_text()[:-4])
        free_what_the_dead_left()
        assert memory.exists() == (change != "none")
        assert folders(tmp_path) == []


def test_folders_of_others_and_without_a_record_are_left_alone(tmp_path):
    (tmp_path / f"{FOLDER_PREFIX}empty").mkdir(mode=0o700)
    open_to_all = tmp_path / f"{FOLDER_PREFIX}open"
    open_to_all.mkdir()
    open_to_all.chmod(0o755)
    (open_to_all / RECORD_NAME).touch()
    (tmp_path / f"{FOLDER_PREFIX}link").symlink_to(open_to_all)
    free_what_the_dead_left()
    assert len(folders(tmp_path)) == 3
    assert (open_to_all / RECORD_NAME).exists()
