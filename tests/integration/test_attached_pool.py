"""A whole pool that serves from an engine its owner started by hand, and leaves it running."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from potluck_protocol.values import EngineState
from tests.support.coordinator_process import CoordinatorProcess, wait_until
from tests.support.hand_started import NAME, HandStarted, hand_started
from tests.support.pool_processes import LLAMACPP_MODEL, ChatStream, NodeProcess, Pool, audit, new_invite
from tests.support.tiny_gguf import write_tiny_gguf

MESSAGES = [{"role": "user", "content": "hello"}]
GREEDY = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "cache_prompt": False}


def attached_catalogue(folder: Path) -> Path:
    path = folder / "catalogue.toml"
    path.write_text(f"""
[[model]]
model_id = "{LLAMACPP_MODEL}"
source = "attach:{NAME}"
engine_kind = "attach"
context_length_tokens = 1024
slot_count = 2
prompt_price_micro_credits = 1
completion_price_micro_credits = 4
licence = "Apache-2.0"
endpoints = ["/v1/chat/completions", "/v1/completions"]
created_at_unix_seconds = 1
""")
    return path


def chat(pool: Pool) -> str:
    with pool.client() as client:
        answer = client.chat(MESSAGES, model=LLAMACPP_MODEL, max_tokens=12, temperature=0, ignore_eos=True, cache_prompt=False)
    return answer.text


def own_chat(hand: HandStarted) -> str:
    return hand.ask("/v1/chat/completions", GREEDY)["choices"][0]["message"]["content"]


def typed(node: NodeProcess, command: str) -> subprocess.CompletedProcess[str]:
    """What the node's owner types."""
    environment = {**os.environ, "POTLUCK_NODE_STATE_DIR": str(node.folder / "state")}
    line = [sys.executable, "-m", "potluck", "node", command]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.timeout(240)
def test_a_pool_serves_from_an_engine_started_by_hand_and_leaving_leaves_it_running(tmp_path, monkeypatch):
    with hand_started(write_tiny_gguf(tmp_path / "tiny.gguf")) as hand:
        monkeypatch.setenv("POTLUCK_NODE_ATTACH_URLS", hand.url)
        flags = ("--catalogue", str(attached_catalogue(tmp_path)))
        with CoordinatorProcess(tmp_path / "coordinator", *flags) as coordinator:
            coordinator.wait_ready()
            pool = Pool(tmp_path, coordinator, [])
            with NodeProcess(tmp_path / "with-engine", new_invite(pool)) as node:
                pool.nodes.append(node)
                pool.wait_connected(LLAMACPP_MODEL)
                expected = own_chat(hand)
                assert chat(pool) == expected, "the same greedy text through the whole pool"
                stream = ChatStream(pool.url, pool.api_key, {**GREEDY, "model": LLAMACPP_MODEL})
                stream.read_to_end()
                assert (stream.done, stream.token_count > 0) == (True, True)
                assert audit(pool) == ()

                status = typed(node, "status")
                place = hand.url.removeprefix("http://")
                assert [line for line in status.stdout.splitlines() if line.startswith("attached") and line.endswith(f": {NAME}")], status
                assert f"attached     {place}: llama.cpp" in status.stdout
                left = typed(node, "leave")
                assert left.returncode == 0, left.stdout + left.stderr
                node.process.wait(20)
                assert hand.process.poll() is None
                assert own_chat(hand) == expected, "it still answers its owner"


@pytest.mark.timeout(240)
def test_only_the_node_whose_owner_runs_the_engine_serves_the_model_and_one_that_starts_later_is_found(tmp_path, monkeypatch):
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    with hand_started(model) as hand:
        port = hand.port
    monkeypatch.setenv("POTLUCK_NODE_ATTACH_URLS", f"http://127.0.0.1:{port}")
    flags = ("--catalogue", str(attached_catalogue(tmp_path)))
    with CoordinatorProcess(tmp_path / "coordinator", *flags) as coordinator:
        coordinator.wait_ready()
        pool = Pool(tmp_path, coordinator, [])
        with NodeProcess(tmp_path / "with-engine", new_invite(pool)) as node:
            monkeypatch.delenv("POTLUCK_NODE_ATTACH_URLS")
            with NodeProcess(tmp_path / "without", new_invite(pool)) as other, pool.client() as client:
                wait_until(lambda: sum(each.connection == "connected" for each in client.nodes()) == 2, 60, "both are linked")
                with hand_started(model, port=port):
                    wait_until(lambda: pool.connected_count(LLAMACPP_MODEL) == 1, 90, f"it is found\n{node.log()}")
                    serving = [each.node_id for each in client.nodes() if any(e.state is EngineState.READY for e in each.engines)]
                    assert serving == [node.node_id]
                    assert other.node_id not in serving
                    assert chat(pool)
