"""What may be attached, and which server is which, by what each answers."""

from __future__ import annotations

from typing import Any

import pytest

from potluck_node.domain.attached import MODELS_PATH, UNKNOWN, Answer, AttachedServer, model_names, parse_attached, recognised
from potluck_node.domain.model_source import AttachedSource, check_model_file, parse_source
from potluck_node.settings import Settings, load_settings
from potluck_protocol.errors import PotluckError
from potluck_protocol.values import ModelFile, ModelId, PinnedFile


def listed(owner: str, *names: str) -> Answer:
    return Answer(200, {"object": "list", "data": [{"id": name, "object": "model", "owned_by": owner} for name in names]})


def said(value: Any, status: int = 200) -> Answer:
    return Answer(status, value)


LM_STUDIO_SAYS = said({"error": "Unexpected endpoint or method. (GET /api/version)"})
"""With status 200, to every path that it does not know."""


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ({MODELS_PATH: listed("vllm", "m"), "/version": said({"version": "0.33.0"})}, "vLLM 0.33.0"),
        ({MODELS_PATH: listed("sglang", "m")}, "SGLang"),
        ({MODELS_PATH: listed("llamacpp", "m"), "/props": said({"build_info": "b6000-abc"})}, "llama.cpp b6000-abc"),
        ({MODELS_PATH: listed("me", "m"), "/props": said({"default_generation_settings": {}})}, "llama.cpp"),
        ({MODELS_PATH: Answer(200, {"data": [{"id": "m"}]}, "llama.cpp")}, "llama.cpp"),
        ({MODELS_PATH: listed("tensorrt_llm", "m"), "/version": said({"version": "1.2.0"})}, "TensorRT-LLM 1.2.0"),
        ({MODELS_PATH: listed("tabbyAPI", "m")}, "TabbyAPI"),
        ({MODELS_PATH: listed("library", "llama3.2:3b"), "/api/version": said({"version": "0.12.6"})}, "Ollama 0.12.6"),
        ({MODELS_PATH: listed("m", "m"), "/info": said({"router": "text-generation-router", "version": "3.3.7"})}, "TGI 3.3.7"),
        ({MODELS_PATH: listed("m", "m"), "/info": said({"model_id": "m", "docker_label": None, "version": "2.0"})}, "TGI 2.0"),
        ({MODELS_PATH: listed("organization_owner", "m"), "/api/version": LM_STUDIO_SAYS, "/info": LM_STUDIO_SAYS}, "LM Studio"),
        ({MODELS_PATH: listed("koboldcpp", "m"), "/api/version": said({"version": "0.7.0"})}, "KoboldCpp"),
        ({MODELS_PATH: listed("openai", "m"), "/api/version": LM_STUDIO_SAYS, "/props": LM_STUDIO_SAYS}, UNKNOWN),
        ({MODELS_PATH: listed("openai", "m"), "/api/version": said({"version": "1"}, status=404)}, UNKNOWN),
        ({MODELS_PATH: listed("openai", "m"), "/info": said(["model_id", "docker_label"])}, UNKNOWN),
        ({MODELS_PATH: listed("vllm", "m"), "/version": said({"version": "1\n2"})}, "vLLM"),
        ({MODELS_PATH: listed("vllm", "m"), "/version": said({"version": "1" * 99})}, "vLLM"),
        ({MODELS_PATH: Answer(200, "no object")}, UNKNOWN),
        ({MODELS_PATH: Answer(200, {"data": [1, {"owned_by": ["vllm"]}]})}, UNKNOWN),
        ({}, UNKNOWN),
    ],
)
def test_a_server_is_known_by_what_it_says_of_itself(answers, kind):
    assert recognised(answers) == kind


def test_names_that_a_catalogue_cannot_write_are_left_out():
    names = ("llama3.2:3b", "org/Model-7B", "/models/a.gguf", "a b", "-x", "a//b", "./a", "é", "", "x" * 300, "a\nb", "llama3.2:3b")
    assert model_names(listed("o", *names)) == ("/models/a.gguf", "llama3.2:3b", "org/Model-7B")
    assert model_names(Answer(401, {"data": [{"id": "m"}]})) == ()
    assert model_names(Answer(200, {"data": {"id": "m"}})) == ()
    assert model_names(Answer(200, {"data": [{"id": 1}, "m", None]})) == ()


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("http://127.0.0.1:11434", AttachedServer("http://127.0.0.1:11434")),
        ("http://localhost:1234/v1/", AttachedServer("http://localhost:1234")),
        ("http://[::1]:8080/prefix", AttachedServer("http://[::1]:8080/prefix")),
        (" http://127.0.0.1:5000 ~/my keys/tabby ", AttachedServer("http://127.0.0.1:5000", "~/my keys/tabby")),
    ],
)
def test_servers_on_loopback_may_be_attached(text, server):
    assert parse_attached(text) == server
    assert parse_attached(str(server)) == server


@pytest.mark.parametrize(
    "text",
    [
        *("", "127.0.0.1:8000", "http://127.0.0.1", "https://127.0.0.1:8000", "http://192.168.1.2:8000", "http://0.0.0.0:8000"),
        *(
            "http://example.org:80",
            "http://127.0.0.1.example.org:80",
            "http://u:p@127.0.0.1:80",
            "http://127.0.0.1:80/?a",
            "http://[::]:80",
        ),
        *("http://127.0.0.1:99999", "http://127.0.0.1:x", "file:///etc/passwd", "http://[fe80::1]:80", "http://:80"),
    ],
)
def test_nothing_else_may(text):
    with pytest.raises(ValueError, match="on this machine's loopback"):
        parse_attached(text)
    with pytest.raises(PotluckError, match="attach_urls"):
        load_settings(attach_urls=(text or "x",))


def test_settings_take_servers_from_the_environment(monkeypatch):
    assert Settings().attach_urls == ()
    monkeypatch.setenv("POTLUCK_NODE_ATTACH_URLS", "http://127.0.0.1:11434/v1, http://127.0.0.1:5000 /keys/tabby")
    assert Settings().attach_urls == ("http://127.0.0.1:11434", "http://127.0.0.1:5000 /keys/tabby")


ATTACHED = ModelFile(ModelId("m"), "attach:llama3.2:3b", "", "", 0)


def test_an_attached_model_has_a_name_and_no_files():
    assert parse_source(ATTACHED.source) == AttachedSource("llama3.2:3b")
    check_model_file(ATTACHED)
    pinned = PinnedFile("a.json", "0" * 64, 1)
    for wrong in (
        ModelFile(ModelId("m"), ATTACHED.source, "a.json", "0" * 64, 1),
        ModelFile(ModelId("m"), ATTACHED.source, "", "", 0, "0" * 64),
        ModelFile(ModelId("m"), ATTACHED.source, "", "", 0, "", (pinned,)),
    ):
        with pytest.raises(ValueError, match="has no files"):
            check_model_file(wrong)
    with pytest.raises(ValueError, match="plain relative path"):
        check_model_file(ModelFile(ModelId("m"), "path:/models", "", "", 0))
