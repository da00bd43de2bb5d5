"""`potluck node` as a volunteer runs it: processes, a state folder, signals; a coordinator on real gRPC and the scripted engine."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from potluck_protocol.connection import Invite
from potluck_protocol.engine_codec import desired_state_message
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import DesiredState, TokenId
from tests.support.engines import children_of, pinned, wished
from tests.support.volunteer_box import SECRET, Box, ready_link, until_status, volunteer_box


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    async with volunteer_box(tmp_path) as box:
        yield box


async def another_try(folder: Path) -> None:
    """Returns once a file of the folder has been written, or tried to be: either makes and removes its draft."""
    before = folder.stat().st_mtime_ns
    async with asyncio.timeout(20):
        while folder.stat().st_mtime_ns == before:
            await asyncio.sleep(0.02)


async def test_joining_keeps_the_key_here_and_private_and_joining_again_changes_nothing(box: Box) -> None:
    joined = await box.node("join", "-", "--name", "attic", text=box.invite + "\n")
    assert joined.returncode == 0, joined.stderr
    assert "attic" in joined.stdout
    assert SECRET not in joined.stdout + joined.stderr
    request = box.coordinator.join_requests[0]
    assert (request.token_secret, request.display_name) == (SECRET, "attic")
    assert request.inventory.cpu_count > 0
    assert box.state_dir.stat().st_mode & 0o777 == 0o700
    for name in ("node.key", "node.crt", "node.json"):
        assert (box.state_dir / name).stat().st_mode & 0o777 == 0o600
    key, identity = (box.state_dir / "node.key").read_bytes(), (box.state_dir / "node.json").read_bytes()
    assert key not in request.SerializeToString()
    again = await box.node("join", box.invite)
    assert again.returncode == 1
    assert "already node" in again.stderr
    assert len(box.coordinator.join_requests) == 1
    assert ((box.state_dir / "node.key").read_bytes(), (box.state_dir / "node.json").read_bytes()) == (key, identity)


async def test_an_invite_of_another_pool_is_refused_before_its_secret_is_sent(box: Box) -> None:
    invite = Invite(box.url, "a" * 52, TokenId("token-id-123"), SECRET).encode()
    joined = await box.node("join", invite)
    assert joined.returncode == 4
    assert "another CA" in joined.stderr
    assert box.coordinator.join_requests == []
    assert not box.state_dir.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["join", "nonsense"], 4, "not a whole invite"),
        (["join", "--invite-file", "/nowhere/invite"], 1, "/nowhere/invite"),
        (["join", "x", "--invite-file", "y"], 2, "not both"),
        (["run"], 1, "potluck node join"),
        (["status"], 1, "potluck node join"),
        (["pause"], 1, "potluck node join"),
        (["leave"], 1, "potluck node join"),
        (["run", "--slot-count-max", "0"], 1, "slot_count_max"),
        (["run", "--log-format", "xml"], 1, "log_format"),
        (["sing"], 2, "sing"),
    ],
)
async def test_what_goes_wrong_is_named_with_its_fix_and_an_exit_code(box: Box, arguments: list[str], code: int, words: str) -> None:
    done = await box.node(*arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_coordinator_that_does_not_answer_is_exit_code_5(box: Box) -> None:
    invite = Invite("http://127.0.0.1:9", "a" * 52, TokenId("token-id-123"), SECRET).encode()
    joined = await box.node("join", invite)
    assert joined.returncode == 5
    assert "127.0.0.1:9" in joined.stderr


async def test_a_node_serves_rests_and_stops_on_ctrl_c_leaving_no_process(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    await box.node("join", box.invite, "--serve")
    monkeypatch.setenv("POTLUCK_NODE_KEEP_ENGINE_LINES", "true")
    async with box.agent() as process:
        monkeypatch.delenv("POTLUCK_NODE_KEEP_ENGINE_LINES")
        link = await ready_link(box, tokens=["one", " two"])
        second = await box.node("run")
        assert second.returncode == 1
        assert "Another agent" in second.stderr

        body = json.dumps({"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "hi"}]}).encode()
        await link.start("a1", body=body, replica_id="replica-1")
        end = await link.until_end("a1")
        assert end.reason == node_pb2.END_REASON_COMPLETED
        assert link.data("a1").endswith(b"data: [DONE]\n\n")

        facts = await until_status(box, lambda status: [engine["state"] for engine in status["engines"]] == ["ready"])
        assert (facts["running"], facts["status"]["pid"], facts["status"]["phase"]) == (True, process.pid, "serving")
        assert facts["status"]["engine_lines_are_kept"], "the agent's setting, which this shell has not any more"
        assert "tiny: ready, 2 slots" in (await box.node("status")).stdout

        assert (await box.node("pause")).returncode == 0
        await link.until(lambda: link.frames[-1].heartbeat.state == node_pb2.NODE_STATE_PAUSED, 5)
        await until_status(box, lambda status: status["state"] == "paused" and not status["engines"])
        await link.start("a2", body=body, replica_id="replica-1")
        assert (await link.until_end("a2")).reason == node_pb2.END_REASON_REFUSED
        assert (await box.node("resume")).returncode == 0
        await until_status(box, lambda status: any(engine["state"] == "ready" for engine in status["engines"]))

        engines = children_of(process.pid)
        assert engines
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(10):
            assert await process.wait() == 0
        assert [f.goodbye.reason for f in link.frames if f.HasField("goodbye")] == [node_pb2.GOODBYE_REASON_STOPPING]
        assert not any(Path(f"/proc/{pid}").exists() for pid in engines)
    assert "tiny: ready" in box.output()
    assert not (box.state_dir / "status.json").exists()
    assert json.loads((await box.node("status", "--json")).stdout)["running"] is False


async def test_an_answer_under_way_is_finished_before_the_node_stops(box: Box) -> None:
    await box.node("join", box.invite, "--serve")
    async with box.agent() as process:
        link = await ready_link(box, token_count=40, inter_token_ms=25)
        body = b'{"model":"tiny","stream":true,"messages":[]}'
        await link.start("a1", body=body, replica_id="replica-1")
        await link.until(lambda: link.data("a1"))
        process.send_signal(signal.SIGTERM)
        await link.until(lambda: any(f.heartbeat.state == node_pb2.NODE_STATE_DRAINING for f in link.frames))
        await link.start("a2", body=body, replica_id="replica-1")
        assert (await link.until_end("a2")).reason == node_pb2.END_REASON_REFUSED
        assert (await link.until_end("a1")).reason == node_pb2.END_REASON_COMPLETED
        assert link.data("a1").endswith(b"data: [DONE]\n\n")
        async with asyncio.timeout(10):
            assert await process.wait() == 0


async def test_a_failed_engine_shows_its_last_words(box: Box) -> None:
    await box.node("join", box.invite, "--serve")
    async with box.agent():
        link = await box.linked()
        broken = box.folder / "script.json"
        broken.write_text('{"tokens": 7}')
        await link.send(desired=desired_state_message(DesiredState(1, (wished(pinned(broken)),))))
        # Its last failure is told while the next try is made, too.
        await until_status(box, lambda status: any(engine["failure"] and engine["state"] == "backing_off" for engine in status["engines"]))
        async with asyncio.timeout(20):
            # Its next try may have begun by the time that the command looks.
            while "failed, trying again" not in (shown := (await box.node("status")).stdout):
                pass
        assert "tokens" in shown


async def test_a_status_that_cannot_be_written_costs_the_owners_view_and_not_the_node(box: Box) -> None:
    await box.node("join", box.invite, "--serve")
    # As on a full disk, every write of the file fails until the folder in its place is gone.
    obstacle = box.state_dir / "status.json"
    obstacle.mkdir()
    async with box.agent() as process:
        link = await ready_link(box, tokens=["one"])
        async with asyncio.timeout(20):
            while "status_not_written" not in box.output():
                await asyncio.sleep(0.05)
        for _ in range(2):
            await another_try(box.state_dir)
        assert box.output().count("status_not_written") == 1
        await link.start("a1", body=b'{"model":"tiny","stream":true,"messages":[]}', replica_id="replica-1")
        assert (await link.until_end("a1")).reason == node_pb2.END_REASON_COMPLETED
        obstacle.rmdir()
        facts = await until_status(box, lambda status: status["phase"] == "serving")
        assert facts["status"]["pid"] == process.pid
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_leaving_while_the_agent_stops_tells_the_coordinator_too(box: Box) -> None:
    await box.node("join", box.invite, "--serve")
    async with box.agent("--drain-seconds", "60") as process:
        link = await ready_link(box, token_count=2000, inter_token_ms=25)
        await link.start("a1", body=b'{"model":"tiny","stream":true,"messages":[]}', replica_id="replica-1")
        await link.until(lambda: link.data("a1"))
        process.send_signal(signal.SIGINT)
        await link.until(lambda: any(frame.heartbeat.state == node_pb2.NODE_STATE_DRAINING for frame in link.frames))
        left = await box.node("leave")
        assert left.returncode == 0, left.stderr
        goodbyes = [frame.goodbye.reason for frame in link.frames if frame.HasField("goodbye")]
        assert goodbyes == [node_pb2.GOODBYE_REASON_LEAVING]
        assert not box.state_dir.exists()
        assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_leaving_through_the_running_agent_tells_the_coordinator_and_removes_the_key(box: Box) -> None:
    await box.node("join", box.invite, "--serve")
    async with box.agent() as process:
        link = await box.linked()
        await link.until(lambda: link.frames)
        left = await box.node("leave")
        assert left.returncode == 0, left.stderr
        assert [f.goodbye.reason for f in link.frames if f.HasField("goodbye")] == [node_pb2.GOODBYE_REASON_LEAVING]
        assert not box.state_dir.exists()
        async with asyncio.timeout(5):
            assert await process.wait() == 0


async def test_leaving_without_an_agent_dials_by_itself(box: Box) -> None:
    joined = await box.node("join", box.invite, "--name", "attic", "--json")
    made = json.loads(joined.stdout)
    assert (made["display_name"], "Next: potluck node run" in joined.stderr) == ("attic", True)
    leaving = asyncio.create_task(box.node("leave", "--json"))
    link = await box.linked()
    left = await leaving
    assert left.returncode == 0, left.stderr
    assert json.loads(left.stdout) == {"node_id": made["node_id"]}
    assert [f.goodbye.reason for f in link.frames if f.HasField("goodbye")] == [node_pb2.GOODBYE_REASON_LEAVING]
    assert not box.state_dir.exists()


async def test_a_revoked_node_may_still_leave(box: Box) -> None:
    await box.node("join", box.invite, "--serve")
    box.coordinator.refuse_links = box.coordinator.refuse_renewals = True
    async with box.agent() as process:
        async with asyncio.timeout(20):
            assert await process.wait() == 4
    assert "refuses this node" in box.output()
    assert (await box.node("leave")).returncode == 0
    assert not box.state_dir.exists()


async def test_nothing_of_a_node_listens_but_its_engine_on_loopback(box: Box) -> None:
    import psutil

    await box.node("join", box.invite, "--serve")
    async with box.agent() as process:
        await ready_link(box)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        listening = {c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        agent_listens = [c for c in family[0].net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert agent_listens == []
        assert listening == {"127.0.0.1"}


async def test_a_coordinator_that_moved_is_found_by_its_new_url(box: Box) -> None:
    await box.node("join", box.invite, "--serve")
    identity = json.loads((box.state_dir / "node.json").read_text())
    identity["url"], identity["connection"]["link_port"] = "http://127.0.0.1:9", 9
    (box.state_dir / "node.json").write_text(json.dumps(identity))
    async with box.agent("--url", box.url):
        await box.linked()
    assert json.loads((box.state_dir / "node.json").read_text())["url"].startswith(box.url)


async def test_a_prompt_appears_in_no_log_and_no_file(box: Box) -> None:
    canary = "canary-7f3a9c"
    await box.node("join", box.invite, "--serve")
    async with box.agent("--log-level", "debug") as process:
        link = await ready_link(box, tokens=["answer-canary-7f3a9c"])
        body = json.dumps({"model": "tiny", "stream": True, "messages": [{"role": "user", "content": canary}]}).encode()
        await link.start("a1", body=body, replica_id="replica-1")
        await link.until_end("a1")
        await link.start("a2", body=body[:-4], replica_id="replica-1")
        await link.until_end("a2")
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.wait(), 10)
    script = box.folder / "script.json"
    for path in box.folder.rglob("*"):
        if path.is_file() and path.name != script.name:
            assert canary.encode() not in path.read_bytes(), path
