"""The owner's word over a running node: what pause, finish, resume and the owner's limits do, over a real link and to real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path

import psutil
import pytest

from potluck_node.probe import terminals
from potluck_protocol.engine_codec import desired_state_message
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import DesiredState
from tests.support.engines import children_of, pinned, script_file, wished
from tests.support.link_coordinator import ServedLink
from tests.support.volunteer_box import COMMAND, Box, ready_link, until_status, volunteer_box

BODY = b'{"model":"tiny","stream":true,"messages":[]}'
ADMISSION_SECONDS_MAX = 2.0
LONG = {"token_count": 20_000, "inter_token_ms": 200}
"""As long as the context of 256 tokens lets it be: most of a minute."""
COMMAND_SECONDS_MAX = 40.0
"""For a command to start on a busy machine, and what it says to show."""


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    async with volunteer_box(tmp_path) as box:
        joined = await box.node("join", box.invite, "--serve")
        assert joined.returncode == 0, joined.stderr
        yield box


async def begun(link: ServedLink, attempt_id: str) -> None:
    """An answer is on its way."""
    await link.start(attempt_id, body=BODY, replica_id="replica-1")
    await link.until(lambda: len(link.chunks(attempt_id)) > 3)


async def until_not_admitting(box: Box, link: ServedLink) -> float:
    """Seconds from the owner's word until a new attempt is refused; they are asked for again and again."""
    before = said_at_seconds(box)
    for number in range(10_000):
        await link.start(f"probe-{number}", body=BODY, replica_id="replica-1")
        await link.until(lambda name=f"probe-{number}": link.end(name) or link.chunks(name))
        end = link.end(f"probe-{number}")
        if end is not None and end.reason == node_pb2.END_REASON_REFUSED and "slots" not in end.detail:
            return time.time() - said_at_seconds(box)
        assert said_at_seconds(box) == before or time.time() - said_at_seconds(box) < 30
        await link.send(cancels=[node_pb2.CancelAttempt(attempt_id=f"probe-{number}")])
        await asyncio.sleep(0.02)
    raise AssertionError("every attempt was taken")


def said_at_seconds(box: Box) -> float:
    return float(json.loads((box.state_dir / "control.json").read_text())["said_at_unix_ms"]) / 1000


def check_whole(link: ServedLink, attempt_id: str) -> bytes:
    """What came is without a gap, and the end stands behind all of it; the bytes."""
    end, chunks = link.end(attempt_id), link.chunks(attempt_id)
    assert end is not None
    assert [chunk.sequence for chunk in chunks] == list(range(end.sequence))
    data = link.data(attempt_id)
    assert data.endswith(b"\n\n"), "the answer is cut within an event"
    return data


def states(link: ServedLink) -> list[int]:
    return [frame.heartbeat.state for frame in link.frames if frame.HasField("heartbeat")]


async def test_pause_hands_answers_back_behind_what_they_said_and_returns_when_memory_is_free(box: Box) -> None:
    async with box.agent() as process:
        link = await ready_link(box, **LONG)
        await begun(link, "a1")
        engines = [psutil.Process(pid) for pid in children_of(process.pid)]
        assert engines
        pausing = asyncio.create_task(box.node("pause", "--json"))
        assert await until_not_admitting(box, link) < ADMISSION_SECONDS_MAX
        end = await link.until_end("a1")
        assert (end.reason, end.detail, end.blamed) == (node_pb2.END_REASON_HANDED_BACK, "the node's owner wants the machine back", False)
        assert b"[DONE]" not in check_whole(link, "a1")

        paused = await pausing
        assert paused.returncode == 0, paused.stderr
        told = json.loads(paused.stdout)
        assert (told["running"], told["memory_free"], told["until_unix_ms"]) == (True, True, None)
        assert not any(engine.is_running() for engine in engines), "it was said that memory is free"
        await link.until(lambda: states(link)[-1] == node_pb2.NODE_STATE_PAUSED, 10)
        seen = [state for state, before in zip(states(link), [0, *states(link)], strict=False) if state != before]
        assert seen == [node_pb2.NODE_STATE_SERVING, node_pb2.NODE_STATE_DRAINING, node_pb2.NODE_STATE_PAUSED]
        beats = [frame.heartbeat for frame in link.frames if frame.HasField("heartbeat")]
        causes = {beat.state: list(beat.rest_causes) for beat in beats}
        said = [node_pb2.REST_CAUSE_OWNER]
        assert [causes[state] for state in seen] == [[], said, said]
        shown = (await box.node("status")).stdout
        assert "rest         paused, memory free" in shown
        assert "it was told to pause, until `potluck node resume`" in shown

        again = await box.node("pause", "--json")
        assert (again.returncode, json.loads(again.stdout)["memory_free"]) == (0, True)
        assert "serves again" in (await box.node("resume")).stdout
        await until_status(box, lambda status: [engine["state"] for engine in status["engines"]] == ["ready"])
        await begun(link, "a2")
        assert "rest " not in (await box.node("status")).stdout


