"""`potluck models`, `deploy`, `undeploy`, `deployments` and `explain` as an operator types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from potluck.commands import models
from potluck_protocol.bounds import CATALOGUE_CHARACTERS_MAX
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import common_pb2, inference_pb2, node_pb2, pool_pb2
from tests.support.scripted_pool import API_KEY, MODEL, ScriptedPool, scripted_pool
from tests.support.terminal import Terminal, lonely_terminal

COMMIT = "c" * 40
REPOSITORY = "hf:org/llama"
ADDED = pool_pb2.CatalogueModel(
    model_id="llama-8b",
    origin="added",
    source=f"{REPOSITORY}@{COMMIT}",
    files=[
        node_pb2.PinnedFile(file_name="model.safetensors", sha256="a" * 64, size_bytes=5_700_000_000),
        node_pb2.PinnedFile(file_name="config.json", sha256="b" * 64, size_bytes=800_000),
    ],
    engine_kinds=["vllm", "sglang"],
    context_length_tokens=8192,
    slot_count=8,
    prompt_price_micro_credits_per_token=2,
    completion_price_micro_credits_per_token=6,
    licence="llama3",
    endpoints=[common_pb2.ENDPOINT_CHAT_COMPLETIONS],
    created_at_unix_seconds=1_713_000_000,
    quantization="awq",
    architecture=[
        pool_pb2.ArchitectureFact(name="layer_count", value=32),
        pool_pb2.ArchitectureFact(name="expert_count", value=0),
        pool_pb2.ArchitectureFact(name="bits_per_weight", value=4.156),
    ],
    unchecked="whether nodes may fetch it",
)
OFFER = pool_pb2.CatalogueModel(
    model_id="llama-70b", origin="built_in", source=REPOSITORY, endpoints=[common_pb2.ENDPOINT_CHAT_COMPLETIONS], unchecked="its size"
)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Terminal:
    return lonely_terminal(monkeypatch, capsys, tmp_path)


@pytest.fixture
def pool(tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedPool]:
    with scripted_pool(tmp_path) as running:
        monkeypatch.setenv("POTLUCK_URL", running.url)
        monkeypatch.setenv("POTLUCK_API_KEY", API_KEY)
        monkeypatch.setattr(models, "PROGRESS_PAUSE_SECONDS", 0.0)
        yield running


def added(*messages: pool_pb2.CatalogueModel) -> pool_pb2.AddModelResponse:
    return pool_pb2.AddModelResponse(models=messages)


def lines(terminal: Terminal) -> list[str]:
    return terminal.out.splitlines()


def test_offers_are_listed_with_what_pins_them_and_left_out_where_people_look_for_a_model(pool: ScriptedPool, terminal: Terminal):
    offered = inference_pb2.Model(model_id="big", endpoints=[common_pb2.ENDPOINT_CHAT_COMPLETIONS], offered_repository="hf:org/big")
    pool.models.append(offered)
    assert terminal.run("models") == 0
    assert [line.split()[0] for line in lines(terminal)] == ["MODEL", MODEL]
    assert terminal.run("models", "list") == 0
    header, servable, offer = lines(terminal)
    assert header.split()[-1] == "NOTE"
    assert "not pinned" not in servable
    assert offer.endswith("not pinned: potluck models add hf:org/big@REVISION --as big")
    assert terminal.run("models", "list", "--json") == 0
    assert [model["offered_repository"] for model in json.loads(terminal.out)] == ["", "hf:org/big"]


def test_a_model_is_shown_whole(pool: ScriptedPool, terminal: Terminal):
    pool.operator_replies.append(pool_pb2.GetModelResponse(model=ADDED))
    assert terminal.run("models", "show", "llama-8b") == 0
    assert pool.operator_requests == [pool_pb2.GetModelRequest(model_id="llama-8b")]
    facts = {line[:12].strip(): line[14:] for line in lines(terminal)}
    assert facts["source"] == f"{REPOSITORY}@{COMMIT}"
    assert facts["size"] == "5.7 GB"
    assert facts["price out"] == "6 credits a million tokens"
    assert facts["unchecked"] == "whether nodes may fetch it"
    assert facts["deployed"] == "no"
    assert ["config.json", "0.8", "MB", "b" * 64] in [line.split() for line in lines(terminal)]
    assert ["layer_count", "32"] in [line.split() for line in lines(terminal)]
    assert "expert_count" not in terminal.out
    assert "not pinned" not in terminal.out


def test_an_offer_is_shown_with_what_pins_it(pool: ScriptedPool, terminal: Terminal):
    pool.operator_replies.append(pool_pb2.GetModelResponse(model=OFFER))
    assert terminal.run("models", "show", "llama-70b") == 0
    assert f"potluck models add {REPOSITORY}@REVISION --as llama-70b" in terminal.out
    assert "SHA256" not in terminal.out


def test_a_model_as_json(pool: ScriptedPool, terminal: Terminal):
    wished = pool_pb2.CatalogueModel()
    wished.CopyFrom(ADDED)
    wished.deployment.CopyFrom(pool_pb2.Deployment(model_id="llama-8b", tier=pool_pb2.SERVICE_TIER_FLEX))
    pool.operator_replies.append(pool_pb2.GetModelResponse(model=wished))
    assert terminal.run("models", "show", "llama-8b", "--json") == 0
    shown = json.loads(terminal.out)
    assert shown["files"][1] == {"file_name": "config.json", "sha256": "b" * 64, "size_bytes": 800_000}
    assert shown["architecture"] == {"layer_count": 32, "expert_count": 0, "bits_per_weight": 4.156}
    assert shown["deployment"] == {"model_id": "llama-8b", "replica_count": None, "tier": "flex"}


def test_a_repository_is_asked_for_until_it_is_read(pool: ScriptedPool, terminal: Terminal):
    words = ["Asking the hub for org/llama", "Hashing config.json, 1 of 2 small files", "Hashing config.json, 1 of 2 small files"]
    pool.operator_replies.extend([*(pool_pb2.AddModelResponse(progress=each) for each in words), added(ADDED)])
    assert terminal.run("models", "add", f"{REPOSITORY}@main") == 0
    assert pool.operator_requests == [pool_pb2.AddModelRequest(hub=pool_pb2.HubModel(source=f"{REPOSITORY}@main"))] * 4
    assert lines(terminal)[1].split() == ["llama-8b", f"{REPOSITORY}@{COMMIT}", "2", "5.7", "GB", "vllm,", "sglang", "llama3"]
    assert terminal.err.splitlines() == [
        *words[:2],
        "Not checked of llama-8b: whether nodes may fetch it.",
        "To have it served: potluck deploy llama-8b",
    ]


def test_what_is_said_of_a_repository_is_sent_and_nothing_else(pool: ScriptedPool, terminal: Terminal):
    pool.operator_replies.append(added(ADDED))
    options = "--as a:b --file a.gguf --price-in 0 --price-out 6 --engine vllm --engine sglang --context 512 --slots 2 --json"
    assert terminal.run("models", "add", f"{REPOSITORY}@main", *options.split()) == 0
    expected = pool_pb2.HubModel(
        source=f"{REPOSITORY}@main",
        model_id="a:b",
        file_name="a.gguf",
        prompt_price_micro_credits_per_token=0,
        completion_price_micro_credits_per_token=6,
        engine_kinds=["vllm", "sglang"],
        context_length_tokens=512,
        slot_count=2,
    )
    assert pool.operator_requests == [pool_pb2.AddModelRequest(hub=expected)]
    assert [model["model_id"] for model in json.loads(terminal.out)] == ["llama-8b"]
    assert terminal.err == ""


def test_a_repository_that_is_never_read_ends_with_how_to_go_on(pool: ScriptedPool, terminal: Terminal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models, "PIN_SECONDS_MAX", 0.0)
    pool.operator_replies.append(pool_pb2.AddModelResponse(progress="Asking"))
    assert terminal.run("models", "add", f"{REPOSITORY}@main") == 1
    assert "the same command again" in terminal.err


def test_a_catalogue_file_is_sent_as_it_is(pool: ScriptedPool, terminal: Terminal, tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text("[[model]]  # caf\N{LATIN SMALL LETTER E WITH ACUTE}\n")
    pool.operator_replies.append(added(OFFER, ADDED))
    assert terminal.run("models", "add", str(path)) == 0
    assert pool.operator_requests == [pool_pb2.AddModelRequest(catalogue_toml=path.read_text())]
    assert [line.split()[0] for line in lines(terminal)] == ["MODEL", "llama-70b", "llama-8b"]
    # An offer cannot be deployed.
    assert f"llama-70b is not pinned: potluck models add {REPOSITORY}@REVISION --as llama-70b" in terminal.err
    assert "potluck deploy llama-8b" in terminal.err
    assert "potluck deploy llama-70b" not in terminal.err


def test_of_a_file_without_end_no_more_is_read_than_shows_that_it_is_too_long(pool: ScriptedPool, terminal: Terminal, tmp_path: Path):
    path = tmp_path / "mine.toml"
    with path.open("w") as file:
        file.truncate(50_000_000)
    pool.unary_refusals.append(PotluckError(ErrorCode.REQUEST_TOO_LARGE, "too long"))
    assert terminal.run("models", "add", str(path)) == 1
    (request,) = pool.operator_requests
    assert len(request.catalogue_toml) == CATALOGUE_CHARACTERS_MAX + 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["models", "add", "org/name@main"], "hf:ORG/NAME@REVISION"),
        (["models", "add", "absent.toml"], "there is no catalogue file absent.toml"),
        (["models", "add", "{file}", "--as", "x"], "a catalogue file says all of it itself"),
        (["models", "add", "{file}", "--price-in", "0"], "a catalogue file says all of it itself"),
        (["models", "add", "{binary}"], "not text in UTF-8"),
        (["models", "add", "hf:a/b@c", "--price-in", "-1"], "--price-in"),
        (["models", "add", "hf:a/b@c", "--slots", "0"], "--slots"),
        (["models", "add"], "Missing argument"),
        (["deploy", "m", "--replicas", "0"], "--replicas"),
        (["deploy", "m", "--tier", "stable"], "'default', 'flex'"),
        (["explain"], "Missing argument"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_asked(
    pool: ScriptedPool, terminal: Terminal, tmp_path: Path, arguments: list[str], words: str
):
    (tmp_path / "file").write_text("")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    given = [argument.format(file=tmp_path / "file", binary=tmp_path / "binary") for argument in arguments]
    assert terminal.run(*given) == 2
    assert words in " ".join(terminal.err.split())
    assert pool.unary_calls == []


@pytest.mark.parametrize(
    ("options", "sent", "said"),
    [
        ([], {"tier": pool_pb2.SERVICE_TIER_DEFAULT}, "one replica on every node that can serve it, tier default"),
        (["--replicas", "1"], {"replica_count": 1, "tier": pool_pb2.SERVICE_TIER_DEFAULT}, "1 replica, tier default"),
        (["--replicas", "3", "--tier", "flex"], {"replica_count": 3, "tier": pool_pb2.SERVICE_TIER_FLEX}, "3 replicas, tier flex"),
    ],
)
def test_a_wish_is_made_and_said_back(pool: ScriptedPool, terminal: Terminal, options: list[str], sent: dict[str, Any], said: str):
    assert terminal.run("deploy", "llama-8b", *options) == 0
    assert pool.operator_requests == [pool_pb2.DeployRequest(deployment=pool_pb2.Deployment(model_id="llama-8b", **sent))]
    assert said in terminal.err
    assert "potluck explain llama-8b" in terminal.err
    assert terminal.out == ""
    assert terminal.run("deploy", "llama-8b", *options, "--json") == 0
    assert json.loads(terminal.out) == {
        "model_id": "llama-8b",
        "replica_count": sent.get("replica_count"),
        "tier": "flex" if "flex" in options else "default",
    }


@pytest.mark.parametrize(
    ("command", "request_made"),
    [
        (["undeploy"], pool_pb2.UndeployRequest(model_id="llama-8b")),
        (["models", "remove"], pool_pb2.RemoveModelRequest(model_id="llama-8b")),
    ],
)
def test_what_takes_away_says_so(pool: ScriptedPool, terminal: Terminal, command: list[str], request_made: Any):
    assert terminal.run(*command, "llama-8b") == 0
    assert pool.operator_requests == [request_made]
    assert (terminal.out, "llama-8b" in terminal.err) == ("", True)
    assert terminal.run(*command, "llama-8b", "--json") == 0
    assert json.loads(terminal.out) == {"model_id": "llama-8b"}


def test_deployments_as_a_table_and_as_json(pool: ScriptedPool, terminal: Terminal):
    everywhere = pool_pb2.Deployment(model_id="tiny", tier=pool_pb2.SERVICE_TIER_FLEX)
    two = pool_pb2.Deployment(model_id="llama-8b", replica_count=2, tier=pool_pb2.SERVICE_TIER_DEFAULT)
    reply = pool_pb2.ListDeploymentsResponse(
        deployments=[
            pool_pb2.DeploymentStatus(deployment=everywhere, ready_replica_count=3),
            pool_pb2.DeploymentStatus(
                deployment=two, ready_replica_count=1, starting_replica_count=0, waiting_request_count=4, shortfall="nodes: 2 no_fit"
            ),
        ]
    )
    pool.operator_replies.extend([reply, reply])
    assert terminal.run("deployments") == 0
    assert [line.split() for line in lines(terminal)] == [
        ["MODEL", "TIER", "WISHED", "READY", "STARTING", "WAITING", "WHY", "NOT", "MORE"],
        ["tiny", "flex", "every", "node", "3", "0", "0", "-"],
        ["llama-8b", "default", "2", "1", "0", "4", "nodes:", "2", "no_fit"],
    ]
    assert terminal.run("deployments", "--json") == 0
    assert json.loads(terminal.out)[1]["deployment"] == {"model_id": "llama-8b", "replica_count": 2, "tier": "default"}


def verdict(name: str, word: str, reason: str) -> pool_pb2.NodeVerdict:
    return pool_pb2.NodeVerdict(node_id=f"id-{name}" if name else "", display_name=name, verdict=word, reason=reason)


def test_an_explanation_begins_with_its_sum(pool: ScriptedPool, terminal: Terminal):
    reply = pool_pb2.ExplainDeploymentResponse(
        verdicts=[
            verdict("den", "serves", "vllm on 1 cards"),
            verdict("attic", "no_fit", "it needs 5.7 GiB"),
            verdict("lab", "no_fit", "it needs 5.7 GiB"),
            verdict("shed", "offline", "not connected for 9 s"),
            verdict("", "group", "no two nodes of one owner"),
        ]
    )
    pool.operator_replies.extend([reply, reply])
    assert terminal.run("explain", "llama-8b") == 0
    first, of_groups, gap, header, *rows = lines(terminal)
    assert first == "llama-8b: 1 of 4 nodes serves it; 2 no_fit, 1 offline."
    assert of_groups == "group: no two nodes of one owner"
    assert gap == ""
    assert header.split() == ["NODE", "NAME", "VERDICT", "REASON"]
    assert [row.split()[:3] for row in rows] == [
        ["id-den", "den", "serves"],
        ["id-attic", "attic", "no_fit"],
        ["id-lab", "lab", "no_fit"],
        ["id-shed", "shed", "offline"],
    ]
    assert terminal.run("explain", "llama-8b", "--json") == 0
    assert [each["verdict"] for each in json.loads(terminal.out)] == ["serves", "no_fit", "no_fit", "offline", "group"]


@pytest.mark.parametrize(
    ("verdicts", "summary"),
    [
        ([], "m: the pool has no node."),
        ([verdict("a", "serves", "")], "m: 1 of 1 nodes serves it."),
        ([verdict("a", "serves", ""), verdict("b", "serves", "")], "m: 2 of 2 nodes serve it."),
        ([verdict("a", "offline", "")], "m: 0 of 1 nodes serve it; 1 offline."),
    ],
)
def test_sums(pool: ScriptedPool, terminal: Terminal, verdicts: list[pool_pb2.NodeVerdict], summary: str):
    pool.operator_replies.append(pool_pb2.ExplainDeploymentResponse(verdicts=verdicts))
    assert terminal.run("explain", "m") == 0
    assert lines(terminal)[0] == summary


@pytest.mark.parametrize(
    "arguments", [["models", "add", "hf:a/b@c"], ["models", "remove", "m"], ["deploy", "m"], ["undeploy", "m"], ["explain", "m"]]
)
@pytest.mark.parametrize(("code", "exit_code"), [(ErrorCode.PERMISSION_DENIED, 4), (ErrorCode.MODEL_NOT_FOUND, 1)])
def test_a_refusal_is_said_and_has_its_exit_code(
    pool: ScriptedPool, terminal: Terminal, arguments: list[str], code: ErrorCode, exit_code: int
):
    pool.unary_refusals.append(PotluckError(code, "what and how to fix it"))
    assert terminal.run(*arguments) == exit_code
    assert terminal.err.startswith("error: what and how to fix it")
    assert terminal.out == ""


def test_ctrl_c_ends_the_wait_for_a_repository_without_a_word_of_python(pool: ScriptedPool):
    asked = threading.Event()

    class Endless:
        """More progress than anyone waits for."""

        def popleft(self) -> pool_pb2.AddModelResponse:
            asked.set()
            return pool_pb2.AddModelResponse(progress="Asking the hub")

    pool.operator_replies = Endless()
    command = [sys.executable, "-m", "potluck", "models", "add", f"{REPOSITORY}@main"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        assert asked.wait(30)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert set(err.splitlines()) <= {"Asking the hub"}
