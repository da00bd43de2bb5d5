"""Children of `potluck up` end: when asked, when they will not, and when their parent is killed."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from potluck.commands import local_pool
from potluck.commands.children import Child, child_environment
from potluck.commands.local_pool import LocalPool, LocalPoolPlan
from potluck.commands.progress import LiveLine
from potluck.errors import AlreadyExistsError, InternalError
from potluck_protocol.interruption import ended_by_signals

DEAF = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
TIED = "from potluck.tether import tie_to_parent; tie_to_parent(); import time; print('tied', flush=True); time.sleep(60)"


def until(condition, seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_child_that_will_not_stop_is_killed_with_its_group(tmp_path: Path):
    script = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True); {DEAF}"
    )
    child = Child("deaf one", [sys.executable, "-c", script], os.environ, tmp_path / "log")
    assert until(lambda: "deaf" in child.log_tail())
    grandchild_pid = int(child.log_tail().splitlines()[0])
    child.stop(0.2)
    assert not is_running(child.pid)
    assert until(lambda: not is_running(grandchild_pid))


def test_a_child_that_ends_by_itself_is_reported_with_its_last_words(tmp_path: Path):
    child = Child("short one", [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], os.environ, tmp_path / "log")
    assert until(lambda: not is_running(child.pid))
    with pytest.raises(InternalError, match=r"(?s)short one ended by itself \(exit 3\).*the reason"):
        child.check()
    child.stop(1.0)


@pytest.mark.parametrize("ending", ["raise SystemExit(1)", "import time; time.sleep(60)"], ids=["by itself", "when asked"])
def test_what_an_ended_child_left_behind_ends_with_it(tmp_path: Path, ending: str):
    script = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True); {ending}"
    )
    child = Child("careless one", [sys.executable, "-c", script], os.environ, tmp_path / "log")
    assert until(lambda: child.log_tail().endswith("\n") or child.log_tail().isdigit())
    grandchild_pid = int(child.log_tail())
    if "SystemExit" in ending:
        assert until(lambda: not is_running(child.pid))
    child.stop(10)
    assert until(lambda: not is_running(grandchild_pid))


def test_the_output_of_the_run_before_is_kept_and_no_older_one(tmp_path: Path):
    log = tmp_path / "log"
    for number in range(3):
        child = Child("talker", [sys.executable, "-c", f"print('run {number}')"], os.environ, log)
        assert until(lambda: not is_running(child.pid))  # noqa: B023 - called at once
        child.stop(1.0)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"log": "run 2\n", "log.1": "run 1\n"}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's word is asked for on Linux only")
def test_a_killed_parent_takes_its_child_along(tmp_path: Path):
    parent_script = f"""
import os, subprocess, sys, time
from potluck.commands.children import child_environment
child = subprocess.Popen([sys.executable, "-c", {TIED!r}], env=child_environment(os.environ), start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""
    log = tmp_path / "log"
    with log.open("wb") as output, subprocess.Popen([sys.executable, "-c", parent_script], stdout=output) as parent:
        try:
            assert until(lambda: "tied" in log.read_text())
            child_pid = int(log.read_text().splitlines()[0])
            assert is_running(child_pid)
        finally:
            parent.send_signal(signal.SIGKILL)
    assert until(lambda: not is_running(child_pid))


def test_a_second_pool_on_a_folder_is_refused_before_it_touches_the_firsts_logs(tmp_path: Path):
    plan = LocalPoolPlan(tmp_path, 0, 0, 0, None)
    log = tmp_path / "coordinator.log"
    log.write_text("the first one's")
    with (tmp_path / "lock").open("a") as lock, LiveLine() as line, LocalPool(plan, line) as second:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(AlreadyExistsError, match=r"`potluck up` already runs(?!.*--data-dir)"):
            second.start()
    assert log.read_text() == "the first one's"


def test_what_a_killed_coordinator_announced_is_not_taken_for_the_next_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a container the next one may well have the same process id."""
    announced = tmp_path / "coordinator" / "endpoints.json"
    announced.parent.mkdir()
    announced.write_text('{"pid": 1}')
    code = f"import pathlib, sys; sys.exit(4 if pathlib.Path({str(announced)!r}).exists() else 3)"
    monkeypatch.setattr(local_pool, "potluck_command", lambda *_: [sys.executable, "-c", code])
    plan = LocalPoolPlan(tmp_path, 0, 0, 0, None)
    told = pytest.raises(InternalError, match=r"coordinator ended by itself \(exit 3\)")
    with LiveLine() as line, LocalPool(plan, line) as pool, told:
        pool.start()


def test_signals_end_a_pool_but_not_one_that_nohup_started():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(KeyboardInterrupt), ended_by_signals():  # noqa: PT012 - the signal may come a moment later
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(5)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_child_whose_parent_is_already_gone_does_not_start():
    environment = child_environment(os.environ) | {"POTLUCK_PARENT_PID": "1"}
    assert subprocess.run([sys.executable, "-c", TIED], env=environment, timeout=30, check=False).returncode == 1
