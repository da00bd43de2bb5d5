"""Repositories read with the hub's real client from a hub on loopback: what is pinned, what is refused, and what is never fetched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from threading import Event

import pytest

from potluck_coordinator.directory import hub as hub_module
from potluck_coordinator.directory.hub import SMALL_FILE_BYTES_MAX, Hub
from potluck_coordinator.domain.repository import ModelWishes, entry_of_repository
from potluck_protocol.errors import ErrorCode, PotluckError
from tests.support.hub_server import COMMIT, HubServer, running_hub
from tests.support.tiny_gguf import write_tiny_gguf

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 2048,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
NAME = "org/tiny"
WEIGHTS_BYTES = 4_000_000_000


def folder(**files: bytes | int) -> dict[str, bytes | int]:
    """A repository for vLLM; a name's "__" stands for a dot."""
    known: dict[str, bytes | int] = {
        "README.md": b"# Tiny",
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": WEIGHTS_BYTES,
        "tokenizer.json": b"{}",
        "pytorch_model.bin": 7_000,
    }
    return known | {name.replace("__", "."): content for name, content in files.items()}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with running_hub() as served:
        served.repositories[NAME] = folder()
        yield served


def read(hub: HubServer, revision: str = "main", wanted: str | None = None, stop: Event | None = None):
    words: list[str] = []
    return (*Hub(hub.url, stop or Event()).read(NAME, revision, wanted, words.append), words)


def test_a_branch_becomes_a_commit_and_every_file_a_hash(hub: HubServer):
    repository, pins, documents, words = read(hub)
    assert (repository.commit, repository.licence, repository.gated) == (COMMIT, "apache-2.0", False)
    assert repository.created_at_unix_seconds == 1_719_835_200
    assert [(pin.file_name, pin.size_bytes) for pin in pins] == [
        ("model.safetensors", WEIGHTS_BYTES),
        ("config.json", len(json.dumps(CONFIG))),
        ("tokenizer.json", 2),
    ]
    assert pins[0].sha256 == hashlib.sha256(b"%d" % WEIGHTS_BYTES).hexdigest()
    assert pins[2].sha256 == hashlib.sha256(b"{}").hexdigest()
    assert documents["config.json"] == CONFIG
    assert words[0] == f"Asking the hub for {NAME}"
    assert words[-1].startswith("Hashing tokenizer.json, 2 of 2")
    made = entry_of_repository(repository, pins, documents, ModelWishes(), None)
    assert made.file.source == f"hf:{NAME}@{COMMIT}"
    assert made.architecture.weight_bytes_of_files == WEIGHTS_BYTES


def test_weights_and_what_is_not_served_are_never_fetched(hub: HubServer):
    read(hub)
    fetched = [path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path]
    assert fetched == ["config.json", "tokenizer.json"]


def test_an_index_is_read_for_which_weights_are_meant(hub: HubServer):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    hub.repositories[NAME] = folder() | {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001-of-00002.safetensors": 2_000,
        "model-00002-of-00002.safetensors": 3_000,
    }
    del hub.repositories[NAME]["model.safetensors"]
    hub.repositories[NAME]["consolidated.safetensors"] = 5_000
    _, pins, _, _ = read(hub)
    assert [pin.file_name for pin in pins][:2] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert "consolidated.safetensors" not in [pin.file_name for pin in pins]


def test_a_gguf_file_is_pinned_by_the_hubs_own_hash_and_needs_no_header(hub: HubServer):
    hub.repositories[NAME] = {"a.gguf": 5_000, "b.gguf": 6_000, "README.md": b"#"}
    with pytest.raises(ValueError, match="say which one with --file"):
        read(hub)
    repository, pins, documents, _ = read(hub, wanted="b.gguf")
    assert [(pin.file_name, pin.size_bytes) for pin in pins] == [("b.gguf", 6_000)]
    made = entry_of_repository(repository, pins, documents, ModelWishes(), None)
    assert made.architecture is None
    assert "its architecture: its header could not be read" in made.unchecked


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


