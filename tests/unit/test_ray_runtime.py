"""What the driver makes of its actors' answers, and what an actor's log costs it. No Ray: that is for the integration tests."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from potluck_coordinator import actors as actors_module
from potluck_coordinator import ray_runtime as ray_runtime_module
from potluck_coordinator.ray_environment import check_host
from potluck_coordinator.ray_runtime import ABSENCE_SECONDS_MAX, DIRECTORY, GATEWAY, RayRuntime
from potluck_coordinator.settings import Settings
from potluck_protocol.errors import ErrorCode, PotluckError

FIRST, SECOND = f"{GATEWAY}0", f"{GATEWAY}1"


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class ActorDiedError(RayActorError):
    pass


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic_seconds(self) -> float:
        return self.now

    def unix_ms(self) -> int:
        return 0


class Actors:
    """A directory and two gateways, and the few words of Ray by which they are asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, Any] = {DIRECTORY: None, FIRST: None, SECOND: None}
        self.made: list[int] = []
        self.killed: list[str] = []
        self.clock = Clock()
        exceptions = SimpleNamespace(RayError=RayError, ActorDiedError=ActorDiedError)
        ray = SimpleNamespace(get=self._get, wait=lambda *_, **__: None, kill=self._kill, exceptions=exceptions)
        monkeypatch.setitem(sys.modules, "ray", ray)
        self.runtime = RayRuntime(Settings(data_dir=folder), folder, None)
        self.runtime._clock = self.clock
        self.runtime._actors = {name: SimpleNamespace(ready=SimpleNamespace(remote=lambda name=name: name)) for name in self.answers}
        self.runtime._make_gateway = self.made.append  # type: ignore[method-assign]
        self.runtime._answered_at = dict.fromkeys(self.answers, self.clock.now)

    def _kill(self, actor: Any, *, no_restart: bool) -> None:
        assert not no_restart
        self.killed.append(actor.ready.remote())

    def _get(self, name: str, timeout: float) -> Any:
        del timeout
        answer = self.answers[name]
        if isinstance(answer, RayError):
            raise answer
        return answer


@pytest.fixture
def actors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Actors:
    return Actors(tmp_path, monkeypatch)


@pytest.mark.parametrize("answer", [RayError(), PotluckError(ErrorCode.INTERNAL_ERROR, "the disk is full")], ids=["silence", "a failure"])
def test_an_actor_that_does_not_serve_is_absent_whatever_it_answers(actors: Actors, answer: Exception) -> None:
    actors.answers[FIRST] = actors.answers[SECOND] = answer
    actors.clock.now += ABSENCE_SECONDS_MAX
    actors.runtime.check()
    actors.clock.now += 0.1
    with pytest.raises(PotluckError, match="gateway-0 has been away") as gone:
        actors.runtime.check()
    assert gone.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
    assert ("the disk is full" in gone.value.message) == isinstance(answer, PotluckError)


def test_an_actor_that_came_back_has_all_its_time_again(actors: Actors) -> None:
    for answer in (RayError(), None) * 3:
        actors.answers[DIRECTORY] = answer
        actors.clock.now += ABSENCE_SECONDS_MAX - 1
        actors.runtime.check()


def test_one_gateway_that_is_away_ends_nothing_but_itself(actors: Actors) -> None:
    actors.answers[FIRST] = RayError()
    for killed_count in (0, 1, 1, 2):
        actors.clock.now += ABSENCE_SECONDS_MAX
        actors.runtime.check()
        assert actors.killed == [FIRST] * killed_count, "whoever was killed has all its time again"
    assert actors.made == []
    actors.answers[FIRST] = ActorDiedError()
    actors.runtime.check()
    assert actors.made == [0], "Ray will not start it again"
    actors.answers[DIRECTORY] = RayError()
    actors.clock.now += ABSENCE_SECONDS_MAX + 1
    with pytest.raises(PotluckError, match="directory has been away"):
        actors.runtime.check()


@pytest.mark.parametrize(
    ("host", "gateways", "machine_count", "is_refused"),
    [
        ("127.0.0.1", 1, 2, False),
        ("127.0.0.1", 2, 1, False),
        ("127.0.0.1", 2, 2, True),
        ("0.0.0.0", 2, 2, False),
        ("10.0.0.1", 2, 2, False),
    ],
)
def test_gateways_on_other_machines_do_not_listen_on_loopback(
    tmp_path: Path, host: str, gateways: int, machine_count: int, is_refused: bool
) -> None:
    settings = Settings(data_dir=tmp_path, host=host, gateways=gateways)
    if not is_refused:
        check_host(settings, machine_count)
        return
    with pytest.raises(PotluckError, match=r"--host 0\.0\.0\.0") as refused:
        check_host(settings, machine_count)
    assert refused.value.code is ErrorCode.INVALID_REQUEST