async def test_finish_lets_answers_end_and_takes_no_more(box: Box) -> None:
    async with box.agent("--drain-seconds", "60") as process:
        link = await ready_link(box, token_count=200, inter_token_ms=60)
        await begun(link, "a1")
        finishing = asyncio.create_task(box.node("finish"))
        await link.until(lambda: node_pb2.NODE_STATE_DRAINING in states(link), COMMAND_SECONDS_MAX)
        await link.start("a2", body=BODY, replica_id="replica-1")
        assert (await link.until_end("a2")).reason == node_pb2.END_REASON_REFUSED
        assert link.end("a1") is None
        assert children_of(process.pid)
        end = await link.until(lambda: link.end("a1"), 60)
        assert end.reason == node_pb2.END_REASON_COMPLETED
        assert check_whole(link, "a1").endswith(b"data: [DONE]\n\n")
        finished = await finishing
        assert finished.returncode == 0, finished.stderr
        assert "Paused, memory free." in finished.stdout
        assert "finishing 1 answer under way" in finished.stderr
        assert not children_of(process.pid)


@pytest.mark.parametrize("ending", ["finish", "stop"])
async def test_what_does_not_end_within_the_owners_limit_is_handed_back(box: Box, ending: str) -> None:
    async with box.agent("--drain-seconds", "1") as process:
        link = await ready_link(box, **LONG)
        await begun(link, "a1")
        if ending == "finish":
            assert (await box.node("finish")).returncode == 0
        else:
            process.send_signal(signal.SIGINT)
        assert (await link.until_end("a1")).reason == node_pb2.END_REASON_HANDED_BACK
        check_whole(link, "a1")


async def test_a_pause_during_finish_does_not_wait_for_the_answers(box: Box) -> None:
    async with box.agent("--drain-seconds", "60") as process:
        link = await ready_link(box, **LONG)
        await begun(link, "a1")
        finishing = asyncio.create_task(box.node("finish"))
        await link.until(lambda: node_pb2.NODE_STATE_DRAINING in states(link), COMMAND_SECONDS_MAX)
        assert (await box.node("pause")).returncode == 0
        assert (await link.until_end("a1")).reason == node_pb2.END_REASON_HANDED_BACK
        assert (await finishing).returncode == 0
        assert not children_of(process.pid)


async def test_resume_in_the_middle_of_finish_leaves_everything_as_it_was(box: Box) -> None:
    async with box.agent("--drain-seconds", "60") as process:
        link = await ready_link(box, token_count=200, inter_token_ms=100)
        await begun(link, "a1")
        engines = children_of(process.pid)
        finishing = await asyncio.create_subprocess_exec(*COMMAND, "finish", env=box.environment, stderr=subprocess.PIPE)
        await link.until(lambda: node_pb2.NODE_STATE_DRAINING in states(link), COMMAND_SECONDS_MAX)
        assert (await box.node("resume")).returncode == 0
        await link.until(lambda: states(link)[-1] == node_pb2.NODE_STATE_SERVING, 10)
        end = await link.until(lambda: link.end("a1"), 60)
        assert end.reason == node_pb2.END_REASON_COMPLETED
        assert children_of(process.pid) == engines
        _, words = await asyncio.wait_for(finishing.communicate(), COMMAND_SECONDS_MAX)
        assert (finishing.returncode, b"taken back" in words) == (1, True), "the other command waits for what does not come any more"
        facts = await until_status(box, lambda status: status["state"] == "serving")
        assert facts["word"]["posture"] == "serve"


