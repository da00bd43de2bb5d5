"""What of a model's repository is served, and what is refused with which words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.domain.repository import (
    CONFIG,
    CONTEXT_TOKENS_DEFAULT,
    CONTEXT_TOKENS_UNKNOWN,
    WEIGHT_INDEX,
    ModelWishes,
    Repository,
    RepositoryFile,
    entry_of_repository,
    files_to_serve,
    holds_no_code,
    model_id_of,
    python_needed,
)
from potluck_protocol.values import ModelId, PinnedFile
from tests.support.replicas import catalogue_entry

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128},
}
REPOSITORY = Repository("Org/My-Model_7B", "c" * 40, (), "apache-2.0", 1_700_000_000, gated=False)
PINS = (PinnedFile("model.safetensors", "1" * 64, 5_000_000_000), PinnedFile("config.json", "2" * 64, 600))


def files(*names, size_bytes=10):
    return tuple(RepositoryFile(name, size_bytes) for name in names)


def chosen(*names, wanted=None, weight_map=None):
    return [file.name for file in files_to_serve(files(*names), wanted, weight_map)]


def entry(documents=None, wishes=None, offer=None, repository=REPOSITORY, pins=PINS):
    return entry_of_repository(repository, pins, {CONFIG: LLAMA} if documents is None else documents, wishes or ModelWishes(), offer)


def test_of_a_repository_of_safetensors_weights_json_and_tokenizer_are_taken_and_nothing_else():
    names = chosen(
        *("README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "merges.txt"),
        *(
            "modeling_evil.py",
            "pytorch_model.bin",
            "onnx/model.onnx",
            "original/model.safetensors",
            ".gitattributes",
            "chat_template.jinja",
        ),
    )
    assert names == [
        *("model.safetensors", "chat_template.jinja", "config.json", "generation_config.json", "merges.txt", "tokenizer.json"),
        "tokenizer.model",
    ]


def test_the_index_says_which_weights_are_meant():
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors", "c": "model-00001-of-00002.safetensors"}
    present = (*sorted(set(weight_map.values())), "consolidated.safetensors", "params.json", "config.json", WEIGHT_INDEX, "x.index.json")
    assert chosen(*present, weight_map=weight_map) == [*sorted(set(weight_map.values())), "config.json", WEIGHT_INDEX]
    with pytest.raises(ValueError, match=r"names model-00003-of-00003\.safetensors"):
        chosen(*present, weight_map={"a": "model-00003-of-00003.safetensors"})


def test_a_second_copy_of_the_weights_is_left_out():
    assert chosen("config.json", "consolidated.safetensors", "model.safetensors", "params.json") == ["model.safetensors", "config.json"]


def test_an_empty_file_is_none():
    present = (RepositoryFile("model.safetensors", 10), RepositoryFile("config.json", 10), RepositoryFile("merges.txt", 0))
    assert [file.name for file in files_to_serve(present, None, None)] == ["model.safetensors", "config.json"]


def test_one_gguf_file_is_taken_and_of_several_one_must_be_named():
    assert chosen("README.md", "tiny.Q4_K_M.gguf") == ["tiny.Q4_K_M.gguf"]
    with pytest.raises(ValueError, match=r"say which one with --file: a\.gguf, b\.gguf"):
        chosen("a.gguf", "b.gguf")
    assert chosen("a.gguf", "b.gguf", wanted="b.gguf") == ["b.gguf"]
    assert chosen("a.gguf", "model.safetensors", wanted="a.gguf") == ["a.gguf"]
    with pytest.raises(ValueError, match=r"has no GGUF file c\.gguf; it has a\.gguf, b\.gguf"):
        chosen("a.gguf", "b.gguf", wanted="c.gguf")


def test_a_gguf_file_in_parts_is_taken_whole():
    parts = [f"big-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    assert chosen(*parts) == parts
    assert chosen(*parts, "other.gguf", wanted=parts[1]) == parts
    with pytest.raises(ValueError, match=r"lacks big-00002-of-00003\.gguf"):
        chosen(parts[0], parts[2])


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("config.json", "pytorch_model.bin"), r"its weights are in pytorch_model\.bin, a format that may hold code"),
        (("README.md",), "has no safetensors or GGUF files"),
        (("model.safetensors",), r"has no config\.json"),
        (("sub/model.safetensors", "config.json"), "has no safetensors or GGUF files"),
    ],
)
def test_a_repository_with_nothing_to_serve_is_refused(names, reason):
    with pytest.raises(ValueError, match=reason):
        chosen(*names)


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("a.safetensors", True),
        ("sub/a.gguf", True),
        ("vocab.json", True),
        ("tokenizer.model", True),
        ("other.model", False),
        ("a.bin", False),
        ("a.py", False),
        ("a.txt", False),
        ("a.safetensors.py", False),
    ],
)
def test_formats(name, good):
    assert holds_no_code(name) == good


@pytest.mark.parametrize(
    ("documents", "place"),
    [
        ({CONFIG: {"auto_map": {"AutoModel": "modeling.Model"}}}, r"config\.json has auto_map"),
        ({CONFIG: {"text_config": {"auto_map": {}}}}, r"config\.json \(text_config\) has auto_map"),
        ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenizer.Own", None]}}}, r"tokenizer_config\.json has auto_map"),
        ({"processor_config.json": {"a": [{"auto_map": 1}]}}, r"processor_config\.json \(a\) has auto_map"),
    ],
)
def test_a_model_that_needs_python_of_its_own_is_refused(documents, place):
    with pytest.raises(ValueError, match=place):
        entry(documents)


def test_a_document_that_only_speaks_of_it_is_not():
    assert python_needed({CONFIG: {"text": "auto_map", "list": ["auto_map", 1, None]}, "other.json": ["auto_map"]}) == ""


def test_an_entry_says_what_the_repository_says():
    made = entry()
    assert (made.model_id, made.licence, made.created_at_unix_seconds) == ("my-model_7b", "apache-2.0", 1_700_000_000)
    assert made.file.source == f"hf:Org/My-Model_7B@{'c' * 40}"
    assert [pin.file_name for pin in made.file.files] == ["model.safetensors", "config.json"]
    assert (made.quantization, made.architecture.layer_count, made.architecture.weight_bytes_of_files) == ("awq", 32, 5_000_000_000)
    assert made.engine_kinds == ("vllm", "sglang")
    assert (made.context_length_tokens, made.unchecked, made.repository) == (CONTEXT_TOKENS_DEFAULT, "", "")


def test_what_the_operator_says_wins_over_the_offer_and_that_over_defaults():
    offer = replace(
        catalogue_entry("mine", engine_kinds=("vllm",), context_length_tokens=4096, slot_count=2, prompt_price_micro_credits=7),
        file=None,
        repository="hf:Org/My-Model_7B",
        unchecked="all",
    )
    made = entry(offer=offer)
    assert (made.model_id, made.context_length_tokens, made.slot_count, made.prompt_price_micro_credits) == ("mine", 4096, 2, 7)
    assert (made.engine_kinds, made.unchecked, made.repository) == (("vllm",), "", "")
    wishes = ModelWishes("own", None, 0, 9, ("sglang",), 1024, 3)
    said = entry(wishes=wishes, offer=offer)
    assert (said.model_id, said.file.model_id, said.engine_kinds) == (ModelId("own"), ModelId("own"), ("sglang",))
    assert (said.context_length_tokens, said.slot_count) == (1024, 3)
    assert (said.prompt_price_micro_credits, said.completion_price_micro_credits) == (0, 9)


def test_more_context_than_the_model_has_is_refused():
    with pytest.raises(ValueError, match="a context of 8192 tokens"):
        entry(wishes=ModelWishes(context_length_tokens=9000))


def test_what_cannot_be_known_is_said():
    gguf = (PinnedFile("tiny.gguf", "3" * 64, 100),)
    made = entry({}, pins=gguf, repository=replace(REPOSITORY, licence="", gated=True))
    assert (made.engine_kinds, made.architecture, made.context_length_tokens) == (("llamacpp",), None, CONTEXT_TOKENS_UNKNOWN)
    for words in ("its architecture", "its licence", "needs a token"):
        assert words in made.unchecked
    strange = entry({CONFIG: LLAMA | {"kv_lora_rank": 512}})
    assert strange.architecture is None
    assert "latent attention" in strange.unchecked


def test_a_repositorys_name_makes_a_model_id():
    assert model_id_of("Org/Some Model+v2.1_GGUF") == "some-model-v2.1_gguf"
    assert len(model_id_of("Org/" + "x" * 200)) == 96


@pytest.mark.parametrize(
    "pin",
    [
        PinnedFile("../model.safetensors", "1" * 64, 5),
        PinnedFile("-model.safetensors", "1" * 64, 5),
        PinnedFile("a b.safetensors", "1" * 64, 5),
        PinnedFile("model.safetensors\n", "1" * 64, 5),
        PinnedFile("model.py", "1" * 64, 5),
        PinnedFile("model.safetensors", "A" * 64, 5),
        PinnedFile("model.safetensors", "", 5),
        PinnedFile("model.safetensors", "1" * 64, 0),
        PINS[1],
    ],
    ids=["up", "an option", "a space", "a line end", "code", "capitals", "no hash", "empty", "twice"],
)
def test_the_hub_may_not_say_what_a_catalogue_file_may_not(pin):
    with pytest.raises(ValueError, match=r"no node takes|no good hash|twice"):
        entry(pins=(pin, PINS[1]))
