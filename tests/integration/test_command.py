"""The `potluck` command as people type it: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from potluck.commands import root
from potluck.commands.terminal import duration_seconds
from potluck_protocol.connection import Invite, fetch_connection
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import inference_pb2
from tests.support.scripted_pool import API_KEY, MODEL, NODE, ScriptedPool, answers, breaks, data, finished, scripted_pool
from tests.support.terminal import Keyboard, Terminal, lonely_terminal


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Terminal:
    return lonely_terminal(monkeypatch, capsys, tmp_path)


@pytest.fixture
def pool(tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedPool]:
    with scripted_pool(tmp_path) as running:
        monkeypatch.setenv("POTLUCK_URL", running.url)
        monkeypatch.setenv("POTLUCK_API_KEY", API_KEY)
        yield running


def write_operator(folder: Path, url: str, api_key: str) -> None:
    folder.mkdir(parents=True)
    (folder / "operator.json").write_text(json.dumps({"url": url, "api_key": api_key}))


EVENTS = data(*(f'data: {{"choices":[{{"index":0,"delta":{{"content":"{text}"}}}}]}}\n\n'.encode() for text in ("Good", " soup")))


def test_chat_prints_the_answer_alone_and_says_the_rest_beside_it(pool: ScriptedPool, terminal: Terminal):
    pool.plays.append(answers(*EVENTS, finished(prompt=3, completion=2, charge=11)))
    assert terminal.run("chat", "What is there?", "--max-tokens", "9", "--trusted-only") == 0
    assert terminal.out == "Good soup\n"
    assert f"node {NODE[:8]}" in terminal.err
    assert "0.000011 credits" in terminal.err
    assert json.loads(pool.bodies[0])["max_tokens"] == 9
    assert "trusted_only" not in json.loads(pool.bodies[0]), "it is said beside the body"


@pytest.mark.parametrize("typed", [(), ("--trusted-only",)])
def test_chat_demands_trusted_nodes_where_it_is_told_to(pool: ScriptedPool, terminal: Terminal, typed: tuple[str, ...]):
    asked: list[bool] = []

    def play(request: Any, context: Any) -> Any:
        asked.append(request.trusted_only)
        return answers(*EVENTS, finished())(request, context)

    pool.plays.append(play)
    assert terminal.run("chat", "What is there?", *typed) == 0
    assert asked == [bool(typed)]


def test_chat_reads_the_question_from_a_pipe(pool: ScriptedPool, terminal: Terminal):
    pool.plays.append(answers(*EVENTS, finished()))
    assert terminal.run("chat", stdin="From a file") == 0
    assert json.loads(pool.bodies[0])["messages"][0]["content"] == "From a file"
    assert terminal.run("chat", stdin=" \n") == 2
    assert terminal.run("chat", stdin=b"\xb8".decode(errors="surrogateescape")) == 2
    assert "UTF-8" in terminal.err


def test_an_answer_that_finds_no_room_is_said_in_a_line(pool: ScriptedPool):
    pool.plays.append(answers(*EVENTS, finished()))
    with Path("/dev/full").open("w") as full:
        asked = [sys.executable, "-m", "potluck", "chat", "What is there?"]
        done = subprocess.run(asked, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "error: standard output: No space left on device\n")


def test_a_conversation_remembers_and_survives_a_failed_answer(pool: ScriptedPool, terminal: Terminal, monkeypatch: pytest.MonkeyPatch):
    typed = iter(["One?", "", "Two?", "Three?"])

    def ask(_prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    pool.plays.extend([answers(*EVENTS, finished()), breaks(ErrorCode.NODE_LOST), answers(*EVENTS, finished())])
    assert terminal.run("chat", stdin=Keyboard()) == 0
    assert [message["content"] for message in json.loads(pool.bodies[2])["messages"]] == ["One?", "Good soup", "Three?"]
    assert "error:" in terminal.err


def test_a_broken_answer_fails_with_its_text_its_cause_and_its_request(pool: ScriptedPool, terminal: Terminal):
    pool.plays.append(breaks(ErrorCode.NODE_LOST, *EVENTS))
    assert terminal.run("chat", "x") == 1
    assert "Good soup" in terminal.out
    assert "req_scripted" in terminal.err
    assert "Traceback" not in terminal.err


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (ErrorCode.INVALID_API_KEY, 4),
        (ErrorCode.PERMISSION_DENIED, 4),
        (ErrorCode.NOT_FOUND, 1),
        (ErrorCode.INTERNAL_ERROR, 1),
    ],
)
def test_a_refusal_has_its_exit_code(pool: ScriptedPool, terminal: Terminal, code: ErrorCode, exit_code: int):
    pool.unary_refusals.append(PotluckError(code, "what and how to fix it"))
    assert terminal.run("credits") == exit_code
    assert terminal.err.startswith("error: what and how to fix it")
    assert terminal.out == ""


def test_no_coordinator_is_exit_five_and_no_pool_named_is_explained(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert terminal.run("models") == 1
    assert "potluck up" in terminal.err
    monkeypatch.setattr("potluck.transport.CALL_TIMEOUT_SECONDS", 0.2)
    key_file = tmp_path / "key"
    key_file.write_text(API_KEY)
    assert terminal.run("models", "--url", "http://127.0.0.1:9", "--api-key-file", str(key_file)) == 5
    assert "http://127.0.0.1:9" in terminal.err
    assert "potluck coordinator serve" in terminal.err


def test_lists_as_tables_and_as_json(pool: ScriptedPool, terminal: Terminal):
    assert terminal.run("models") == 0
    assert [line.split()[0] for line in terminal.out.splitlines()] == ["MODEL", MODEL]
    assert terminal.run("models", "--json") == 0
    assert json.loads(terminal.out)[0]["endpoints"] == ["/v1/chat/completions", "/v1/completions"]
    assert terminal.run("nodes") == 0
    assert NODE in terminal.out
    assert "100.00%" in terminal.out
    assert terminal.run("nodes", "list", "--json") == 0
    assert json.loads(terminal.out)[0]["engines"][0]["state"] == "ready"
    assert terminal.run("credits", "--json") == 0
    assert json.loads(terminal.out)["available_micro_credits"] == 1_500_000


def test_an_invite_carries_the_address_the_pin_and_the_token_and_stands_alone(pool: ScriptedPool, terminal: Terminal):
    assert terminal.run("tokens", "create", "--lifetime", "30m") == 0
    invite = Invite.parse(terminal.out)
    assert (invite.url, invite.token_id, invite.token_secret) == (pool.url, "t" * 12, "z" * 43)
    assert invite.ca_hash == fetch_connection(pool.url).ca_hash
    assert terminal.out.count("\n") == 1
    assert "this machine only" in terminal.err
    assert "z" * 43 not in terminal.err


def test_an_invite_as_json(pool: ScriptedPool, terminal: Terminal):
    assert terminal.run("tokens", "create", "--json") == 0
    made = json.loads(terminal.out)
    assert Invite.parse(made.pop("invite")).token_id == "t" * 12
    assert made == {"token_id": "t" * 12, "account_id": "acct_a", "expires_at_unix_ms": 1_000}


def test_an_invite_that_never_works_is_not_made(pool: ScriptedPool, terminal: Terminal):
    assert terminal.run("tokens", "create", "--lifetime", "0s") == 2
    assert "an invite always ends" in terminal.err
    assert pool.unary_calls == []


@pytest.mark.parametrize(("connection", "state"), [("connected", "serving"), ("offline", "-"), ("revoked", "-")])
def test_only_a_connected_node_has_a_state(pool: ScriptedPool, terminal: Terminal, connection: str, state: str):
    pool.node_connection = connection
    assert terminal.run("nodes") == 0
    headers, row = (line.split() for line in terminal.out.splitlines())
    assert row[headers.index("STATE")] == state


@pytest.mark.parametrize(("trusted", "shown"), [(True, "trusted"), (False, "-")])
def test_who_lists_nodes_sees_which_are_trusted(pool: ScriptedPool, terminal: Terminal, trusted: bool, shown: str):
    pool.node_trusted = trusted
    assert terminal.run("nodes") == 0
    headers, row = (line.split() for line in terminal.out.splitlines())
    assert row[headers.index("TRUST")] == shown
    assert terminal.run("nodes", "--json") == 0
    assert json.loads(terminal.out)[0]["trusted"] is trusted


def test_a_url_that_is_none_is_named_before_the_key(terminal: Terminal):
    assert terminal.run("models", "--url", "nonsense") == 1
    assert '"nonsense" is no URL' in terminal.err


def test_openais_base_url_finds_the_pool_too(pool: ScriptedPool, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    url = pool.url
    monkeypatch.setenv("POTLUCK_URL", f"{url}/v1")
    assert terminal.run("models") == 0
    assert terminal.run("models", "--url", f"{url}/v1/") == 0
    monkeypatch.delenv("POTLUCK_API_KEY")
    write_operator(tmp_path / "state" / "potluck" / "coordinator", url, API_KEY)
    assert terminal.run("models") == 0


def test_a_person_who_is_refused_is_told_where_the_operators_key_is(pool: ScriptedPool, terminal: Terminal, tmp_path: Path):
    folder = tmp_path / "state" / "potluck" / "coordinator"
    pool.unary_refusals.append(PotluckError(ErrorCode.PERMISSION_DENIED, "Operators only."))
    assert terminal.run("audit") == 4
    assert "on the coordinator's machine, or with --api-key-file" in terminal.err
    assert "operator.json" not in terminal.err
    write_operator(folder, pool.url, "sk-potluck-operator")
    pool.unary_refusals.append(PotluckError(ErrorCode.PERMISSION_DENIED, "Operators only."))
    assert terminal.run("audit") == 4
    assert str(folder / "operator.json") in terminal.err
    assert "sk-potluck-operator" not in terminal.err


def test_grpcs_raw_log_lines_stay_away():
    script = "import sys, potluck, os; assert 'grpc' not in sys.modules; import potluck.command; print(os.environ['GRPC_VERBOSITY'])"
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "NONE\n"


def test_a_new_key_stands_alone_on_standard_output(pool: ScriptedPool, terminal: Terminal):
    assert terminal.run("keys", "create", "--name", "laptop") == 0
    assert terminal.out == "sk-potluck-abcdefgh-x\n"
    assert "abcdefgh" in terminal.err


@pytest.mark.parametrize(
    ("typed", "printed"),
    [
        (("keys", "create"), {"key_prefix": "abcdefgh", "api_key": "sk-potluck-abcdefgh-x"}),
        (("keys", "revoke", "abcdefgh"), {"key_prefix": "abcdefgh"}),
        (("tokens", "revoke", "t" * 12), {"token_id": "t" * 12}),
        (("nodes", "revoke", NODE), {"node_id": NODE}),
        (("nodes", "trust", NODE), {"node_id": NODE, "trusted": True}),
        (("nodes", "distrust", NODE), {"node_id": NODE, "trusted": False}),
    ],
)
def test_what_was_done_as_json(pool: ScriptedPool, terminal: Terminal, typed: tuple[str, ...], printed: dict[str, str]):
    assert terminal.run(*typed, "--json") == 0
    assert json.loads(terminal.out) == printed
    assert "sk-potluck" not in terminal.err


@pytest.mark.parametrize(
    "typed",
    [
        ("models", "show", "a\udcff"),
        ("models", "remove", "a\udcff"),
        ("models", "add", "hf:a/b@\udcff"),
        ("models", "add", "hf:a/b@main", "--as", "\ud800"),
        ("models", "add", "hf:a/b@main", "--engine", "\ud800"),
        ("deploy", "\udcff"),
        ("undeploy", "\udcff"),
        ("explain", "\udcff"),
        ("nodes", "revoke", "\udcff"),
        ("nodes", "trust", "\udcff"),
        ("nodes", "revoke", NODE, "--reason", "\udcff"),
        ("keys", "create", "--name", "\udcff"),
        ("keys", "revoke", "\udcff"),
        ("tokens", "create", "--account", "\udcff"),
        ("accounts", "create", "\udcff"),
    ],
)
def test_a_word_that_is_no_text_is_wrong_usage(pool: ScriptedPool, terminal: Terminal, typed: tuple[str, ...]):
    before = len(pool.unary_calls)
    assert terminal.run(*typed) == 2
    assert terminal.err.startswith("error: ")
    assert terminal.err.endswith("is not text in UTF-8.\n")
    assert (terminal.out, len(pool.unary_calls)) == ("", before)


@pytest.mark.parametrize(
    ("typed", "exit_code", "words"),
    [
        (("models", "add", "\udcff.toml"), 2, "there is no catalogue file"),
        (("models", "--url", "http://\udcff"), 1, "http://host:port"),
        (("models", "--api-key-file", "\udcff"), 4, "cannot be read"),
        (("chat", "--model", "\udcff", "Hello"), 1, "cannot be written as JSON"),
    ],
)
def test_a_place_that_is_no_text_is_told_like_any_other(
    pool: ScriptedPool, terminal: Terminal, typed: tuple[str, ...], exit_code: int, words: str
):
    assert terminal.run(*typed) == exit_code
    assert words in terminal.err


def test_a_terminal_without_the_letters_gets_them_spelled_out(pool: ScriptedPool):
    pool.models.append(inference_pb2.Model(model_id="m", licence="für → alle"))
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-m", "potluck", "models"]
    table = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=True).stdout.decode("latin-1")
    assert table.splitlines()[-1].endswith("für \\u2192 alle")
    document = subprocess.run([*command, "--json"], env=environment, capture_output=True, timeout=60, check=True)
    assert json.loads(document.stdout)[-1]["licence"] == "für → alle"


def test_wrong_usage_is_exit_two(terminal: Terminal):
    assert terminal.run("tokens", "create", "--lifetime", "soon") == 2
    assert terminal.run("models", "--no-such-option") == 2
    assert terminal.run("no-such-command") == 2
    assert terminal.run("chat", "--api-key", "sk-potluck-x", "hello") == 2


def test_help_names_every_command(terminal: Terminal):
    assert terminal.run("--help") == 0
    for name in ("up", "demo", "chat", "models", "nodes", "credits", "audit", "tokens", "keys", "accounts", "coordinator", "node"):
        assert f"\n  {name} " in terminal.out
    for name in ("deploy", "undeploy", "deployments", "explain"):
        assert f"\n  {name} " in terminal.out


def test_a_role_that_is_not_installed_says_how_to_install_it(terminal: Terminal, monkeypatch: pytest.MonkeyPatch):
    class Absent:
        name = "node"
        module = "potluck_node.command"

        def load(self) -> typer.Typer:
            raise ModuleNotFoundError("No module named 'aiohttp'", name="aiohttp")

    monkeypatch.setattr(root, "entry_points", lambda group: [Absent()])
    assert terminal.run("node", "join", "--name", "x", "INVITE") == 1
    assert "pip install '.[node]' (in the folder of Potluck's sources)" in terminal.err
    assert terminal.run("--help") == 0
    assert "pip install '.[node]'" in terminal.out


def test_the_operators_file_serves_on_its_own_machine(
    pool: ScriptedPool, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    url = pool.url
    monkeypatch.delenv("POTLUCK_URL")
    monkeypatch.delenv("POTLUCK_API_KEY")
    write_operator(tmp_path / "state" / "potluck" / "coordinator", url, API_KEY)
    assert terminal.run("models") == 0
    assert terminal.run("models", "--url", url) == 0


def test_the_operators_key_is_not_sent_to_another_url(
    pool: ScriptedPool, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delenv("POTLUCK_API_KEY")
    write_operator(tmp_path / "state" / "potluck" / "coordinator", "http://127.0.0.1:1", API_KEY)
    assert terminal.run("models") == 4
    assert "No API key for" in terminal.err
    assert pool.unary_calls == []


def test_of_two_coordinators_the_running_one_is_asked(
    pool: ScriptedPool, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    url = pool.url
    monkeypatch.delenv("POTLUCK_URL")
    monkeypatch.delenv("POTLUCK_API_KEY")
    write_operator(tmp_path / "state" / "potluck" / "coordinator", "http://127.0.0.1:1", "stopped")
    running = tmp_path / "state" / "potluck" / "up" / "coordinator"
    write_operator(running, url, API_KEY)
    (running / "endpoints.json").write_text("{}")
    assert terminal.run("models") == 0


def test_a_broken_operators_file_is_named(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "operator.json").write_text("{")
    monkeypatch.setenv("POTLUCK_COORDINATOR_DATA_DIR", str(tmp_path))
    assert terminal.run("models") == 1
    assert "operator.json cannot be read" in terminal.err


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1h", 3600), ("7d", 604_800)])
def test_durations(text: str, seconds: int):
    assert duration_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "1", "h", "-1h", "1.5h", "1w", "1h "])
def test_what_is_no_duration(text: str):
    with pytest.raises(typer.BadParameter):
        duration_seconds(text)


def test_a_folder_that_cannot_be_used_is_named(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    obstacle = tmp_path / "file"
    obstacle.write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(obstacle))
    assert terminal.run("up") == 1
    assert terminal.err.splitlines()[-1].startswith(f"error: {obstacle}")
    assert "Traceback" not in terminal.err
