"""A prompt and its answer leave no trace: not in a log, not in the database, not in a temporary file, whatever goes wrong on the way."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from potluck import PoolError
from tests.chaos.node_loss import kill
from tests.support.pool_processes import LLAMACPP_MODEL, MODEL, running_pool

PROMPT_CANARY = "canary-in-the-prompt-5309"
ANSWER_CANARY = "canary-in-the-answer-8675"


@pytest.fixture
def own_temporary_folder(monkeypatch):
    """Everything that the pool's processes call temporary lies here. Short, because Ray keeps sockets in it."""
    folder = Path(tempfile.mkdtemp(prefix="plk"))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def ask(pool, path, body):
    """A request that may fail in any way."""
    request = urllib.request.Request(
        f"{pool.url}{path}",
        data=body if isinstance(body, bytes) else json.dumps(body).encode(),
        headers={"authorization": f"Bearer {pool.api_key}", "content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def chat(model, **fields):
    return {"model": model, "messages": [{"role": "user", "content": f"Say something about {PROMPT_CANARY}."}], "max_tokens": 16, **fields}


def scripted(**fields):
    return chat(MODEL, scripted={"tokens": [ANSWER_CANARY, " "], "token_count": 8, **fields})


def ask_in_every_way(pool):
    """Complete answers, refusals, broken answers, over both edges and both engines."""
    status, answer = ask(pool, "/v1/chat/completions", scripted())
    assert (status, ANSWER_CANARY.encode() in answer) == (200, True), "the canary is really there"
    for model in (MODEL, LLAMACPP_MODEL):
        assert ask(pool, "/v1/chat/completions", chat(model))[0] == 200
        assert ask(pool, "/v1/chat/completions", chat(model, stream=True))[0] == 200
        assert ask(pool, "/v1/completions", {"model": model, "prompt": PROMPT_CANARY, "max_tokens": 4})[0] == 200
    too_long = [{"role": "user", "content": f"{PROMPT_CANARY} " * 200}]
    refused = [
        chat(LLAMACPP_MODEL, messages=too_long),
        chat(LLAMACPP_MODEL, tools=PROMPT_CANARY),
        # llama.cpp quotes these two on its standard error.
        chat(LLAMACPP_MODEL, grammar=f'root ::= "{PROMPT_CANARY}" <{PROMPT_CANARY}>'),
        chat(LLAMACPP_MODEL, response_format={"type": "json_schema", "json_schema": {"schema": {"type": PROMPT_CANARY}}}),
        chat(PROMPT_CANARY),
        chat(MODEL, temperature=PROMPT_CANARY),
        scripted(fail_status=500),
        scripted(break_after_tokens=3),
        scripted(exit_after_tokens=3),
        f'{{"model": "{PROMPT_CANARY}'.encode(),
    ]
    for body in refused:
        assert ask(pool, "/v1/chat/completions", body)[0] >= 400
    pool.wait_connected()
    with pool.client() as client:
        assert ANSWER_CANARY in client.chat(PROMPT_CANARY, model=MODEL, scripted={"tokens": [ANSWER_CANARY]}).text
        with pytest.raises(PoolError):
            client.chat(PROMPT_CANARY, model=MODEL, scripted={"fail_status": 400})


def kill_engine(pool, module):
    """Ends an engine, whose last words are then those that quoted a request; returns once the node has told of it."""
    for process in psutil.Process(pool.nodes[0].process.pid).children(recursive=True):
        if any(module in argument for argument in process.cmdline()):
            process.kill()
    give_up_at = time.monotonic() + 30
    while "the engine ended: signal SIGKILL" not in pool.nodes[0].log():
        assert time.monotonic() < give_up_at, pool.nodes[0].log()
        time.sleep(0.05)
    pool.wait_connected(LLAMACPP_MODEL)


def traces(*folders):
    """Files in which either canary can be read."""
    found = []
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                path = Path(parent, name)
                if path.is_file() and any(canary.encode() in path.read_bytes() for canary in (PROMPT_CANARY, ANSWER_CANARY)):
                    found.append(path)
    return found


@pytest.mark.timeout(180)
def test_prompts_and_answers_leave_no_trace(tmp_path, own_temporary_folder):
    with running_pool(tmp_path, with_llamacpp=True) as pool:
        ask_in_every_way(pool)
        kill_engine(pool, "llamacpp_server")
        stream = pool.stream(**{**scripted(token_count=400, inter_token_ms=10), "max_tokens": 400})
        stream.read_tokens(20)
        kill(pool.nodes[0])
        stream.read_to_end()
        assert stream.error is not None
        pool.nodes[0].start_again()
        pool.wait_connected()
        assert traces(tmp_path, own_temporary_folder) == []
        looked_at = [path for path in (tmp_path / "coordinator").iterdir() if path.name.startswith("potluck.db")]
        assert looked_at, "the database was among them"
        assert "chat/completions" in pool.coordinator.log(), "and so was a log that knows of the requests"
        assert list(own_temporary_folder.iterdir()), "and so was Ray's folder"
    assert traces(tmp_path, own_temporary_folder) == []
