"""What may be attached, and which server is which, by what each answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from potluck_coordinator.gateway.dispatching import REQUEST_SECONDS_MAX
from potluck_node.attached_servers import AttachedServers, headers_of
from potluck_node.control import AttachedLine
from potluck_node.domain.attached import (
    MODELS_PATH,
    RECOGNITION_PATHS,
    UNKNOWN,
    WORD_SECONDS_MAX,
    Answer,
    AttachedServer,
    is_conclusive,
    is_only_busy,
    model_names,
    parse_attached,
    recognised,
)
from potluck_node.domain.model_source import AttachedSource, check_model_file, parse_source
from potluck_node.engines.attach import AttachEngine
from potluck_node.engines.base import EngineLaunch
from potluck_node.engines_command import engine_lines
from potluck_node.progress import attached_words
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
    good = ("-x", "./models/a.gguf", "/models/a.gguf", "C:\\m.gguf", "a b", "a//b", "llama3.2:3b", "org/Model-7B", "é")
    bad = ("", "x" * 201, "a\nb", "a\x1b[2J", "a\ud800", "a\u202eb")
    assert model_names(listed("o", *reversed(good), *bad, "llama3.2:3b")) == good
    assert model_names(Answer(401, {"data": [{"id": "m"}]})) == ()
    assert model_names(Answer(200, {"data": {"id": "m"}})) == ()
    assert model_names(Answer(200, {"data": [{"id": 1}, "m", None]})) == ()
    odd = [{"id": ["x"]}, {"id": {"m": 1}}, {"id": None}, {}, {"id": "theirs"}, {"id": "theirs"}]
    assert model_names(Answer(200, {"data": odd})) == ("theirs",)


@pytest.mark.parametrize(("status", "busy"), [(200, False), (401, False), (404, False), (429, True), (500, True), (503, True), (529, True)])
def test_a_server_that_lists_nothing_just_now_is_told_from_one_that_has_nothing(status, busy):
    assert is_only_busy(Answer(status)) is busy


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


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("https://127.0.0.1:5000/secret", "'127.0.0.1:5000' is named with https://, and attached servers are asked by http:// alone"),
        ("http://192.168.1.2:5000/secret", "'192.168.1.2:5000' is no server on this machine's loopback"),
        ("http://127.0.0.1/secret", "'127.0.0.1' is named without its port"),
        ("http://127.0.0.1:99999/secret", "'127.0.0.1:99999' has no such port"),
        ("127.0.0.1:5000/secret", "an attached URL does not begin with http:// and a host"),
        ("http://[::1/secret", "an attached URL cannot be read"),
    ],
)
def test_what_is_wrong_with_a_url_is_named_and_its_path_is_not(url, fault):
    with pytest.raises(PotluckError) as refused:
        load_settings(attach_urls=(url,))
    assert f"{fault}; give a server" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_the_list_of_engines_names_the_servers_without_their_paths(tmp_path):
    settings = Settings(cache_dir=tmp_path, attach_urls=("http://127.0.0.1:8080/s3cret /keys/own", "http://localhost:5000"))
    told = next(line for line in engine_lines(settings, has_cards=False) if line.kind == "attach")
    assert (told.installed, told.why) == (True, "http://127.0.0.1:8080, http://localhost:5000")


ALL_ANSWERED = {path: said(None, 404) for path in RECOGNITION_PATHS}


@pytest.mark.parametrize(
    ("answers", "conclusive"),
    [
        ({MODELS_PATH: listed("vllm", "m")}, True),
        ({MODELS_PATH: listed("openai", "m"), **ALL_ANSWERED}, True),
        ({MODELS_PATH: listed("openai", "m"), **ALL_ANSWERED, "/api/version": said(None, 503)}, False),
        ({MODELS_PATH: listed("openai", "m"), **{path: ALL_ANSWERED[path] for path in RECOGNITION_PATHS[1:]}}, False),
    ],
)
def test_a_server_is_asked_again_what_it_is_while_that_is_not_known_and_it_left_a_question_open(answers, conclusive):
    assert is_conclusive(answers) is conclusive


@pytest.mark.parametrize(
    "url", ["http://:secret@127.0.0.1:80", "http://secret@127.0.0.1:80", "https://u:secret@h:x", "http://127.0.0.1:80/?key=secret"]
)
def test_a_secret_in_a_url_is_refused_and_not_shown(url):
    with pytest.raises(PotluckError, match="the file of its key") as refused:
        load_settings(attach_urls=(url,))
    assert "secret" not in str(refused.value)


def test_settings_take_servers_from_the_environment(monkeypatch):
    assert Settings().attach_urls == ()
    monkeypatch.setenv("POTLUCK_NODE_ATTACH_URLS", "http://127.0.0.1:11434/v1, http://127.0.0.1:5000 /keys/tabby")
    assert Settings().attach_urls == ("http://127.0.0.1:11434", "http://127.0.0.1:5000 /keys/tabby")


ATTACHED = ModelFile(ModelId("m"), "attach:llama3.2:3b", "", "", 0)


def test_an_attached_model_has_a_name_and_no_files():
    assert parse_source(ATTACHED.source) == AttachedSource("llama3.2:3b")
    assert parse_source("attach:./models//a b.gguf") == AttachedSource("./models//a b.gguf"), "to the letter"
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


def test_a_key_file_of_a_user_that_is_none_is_its_servers_trouble_alone():
    with pytest.raises(ValueError, match="home directory"):
        headers_of(AttachedServer("http://127.0.0.1:1", "~no-such-user-here/key"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (AttachedLine("127.0.0.1:11434", "Ollama 0.12.6", ("a", "b"), ""), "127.0.0.1:11434: Ollama 0.12.6: a, b"),
        (AttachedLine("[::1]:80", "", (), "HTTP status 500 for /v1/models"), "[::1]:80: HTTP status 500 for /v1/models"),
        (AttachedLine("localhost:1", "vLLM", (), ""), "localhost:1: vLLM: it lists no model that can be shared"),
        (AttachedLine("localhost:1", "vLLM", ("m",), "it is busy"), "localhost:1: vLLM: m; it is busy"),
        (AttachedLine("h:1", "k", tuple("abcdefghijkl"), ""), "h:1: k: a, b, c, d, e, f, g, h, i, j, and 2 more"),
    ],
)
def test_an_attached_server_in_one_line(line, words):
    assert attached_words(line) == words


def test_no_attached_server_has_less_time_for_a_word_than_a_gateway_gives_a_request():
    """Its first answer, too: a large model may have to be loaded for it."""
    launch = EngineLaunch(ModelId("tiny"), Path("unused"), 1, 1024, attached_name="theirs")
    assert AttachEngine(AttachedServers(())).probe(launch).limit_seconds == WORD_SECONDS_MAX >= REQUEST_SECONDS_MAX