@pytest.mark.parametrize("head_bytes", [(8 << 20, 32 << 20), (64 << 10, 128 << 10), (1_000, 128 << 10)])
def test_a_gguf_files_header_says_what_the_model_is_made_of(hub: HubServer, monkeypatch, tiny_gguf: bytes, head_bytes):
    monkeypatch.setattr(hub_module, "GGUF_HEAD_BYTES", head_bytes)
    hub.repositories[NAME] = {"tiny.gguf": tiny_gguf}
    repository, pins, documents, words = read(hub)
    assert words[-1] == "Reading the header of tiny.gguf"
    assert hub.ranges == [min(size, len(tiny_gguf)) for size in head_bytes][: 2 if head_bytes[0] == 1_000 else 1]
    made = entry_of_repository(repository, pins, documents, ModelWishes(), None)
    known = documents["tiny.gguf"].metadata
    assert made.architecture.layer_count == known["llama.block_count"]
    assert made.architecture.vocabulary_size == len(known["tokenizer.ggml.tokens"])
    assert made.architecture.weight_bytes_of_files == len(tiny_gguf)
    assert made.engine_kinds == ("llamacpp",)
    assert made.context_length_tokens <= made.architecture.context_length_max_tokens
    assert "architecture" not in made.unchecked


@pytest.mark.parametrize(
    ("content", "head_bytes", "words"),
    [
        (b"GGUF" + b"\xff" * 5_000, (5_000, 8_000), "counts"),
        (b"PK" * 2_500, (5_000, 8_000), "does not begin as a GGUF does"),
        (None, (500, 1_000), "longer than 1000 bytes"),
    ],
)
def test_a_header_that_tells_nothing_is_said_and_the_file_served_all_the_same(hub, monkeypatch, tiny_gguf, content, head_bytes, words):
    monkeypatch.setattr(hub_module, "GGUF_HEAD_BYTES", head_bytes)
    hub.repositories[NAME] = {"odd.gguf": content or tiny_gguf}
    repository, pins, documents, _ = read(hub)
    made = entry_of_repository(repository, pins, documents, ModelWishes(), None)
    assert made.architecture is None
    assert words in made.unchecked


def test_a_hub_that_sends_whole_files_is_stopped_at_the_bound(hub: HubServer, monkeypatch, tiny_gguf: bytes):
    monkeypatch.setattr(hub_module, "GGUF_HEAD_BYTES", (1_000, 2_000))
    hub.ignores_ranges = True
    hub.repositories[NAME] = {"tiny.gguf": tiny_gguf}
    repository, pins, documents, _ = read(hub)
    assert (
        "sends more than the 1000 bytes that were asked for"
        in entry_of_repository(repository, pins, documents, ModelWishes(), None).unchecked
    )


def test_a_configuration_that_is_kept_by_its_hash_is_read_too(hub: HubServer):
    large = json.dumps(CONFIG | {"auto_map": {}, "filler": "x" * 2_000}).encode()
    hub.repositories[NAME]["tokenizer_config.json"] = large
    repository, pins, documents, _ = read(hub)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json has auto_map"):
        entry_of_repository(repository, pins, documents, ModelWishes(), None)


def test_python_is_not_looked_at_where_no_configuration_asks_for_it(hub: HubServer):
    hub.repositories[NAME]["modeling_tiny.py"] = b"import os"
    _, pins, _, _ = read(hub)
    assert not [pin for pin in pins if pin.file_name.endswith(".py")]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"repositories": {}}, ErrorCode.NOT_FOUND, "no such repository, revision or file"),
        ({"status": 500}, ErrorCode.COORDINATOR_UNAVAILABLE, "The hub refused with HTTP status 500"),
        ({"status": 403}, ErrorCode.COORDINATOR_UNAVAILABLE, "HTTP status 403"),
        # Not PERMISSION_DENIED, to which `potluck` would add where the operator's key lies: it is the hub that refuses.
        ({"status": 403, "error_code": "GatedRepo"}, ErrorCode.NOT_FOUND, "accept their terms at the hub, and set HF_TOKEN"),
    ],
)
def test_what_the_hub_refuses_is_said(hub: HubServer, change, code, words):
    for name, value in change.items():
        setattr(hub, name, value)
    with pytest.raises(PotluckError, match=words) as failure:
        read(hub)
    assert failure.value.code is code


