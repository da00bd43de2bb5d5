"""What is never stored: an entry that could not be told, listed, planned for, or handed to a node."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck_coordinator.catalogue_file import built_in_catalogue, parse_catalogue
from potluck_coordinator.desks import ModelRecord
from potluck_coordinator.domain.catalogue import CatalogueEntry
from potluck_coordinator.domain.entry_rules import FILE_BYTES_MAX, FILES_MAX, MODELS_MAX, WORD_CHARACTERS_MAX, entry_refusal
from potluck_coordinator.domain.fit.architecture import Quantization
from potluck_coordinator.gateway import inference_servicer
from potluck_coordinator.gateway.catalogue_messages import model_message
from potluck_coordinator.gateway.requests import ModelView
from potluck_coordinator.storage.catalogue import Origin
from potluck_node.domain.model_source import AttachedSource, check_model_file, parse_source
from potluck_protocol.channels import MESSAGE_BYTES_MAX
from potluck_protocol.errors import PotluckError
from potluck_protocol.values import Endpoint, ModelFile, ModelId, PinnedFile
from tests.support.catalogue_text import model_text
from tests.support.planning import ARCHITECTURES, card_entry

GOOD = card_entry("8b")
SHA = "0" * 64
COMMIT = "c" * 40


def of_files(*names: str, source: str = f"hf:org/name@{COMMIT}", size_bytes: int = 10) -> CatalogueEntry:
    first, *further = (PinnedFile(name, SHA, size_bytes) for name in names)
    file = ModelFile(ModelId("8b"), source, first.file_name, SHA, size_bytes, further_files=tuple(further))
    return replace(GOOD, file=file)


def from_source(source: str) -> CatalogueEntry:
    return of_files("model.safetensors", source=source)


def attached(name: str) -> CatalogueEntry:
    return replace(GOOD, file=ModelFile(ModelId("8b"), f"attach:{name}", "", "", 0), engine_kinds=("attach",))


def made_of(**numbers: Any) -> CatalogueEntry:
    return replace(GOOD, architecture=replace(ARCHITECTURES["8b"], **numbers))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (replace(GOOD, licence="MIT\x1b[2J"), "licence holds control characters"),
        (replace(GOOD, licence="a\ud800"), "licence holds control characters"),
        (replace(GOOD, licence="x" * 9_000_000), "licence has 9000000 characters"),
        (replace(GOOD, unchecked="x" * (WORD_CHARACTERS_MAX + 1)), "unchecked has 1001 characters"),
        (replace(GOOD, quantization="x" * 5000), "quantization has 5000 characters"),
        (replace(GOOD, engine_kinds=("vllm", "vllm")), "different words"),
        (replace(GOOD, engine_kinds=("",)), "different words"),
        (replace(GOOD, engine_kinds=("vl lm; rm -rf /",)), "different words"),
        (replace(GOOD, engine_kinds=tuple(f"e{number}" for number in range(9))), "up to 8"),
        (replace(GOOD, endpoints=(Endpoint.COMPLETIONS, Endpoint.COMPLETIONS)), "an endpoint twice"),
        (made_of(model_id="\x1b[2J"), "model_id holds control characters"),
        (made_of(quantization=Quantization("a\nb", 4)), "name holds control characters"),
        (from_source(f"hf:a/b/c@{COMMIT}"), "its source must be"),
        (from_source(f"hf:a b/c@{COMMIT}"), "its source must be"),
        (from_source(f"hf:../..@{COMMIT}"), "its source must be"),
        (from_source(f"hf:org/name.@{COMMIT}"), "its source must be"),
        (from_source(f"hf:org@{COMMIT}"), "its source must be"),
        (from_source("hf:org/name@main"), "its source must be"),
        (from_source("wheel:-x-==1"), "its source must be"),
        (from_source("wheel:x==-1"), "its source must be"),
        (from_source("path:/../../etc"), "its source must be"),
        (from_source("path:/"), "its source must be"),
        (from_source("http://org/name"), "its source must be"),
        (from_source("path:/srv/a\u00a0b"), "its source must be"),
        (attached("a\u202eb"), "its source holds control characters"),
        (from_source("attach:x"), "has no files"),
        (attached(""), "its source must be attach:NAME"),
        (attached("x" * 201), "1 to 200 characters"),
        (attached("a\u00a0b"), "characters that can be printed"),
        (replace(GOOD, file=replace(GOOD.file, source_sha256="zz")), "source_sha256 is not 64"),
        (of_files(*(f"{number}.safetensors" for number in range(FILES_MAX + 1))), "it has 1001 files"),
        (of_files("a" * 250 + ".safetensors"), "a file name has 262 characters"),
        (of_files("model.safetensors", size_bytes=1 << 63), "model.safetensors has 9223372036854775808 bytes"),
        (of_files("model.safetensors", size_bytes=FILE_BYTES_MAX + 1), "are the most"),
        (of_files("model.safetensors", size_bytes=0), "model.safetensors has 0 bytes, and a file that a node fetches has one at least"),
        (of_files("a.safetensors", "A.safetensors"), "are one file on some disks"),
        (of_files("a.json", "a.json/b.safetensors"), "which is a file itself"),
        (of_files("config.json"), "vllm reads safetensors files, and it has none"),
        (of_files("model.gguf"), "and it has gguf; add it anew with --engine llamacpp"),
    ],
)
def test_what_breaks_something_later_is_refused_with_the_reason(entry, reason):
    assert reason in entry_refusal(entry)


def test_what_ships_and_what_the_tests_serve_is_good():
    assert [entry_refusal(entry) for entry in (*built_in_catalogue(), GOOD)] == [""] * (len(built_in_catalogue()) + 1)


@pytest.mark.parametrize(
    "name",
    ["./models/a.gguf", "/models//a.gguf", "../a.gguf", "C:\\models\\a.gguf", "qwen2.5:7b", "hf.co/org/x:Q4", "my model", "-é", "x" * 200],
)
def test_an_attached_server_may_call_its_model_as_it_likes_and_the_node_agrees(name: str) -> None:
    entry = attached(name)
    assert not entry_refusal(entry)
    check_model_file(entry.file)
    assert AttachedSource(name) == parse_source(entry.file.source)


def test_a_licence_may_have_blanks_that_do_not_break() -> None:
    assert not entry_refusal(replace(GOOD, licence="Llama\u00a03.3\u202fCommunity"))
    assert "invisible ones" in entry_refusal(replace(GOOD, licence="Llama\u200b3"))


def test_a_texts_entry_goes_by_the_same_rules():
    with pytest.raises(PotluckError, match="tiny is not a good entry: its licence has 5000 characters, and 1000 are the most"):
        parse_catalogue(model_text().replace("MIT", "x" * 5000), "mine.toml")


@pytest.mark.parametrize("where", ["colour = 1", 'quantization = {name = "awq", bits_per_weight = 4, colour = 1}'])
def test_a_word_that_an_architecture_does_not_have_is_not_passed_over(where):
    sizes = "layer_count = 2, hidden_size = 64, attention_head_count = 4, kv_head_count = 2, head_dim = 16, intermediate_size = 128"
    more = f'vocabulary_size = 99, context_length_max_tokens = 512, model_id = "x", {where}'
    with pytest.raises(PotluckError, match="an architecture has no colour"):
        parse_catalogue(f"{model_text()}architecture = {{{sizes}, {more}}}", "mine.toml")


SEGMENTS = st.sampled_from(["a", "A", "b.json", "a.json", "model", "..", ".", "", "x" * 120, "é", "a b", "_", "config.json"])
NAMES = st.builds(
    lambda parts, ending: "/".join(parts) + ending, st.lists(SEGMENTS, max_size=4), st.sampled_from([".safetensors", ".json"])
)
SOURCES = st.one_of(
    st.builds(
        "{}{}@{}".format,
        st.just("hf:"),
        st.text("aZ0._-/ :", max_size=8),
        st.sampled_from([COMMIT, "main", "", "C" * 40]),
    ),
    st.builds("wheel:{}=={}".format, st.text("aZ0._-", max_size=5), st.text("a0.!+_- ", max_size=5)),
    st.builds("path:{}".format, st.text("a/. \x1b", max_size=8)),
    st.builds("attach:{}".format, st.text(max_size=8)),
    st.sampled_from([f"hf:org/name@{COMMIT}", "wheel:x==1", "path:/srv/models", "git:x", ""]),
)
WORDS = st.one_of(st.text(max_size=8), st.sampled_from(["Llama\u00a03", "x" * 1000, "x" * 1001, "\ud800", "awq"]))


@st.composite
def entries(draw: st.DrawFn) -> CatalogueEntry:
    """What a text or a repository may come to: good but for one or two of its parts, which may be anything."""
    wild = draw(st.sets(st.sampled_from(["names", "sizes", "source", "words", "kinds"]), max_size=2))
    names = draw(st.lists(NAMES, min_size=1, max_size=4)) if "names" in wild else ["config.json", "model.safetensors"]
    sizes = st.sampled_from([-1, 0, 1, FILE_BYTES_MAX, 1 << 63] if "sizes" in wild else [1, FILE_BYTES_MAX])
    pins = [PinnedFile(name, SHA, draw(sizes)) for name in names]
    source = draw(SOURCES) if "source" in wild else f"hf:org/name@{COMMIT}"
    source_sha256 = draw(st.sampled_from(["", SHA, "z"])) if "source" in wild else ""
    words = WORDS if "words" in wild else st.just("awq")
    return replace(
        GOOD,
        file=ModelFile(ModelId("8b"), source, pins[0].file_name, SHA, pins[0].size_bytes, source_sha256, tuple(pins[1:])),
        licence=draw(words),
        unchecked=draw(words),
        quantization=draw(words),
        engine_kinds=draw(st.sampled_from([("vllm", "sglang"), ("",), ("mine",), ("vllm",) * 2])) if "kinds" in wild else ("vllm",),
        architecture=draw(st.sampled_from([None, ARCHITECTURES["8b"]])),
    )


@given(entries())
@settings(max_examples=200)
def test_what_is_kept_comes_back_is_told_and_is_taken_by_a_node(entry):
    if entry_refusal(entry):
        return
    assert msgspec.json.decode(msgspec.json.encode(entry), type=CatalogueEntry) == entry
    message = model_message(ModelRecord(entry, Origin.ADDED, None))
    assert len(message.SerializeToString()) < MESSAGE_BYTES_MAX / 4
    check_model_file(entry.file)


def test_a_whole_catalogue_of_the_longest_entries_is_told_in_one_message():
    entry = replace(GOOD, licence="\U0001f372" * WORD_CHARACTERS_MAX, model_id=ModelId("x" * 96), repository="x" * WORD_CHARACTERS_MAX)
    assert not entry_refusal(entry)
    assert MODELS_MAX * inference_servicer._model_message(ModelView(entry, 10_000)).ByteSize() < MESSAGE_BYTES_MAX