async def test_ctrl_c_stops_the_waiting_and_the_pause_stands(box: Box) -> None:
    async with box.agent("--drain-seconds", "60"):
        link = await ready_link(box, **LONG)
        await begun(link, "a1")
        command = await asyncio.create_subprocess_exec(*COMMAND, "finish", env=box.environment, stderr=subprocess.PIPE)
        await link.until(lambda: node_pb2.NODE_STATE_DRAINING in states(link), COMMAND_SECONDS_MAX)
        command.send_signal(signal.SIGINT)
        _, words = await asyncio.wait_for(command.communicate(), COMMAND_SECONDS_MAX)
        assert command.returncode == 130
        assert b"What you said stands" in words
        assert b"Traceback" not in words
        facts = await until_status(box, lambda status: status["rest"]["stage"] == "finishing")
        assert (facts["word"]["posture"], facts["status"]["attempt_count"]) == ("finish", 1)


async def test_a_pause_with_an_end_outlives_the_agent_and_ends_by_itself(box: Box) -> None:
    async with box.agent() as process:
        link = await ready_link(box, tokens=["one"])
        assert (await box.node("pause", "--for", "15s")).returncode == 0
        paused_until_ms = json.loads((box.state_dir / "control.json").read_text())["word"]["until_unix_ms"]
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.wait(), 10)
    async with box.agent() as process:
        link = await box.linked()
        assert (link.hello.state, list(link.hello.rest_causes)) == (node_pb2.NODE_STATE_PAUSED, [node_pb2.REST_CAUSE_OWNER])
        await link.send(desired=desired_state_message(DesiredState(1, (wished(pinned(box.folder / "script.json")),))))
        async with asyncio.timeout(30):
            while node_pb2.NODE_STATE_SERVING not in states(link):
                assert time.time() * 1000 >= paused_until_ms or not children_of(process.pid)
                await asyncio.sleep(0.05)
        assert -100 < time.time() * 1000 - paused_until_ms < ADMISSION_SECONDS_MAX * 1000
        await until_status(box, lambda status: [engine["state"] for engine in status["engines"]] == ["ready"])


async def test_the_first_run_of_a_volunteer_is_paused_and_says_how_it_begins(tmp_path: Path) -> None:
    async with volunteer_box(tmp_path) as box:
        joined = await box.node("join", box.invite)
        assert "potluck node resume" in joined.stdout
        async with box.agent() as process:
            link = await box.linked()
            assert link.hello.state == node_pb2.NODE_STATE_PAUSED
            await link.send(desired=desired_state_message(DesiredState(1, (wished(pinned(script_file(tmp_path, tokens=["one"]))),))))
            facts = await until_status(box, lambda status: status["phase"] == "serving")
            assert [reason["cause"] for reason in facts["status"]["rest"]["rest"]["reasons"]] == ["first_run"]
            assert not facts["status"]["engines"]
            await asyncio.sleep(1.5)
            assert not children_of(process.pid)
            assert "it has not served yet, and begins with `potluck node resume`" in box.output()
            assert (await box.node("resume")).returncode == 0
            await until_status(box, lambda status: [engine["state"] for engine in status["engines"]] == ["ready"])
            process.send_signal(signal.SIGINT)
            await asyncio.wait_for(process.wait(), 10)
        async with box.agent():
            assert (await box.linked()).hello.state == node_pb2.NODE_STATE_SERVING, "it has served before"