def test_a_revision_that_is_not_there_is_said(hub: HubServer):
    with pytest.raises(PotluckError, match="no such repository, revision or file") as failure:
        read(hub, revision="v9")
    assert failure.value.code is ErrorCode.NOT_FOUND


def test_a_hub_that_is_away_is_said_with_the_way_out():
    with running_hub() as hub:
        url = hub.url
    with pytest.raises(PotluckError, match="HF_ENDPOINT") as failure:
        Hub(url, Event()).read(NAME, "main", None, lambda _: None)
    assert failure.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
    assert "The hub could not be reached" in failure.value.message
    assert failure.value.retry_after_seconds


def test_an_answer_that_is_somebody_elses_page_is_no_fault_of_the_callers(hub: HubServer, monkeypatch):
    monkeypatch.setattr(HubServer, "describe", lambda *_: b"<html>Please log in to this network</html>")
    with pytest.raises(PotluckError, match="could not be reached") as failure:
        read(hub)
    assert failure.value.code is ErrorCode.COORDINATOR_UNAVAILABLE


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config__json": b"{no json"}, r"config\.json is not JSON"),
        ({"model__safetensors__index__json": b'{"weight_map": []}'}, "does not say which file holds which weights"),
    ],
)
def test_nonsense_is_refused(hub: HubServer, files, words):
    hub.repositories[NAME] = folder(**files)
    with pytest.raises(ValueError, match=words):
        read(hub)


def test_a_file_longer_than_announced_is_refused(hub: HubServer):
    hub.lying_bytes = b"more"
    with pytest.raises(ValueError, match="more than the"):
        read(hub)


def test_a_small_file_that_is_none_is_not_fetched(hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.support.hub_server.LARGE_BYTES", SMALL_FILE_BYTES_MAX * 10)
    hub.repositories[NAME]["tokenizer.json"] = SMALL_FILE_BYTES_MAX + 1
    with pytest.raises(ValueError, match=r"tokenizer\.json has 33554433 bytes and no hash"):
        read(hub)
    assert not [path for path in hub.requests if path.endswith("/tokenizer.json")]


def test_reading_ends_when_it_is_to_stop(hub: HubServer):
    stop = Event()
    stop.set()
    with pytest.raises(PotluckError, match="took too long"):
        read(hub, stop=stop)


def test_a_description_without_end_is_not_read_to_its_end(hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("potluck_coordinator.directory.hub.DESCRIPTION_BYTES_MAX", 500)
    with pytest.raises(ValueError, match="more than the 500 bytes that a description may have"):
        read(hub)


def test_a_repository_of_more_files_than_any_model_has_is_refused(hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("potluck_coordinator.directory.hub.FILES_MAX", 4)
    with pytest.raises(ValueError, match="it has 5 files; up to 4 are looked at"):
        read(hub)


@pytest.mark.parametrize("sibling", [{"rfilename": 5}, {"rfilename": "a.json", "size": "many"}])
def test_a_list_of_files_that_makes_no_sense_is_the_hubs_fault(hub: HubServer, monkeypatch: pytest.MonkeyPatch, sibling):
    described = json.loads(hub.describe(NAME)) | {"siblings": [sibling]}
    monkeypatch.setattr(HubServer, "describe", lambda *_: json.dumps(described).encode())
    with pytest.raises(PotluckError, match="makes no sense") as failure:
        read(hub)
    assert failure.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