def test_what_ray_gave_up_is_not_waited_for(actors: Actors) -> None:
    actors.answers[DIRECTORY] = ActorDiedError()
    with pytest.raises(PotluckError, match="directory has been away"):
        actors.runtime.check()


class Stopping:
    """A gateway that drains, and stops as it is told to; and Ray, which starts another process in its place once it is killed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, drained: Any, stopped: Any) -> None:
        self.process_id = 1
        answers = {"drain": lambda: drained, "stop": lambda: stopped, "ready": lambda: None, "process_id": lambda: self.process_id}
        actor = SimpleNamespace(**{name: SimpleNamespace(remote=lambda *_, name=name: name) for name in answers})
        exceptions = SimpleNamespace(RayError=RayError, RayActorError=RayActorError, ActorDiedError=ActorDiedError)

        def get(asked: str, timeout: float = 0.0) -> Any:
            del timeout
            answer = answers[asked]()
            if isinstance(answer, RayActorError):
                self.process_id += 1
            if isinstance(answer, RayError):
                raise answer
            return answer

        ray = SimpleNamespace(get=get, wait=lambda asked, **_: (asked, []), kill=self._kill, exceptions=exceptions)
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setattr(ray_runtime_module, "RESTART_PAUSE_SECONDS", 0.0)
        monkeypatch.setattr(ray_runtime_module, "ABSENCE_SECONDS_MAX", 0.5)
        self.runtime = RayRuntime(Settings(data_dir=folder), folder, None)
        self.runtime._actors = {FIRST: actor}
        self.killed_count = 0

    def _kill(self, _actor: Any, *, no_restart: bool) -> None:
        assert not no_restart
        self.killed_count += 1
        self.process_id += 1


@pytest.mark.parametrize(
    ("drained", "stopped", "killed_count"),
    [(0, None, 1), (2, RayError("too long"), 1), (RayError("it failed at it"), None, 1), (ActorDiedError(), None, 0)],
    ids=["in good order", "its stop takes too long", "its draining fails", "it dies"],
)
def test_a_gateway_that_is_restarted_comes_back_however_its_stop_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drained: Any, stopped: Any, killed_count: int
) -> None:
    stopping = Stopping(tmp_path, monkeypatch, drained=drained, stopped=stopped)
    steps = [(step.state, step.answer_count) for step in stopping.runtime.restart_gateways(1.0)]
    assert steps == [("starting", drained if isinstance(drained, int) else 0), ("serving", 0)]
    assert stopping.killed_count == killed_count


ACTOR = """
import asyncio, os, sys, structlog
from potluck_coordinator.actors import _send_log_lines_to
from potluck_protocol.observe import configure_logging
_send_log_lines_to(sys.argv[1], asyncio.new_event_loop())
configure_logging(json=True)
for number in range(2000):
    structlog.get_logger().info("a_line", number=number, padding="x" * 200)
    print("so does", "this", file=sys.stderr)
os.write(1, b"it goes on")
"""


@pytest.mark.parametrize("reader", ["nobody empties the pipe", "the reader has gone"])
def test_a_log_that_nobody_takes_does_not_hold_up_an_actor(tmp_path: Path, reader: str) -> None:
    pipe = tmp_path / "log"
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDWR if reader.startswith("nobody") else os.O_RDONLY | os.O_NONBLOCK)
    actor = subprocess.Popen([sys.executable, "-c", ACTOR, str(pipe)], stdout=subprocess.PIPE)
    try:
        assert actor.stdout is not None
        if reader.startswith("nobody"):
            assert actor.stdout.read() == b"it goes on"
            lines = os.read(descriptor, 1 << 20).decode().splitlines()
            assert json.loads(lines[0])["event"] == "a_line"
            assert all(line == "so does this" or json.loads(line)["number"] >= 0 for line in lines), "lines are lost whole"
        else:
            while not select_readable(descriptor):
                assert actor.poll() is None
            os.close(descriptor)
            descriptor = -1
            assert actor.stdout.read() == b"it goes on"
        assert actor.wait(10) == 0
    finally:
        actor.kill()
        actor.wait(5)
        assert actor.stdout is not None
        actor.stdout.close()
        if descriptor >= 0:
            os.close(descriptor)


def select_readable(descriptor: int) -> bool:
    import select

    return bool(select.select([descriptor], [], [], 10)[0])


def test_without_a_reader_the_old_standard_error_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    before = sys.stderr
    loop = asyncio.new_event_loop()
    assert actors_module._send_log_lines_to(str(tmp_path / "log"), loop) is None
    loop.close()
    assert sys.stderr is before