async def test_outside_its_hours_a_node_rests_and_says_until_when(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    # A window that begins in an hour or two, in the zone of the agent.
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    try:
        opens = (datetime.now().astimezone() + timedelta(hours=2)).replace(minute=0, second=0, microsecond=0)
        closes = opens + timedelta(hours=1)
        monkeypatch.setenv("POTLUCK_NODE_HOURS", f"{opens:%H:%M}-{closes:%H:%M}")
        async with box.agent():
            link = await box.linked()
            assert link.hello.state == node_pb2.NODE_STATE_PAUSED
            facts = await until_status(box, lambda status: status["rest"]["rest"]["reasons"])
            (reason,) = facts["status"]["rest"]["rest"]["reasons"]
            assert (reason["cause"], reason["until_unix_ms"]) == ("hours", round(opens.timestamp() * 1000))
            resumed = await box.node("resume")
            assert "rests all the same" in resumed.stdout
            assert f"is outside its hours, until {opens:%a %d %b %H:%M}" in resumed.stdout
    finally:
        monkeypatch.undo()
        time.tzset()


async def test_an_agent_that_hangs_or_is_gone_does_not_keep_its_owner_waiting(box: Box) -> None:
    async with box.agent() as process:
        await ready_link(box, tokens=["one"])
        engines = [psutil.Process(pid) for pid in children_of(process.pid)]
        await until_status(box, lambda status: status["phase"] == "serving")
        process.send_signal(signal.SIGSTOP)
        paused = await box.node("pause")
        assert paused.returncode == 1
        assert f"process {process.pid}" in paused.stderr
        assert "does not respond" in paused.stderr
        process.kill()
        await process.wait()
        assert "holds no memory" in (await box.node("pause")).stdout
        psutil.wait_procs(engines, 10)
        assert not any(engine.is_running() for engine in engines)


async def test_answers_leave_no_faster_than_the_owner_allows_and_heartbeats_do_not_wait(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 40_000
    monkeypatch.setenv("POTLUCK_NODE_UPLOAD_BYTES_PER_SECOND_MAX", str(limit))
    async with box.agent():
        link = await ready_link(box, tokens=["x" * 4000], token_count=2000)
        began_at = time.monotonic()
        for name in ("a1", "a2"):
            await link.start(name, body=BODY, replica_id="replica-1", window_bytes=1 << 20)
        await link.until(lambda: len(link.data("a1")) + len(link.data("a2")) > 4 * limit, 30)
        seconds = time.monotonic() - began_at
        sent_bytes = len(link.data("a1")) + len(link.data("a2"))
        largest = max(len(chunk.data) for frame in link.frames for chunk in frame.chunks)
        assert sent_bytes <= limit * (seconds + 0.25) + largest + limit * 0.2, f"{sent_bytes} bytes in {seconds:.2f} s"
        assert sent_bytes >= limit * seconds * 0.7, f"{sent_bytes} bytes in {seconds:.2f} s: it may leave faster"
        before = len(states(link))
        await asyncio.sleep(2)
        assert len(states(link)) - before >= 6, "the link's beat is 200 ms"


async def test_while_its_owner_uses_the_machine_a_node_rests(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `loginctl` of the test's own stands where the agent finds it first; all else is the machine's."""
    in_use_seconds = terminals.idle_seconds(time.time())
    if in_use_seconds is not None and in_use_seconds < 120:
        pytest.skip("somebody types into a terminal of this machine")
    hint, program = box.folder / "hint", box.folder / "bin" / "loginctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncase "$*" in *list-sessions*) echo " 1 1000 ana";; *) cat "{hint}";; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("POTLUCK_NODE_IDLE_MINUTES", "1")
    monkeypatch.delenv("DISPLAY", raising=False)
    idle = f"Class=user\nIdleHint=yes\nIdleSinceHint={round((time.time() - 300) * 1e6)}\nState=active\nType=wayland\n"
    hint.write_text(idle)
    async with box.agent() as process:
        link = await ready_link(box, **LONG)
        await begun(link, "a1")
        engines = [psutil.Process(pid) for pid in children_of(process.pid)]
        hint.write_text(idle.replace("yes", "no"))
        came_at = time.monotonic()
        end = await link.until(lambda: link.end("a1"), 10)
        assert end.reason == node_pb2.END_REASON_HANDED_BACK
        check_whole(link, "a1")
        await link.until(lambda: states(link)[-1] == node_pb2.NODE_STATE_PAUSED, 10)
        assert time.monotonic() - came_at < 10
        assert not any(engine.is_running() for engine in engines)
        facts = await until_status(box, lambda status: status["rest"]["stage"] == "free")
        (reason,) = facts["status"]["rest"]["rest"]["reasons"]
        assert (reason["cause"], "by logind" in reason["words"]) == ("in_use", True)
        hint.write_text(idle)
        await until_status(box, lambda status: [engine["state"] for engine in status["engines"]] == ["ready"])
