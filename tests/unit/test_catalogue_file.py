"""Catalogue files: what is read, and what is refused with which words."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from potluck_coordinator.catalogue_file import built_in_catalogue, parse_catalogue, read_catalogue
from potluck_coordinator.domain.planning.node_kinds import whole_room
from potluck_coordinator.domain.planning.sizing import Misfit, Sizer
from potluck_coordinator.domain.planning.words import Sizing
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import ModelFile
from tests.support.catalogue_text import model_text
from tests.support.planning import node

GOOD = model_text()


def test_the_built_in_catalogue_pins_one_model_that_needs_no_hub():
    (entry,) = [entry for entry in built_in_catalogue() if entry.file is not None]
    assert entry.model_id == "smollm2-135m-instruct"
    assert entry.file.source.startswith("wheel:")
    assert len(entry.file.sha256) == len(entry.file.source_sha256) == 64
    assert entry.architecture.weight_bytes_of_files == entry.file.size_bytes


def test_the_other_built_in_models_claim_nothing_that_nobody_checked():
    offers = [entry for entry in built_in_catalogue() if entry.file is None]
    assert len(offers) >= 10
    for entry in offers:
        assert entry.repository.startswith("hf:"), entry
        assert "hashes" in entry.unchecked, entry
        assert entry.architecture is not None, entry
        assert not entry.quantization or entry.architecture.quantization.name == entry.quantization


@pytest.mark.parametrize(
    ("model_id", "card_count"),
    [
        ("mistral-7b-instruct-v0.3", 1),
        ("llama-2-13b-chat-gptq", 1),
        ("llama-3-8b-instruct-awq", 1),
        ("llama-3-70b-instruct-awq", 2),
        ("qwen2.5-32b-instruct-awq", 1),
        ("qwen2.5-coder-32b-instruct-awq", 1),
        ("mixtral-8x22b-instruct-v0.1-awq", 4),
        ("deepseek-r1-distill-llama-70b-awq", 2),
        ("qwen3-4b-awq", 1),
        ("qwen3-8b-awq", 1),
        ("gpt-oss-20b", 1),
    ],
)
def test_every_offer_fits_as_many_rtx_3090_as_its_comment_says_and_no_fewer(model_id, card_count):
    (offer,) = [entry for entry in built_in_catalogue() if entry.model_id == model_id]
    weight_bytes = int(offer.architecture.weight_bytes)
    entry = replace(offer, file=ModelFile(offer.model_id, f"hf:org/name@{'a' * 40}", "model.safetensors", "0" * 64, weight_bytes))
    sizer = Sizer()

    def sized(count):
        box = node("box", cards=count)
        return sizer.size(entry, sizer.kind_of(box), whole_room(box.inventory))

    assert isinstance(sized(card_count), Sizing)
    assert sized(card_count).slot_count >= 1
    assert card_count == 1 or isinstance(sized(card_count // 2), Misfit)


def test_a_good_file_is_read(tmp_path):
    path = tmp_path / "catalogue.toml"
    path.write_text(GOOD)
    (entry,) = read_catalogue(path)
    assert (entry.model_id, entry.slot_count, entry.file.size_bytes) == ("tiny", 2, 10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("[[model]]", "[[model"), "not a good catalogue"),
        (("slot_count = 2", "slot_count = 0"), "slot_count"),
        (("slot_count = 2", ""), "slot_count"),
        (("slot_count = 2", "slots = 2"), "slots"),
        (('"tiny.gguf"', '"../tiny.gguf"'), "file_name"),
        (("path:/srv", "http://srv"), "source"),
        (('"/v1/chat/completions"', '"/v1/admin"'), "endpoints"),
        (("a" * 64, "a" * 63), "sha256"),
    ],
)
def test_what_is_wrong_is_named(change, words):
    with pytest.raises(PotluckError) as failure:
        parse_catalogue(GOOD.replace(*change), "mine.toml")
    assert failure.value.code is ErrorCode.INVALID_REQUEST
    assert words in failure.value.message
    assert "mine.toml" in failure.value.message


@pytest.mark.timed
@pytest.mark.parametrize("part", ["a", '"a.b"', "'='", '"\\""', "a "])
def test_a_key_of_so_many_parts_that_the_parser_would_take_minutes_is_refused_at_once(part):
    began = time.process_time()
    with pytest.raises(PotluckError, match="more than 16 parts"):
        parse_catalogue(GOOD + ".".join([part] * 40_000) + " = 1", "mine.toml")
    assert time.process_time() - began < 2


def test_all_that_an_entry_lacks_is_named_at_once():
    with pytest.raises(PotluckError, match=r"the entry ours lacks context_length_tokens, slot_count, .*, created_at_unix_seconds"):
        parse_catalogue('[[model]]\nmodel_id = "ours"\nsource = "attach:ours"\nengine_kind = "attach"', "it")


def test_dots_in_texts_are_no_keys():
    text = "0.1.2" + ".x" * 40
    for licence in (f'"{text}"', f"'{text}'", f'"""{text}\n{text}"""', f'"MIT" # {text}'):
        (entry,) = parse_catalogue(GOOD.replace('"MIT"', licence).replace("\n0.1", " 0.1"), "mine.toml")
        assert entry.licence.startswith(("0.1.2.x", "MIT"))


def test_an_engine_that_reads_other_files_is_refused_and_the_right_one_named():
    with pytest.raises(PotluckError, match="vllm reads safetensors files, and it has gguf; add it anew with --engine llamacpp"):
        parse_catalogue(GOOD.replace("llamacpp", "vllm"), "mine.toml")
    with pytest.raises(
        PotluckError, match="llamacpp reads gguf files, and it has safetensors; add it anew with --engine vllm --engine sglang"
    ):
        parse_catalogue(GOOD.replace("tiny.gguf", "tiny.safetensors"), "mine.toml")


def test_words_that_would_act_on_a_terminal_are_refused():
    with pytest.raises(PotluckError, match="control characters"):
        parse_catalogue(GOOD.replace('"MIT"', '"MIT\\u001b[2J"'), "mine.toml")


@pytest.mark.parametrize("text", ["", "model = []", "# nothing yet\n"])
def test_a_text_without_a_model_is_no_catalogue(text):
    with pytest.raises(PotluckError, match=r"mine\.toml is not a good catalogue: it has no \[\[model\]\]"):
        parse_catalogue(text, "mine.toml")


def test_a_model_named_twice_is_refused():
    with pytest.raises(PotluckError, match="twice"):
        parse_catalogue(GOOD + GOOD, "mine.toml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PotluckError, match=r"absent\.toml"):
        read_catalogue(tmp_path / "absent.toml")


def changed(**words):
    """The good file with some lines replaced; None drops a line."""
    lines = [line for line in GOOD.splitlines() if line.partition(" = ")[0] not in words]
    return "\n".join([*lines, *(f"{name} = {word}" for name, word in words.items() if word is not None)])


SEVERAL = {"file_name": None, "sha256": None, "size_bytes": None}


def test_several_files_are_pinned_in_their_order():
    pins = ", ".join(
        f'{{name = "{name}", sha256 = "{"ab"[number] * 64}", size_bytes = {5 + number}}}'
        for number, name in enumerate(("x.gguf", "y.json"))
    )
    (entry,) = parse_catalogue(changed(**SEVERAL, files=f"[{pins}]"), "mine.toml")
    assert [file.file_name for file in entry.file.files] == ["x.gguf", "y.json"]
    assert entry.file.total_bytes == 11


def test_engine_kinds_are_in_the_order_of_preference():
    (entry,) = parse_catalogue(changed(engine_kind=None, engine_kinds='["mine", "llamacpp"]'), "mine.toml")
    assert entry.engine_kinds == ("mine", "llamacpp")


def test_a_model_of_owners_own_engines_has_a_name_and_no_files():
    (entry,) = parse_catalogue(changed(**SEVERAL, source='"attach:llama3.2:3b"', engine_kind='"attach"'), "mine.toml")
    assert entry.attached_name == "llama3.2:3b"
    assert entry.file.files[0].sha256 == ""


@pytest.mark.parametrize(
    "words",
    [
        {"context_length_tokens": "9_000_000_000"},
        {"created_at_unix_seconds": "99_999_999_999_999"},
        {"created_at_unix_seconds": "-1"},
        {"size_bytes": str(1 << 60)},
    ],
)
def test_a_number_that_the_pool_could_not_tell_its_nodes_is_refused(words):
    with pytest.raises(PotluckError, match="is not a good catalogue"):
        parse_catalogue(changed(**words), "mine.toml")


def test_an_architecture_is_named_or_written_out():
    (named,) = parse_catalogue(changed(architecture='"smollm2-135m-instruct"'), "mine.toml")
    assert named.architecture.layer_count == 30
    words = "layer_count = 2, hidden_size = 64, attention_head_count = 4, kv_head_count = 2, head_dim = 16, intermediate_size = 128"
    more = 'vocabulary_size = 99, context_length_max_tokens = 512, model_id = "x"'
    (written,) = parse_catalogue(changed(architecture=f"{{{words}, {more}}}"), "mine.toml")
    assert written.architecture.kv_head_count == 2
    for nonsense in ("kv_dtype_bytes = nan", "kv_dtype_bytes = inf", "kv_dtype_bytes = 0.0", "dtype_bytes = 1000000000"):
        with pytest.raises(PotluckError, match="tiny is not a good entry"):
            parse_catalogue(changed(architecture=f"{{{words}, {more}, {nonsense}}}"), "mine.toml")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({**SEVERAL}, "it has no files"),
        ({"file_name": '"tiny.bin"'}, r"tiny\.bin: only safetensors"),
        ({"size_bytes": None}, "one file is pinned by file_name, sha256 and size_bytes"),
        ({"engine_kind": None}, "it needs engine_kinds"),
        ({"engine_kinds": '["vllm"]'}, "it needs engine_kinds"),
        ({"engine_kind": '"attach"'}, "go together"),
        ({"source": '"attach:x"'}, "go together"),
        ({"source": '"attach:x"', "engine_kind": '"attach"'}, "has no files"),
        ({"source": '"hf:org/name@main"'}, "its source must be"),
        ({**SEVERAL, "pinned": "false", "source": '"hf:org/name"'}, "must say in `unchecked`"),
        ({"pinned": "false", "source": '"hf:org/name"', "unchecked": '"all"'}, "has no files"),
        ({**SEVERAL, "pinned": "false", "source": '"hf:org/name@main"', "unchecked": '"all"'}, "without a revision"),
        ({"architecture": '"no-such-model"'}, "no architecture is known as no-such-model"),
        ({"architecture": '"smollm2-135m-instruct"', "context_length_tokens": "100_000"}, "longer than the model's"),
    ],
)
def test_words_that_do_not_go_together_are_named(words, reason):
    with pytest.raises(PotluckError, match=reason) as failure:
        parse_catalogue(changed(**words), "mine.toml")
    assert "mine.toml: tiny is not a good entry" in failure.value.message
