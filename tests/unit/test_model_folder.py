"""What the files of a model may hold: examples, and properties for whatever bytes come."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_node.domain import gguf_header
from potluck_node.domain.model_folder import CODE_WORDS, Check, check_content, check_index, check_of, check_words
from potluck_node.domain.strict_json import DEPTH_MAX, NAME_SHOWN_CHARACTERS, BadModelError, parse
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_model_folder import good_files, safetensors, sentencepiece, with_header

GOOD = good_files()


def check(name: str, content: bytes) -> None:
    check_content(name, len(content), io.BytesIO(content).read, frozenset(GOOD))


def is_sound(name: str, content: bytes) -> bool:
    try:
        check(name, content)
    except BadModelError:
        return False
    return True


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


@pytest.mark.parametrize("name", sorted(GOOD))
def test_sound_files_are_sound(name):
    check(name, GOOD[name])


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.safetensors", Check.SAFETENSORS),
        ("a/b.gguf", Check.GGUF),
        ("tokenizer.json", Check.JSON),
        ("model.safetensors.index.json", Check.INDEX),
        ("tokenizer.model", Check.SENTENCEPIECE),
        ("sub/merges.txt", Check.TEXT),
        ("chat_template.jinja", Check.TEXT),
    ],
)
def test_a_files_name_says_how_it_is_checked(name, wanted):
    assert check_of(name) is wanted


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
# Hypothesis also tries words that stand in the code.
plain_values = json_values.filter(lambda value: not any(word in json.dumps(value) for word in (*CODE_WORDS, "_internal")))
words = st.sampled_from(sorted(CODE_WORDS)) | st.sampled_from(["_attn_implementation_internal", "any_internal"])
steps = st.lists(st.text(max_size=4) | st.none(), max_size=8)


def wrapped(value: Any, way: list[str | None], beside: Any) -> Any:
    for step in way:
        value = [beside, value] if step is None else {"x": beside, step: value}
    return value


@given(value=plain_values)
def test_a_json_without_a_word_for_code_is_sound(value):
    check_words("config.json", value)


@given(word=words, told=json_values, way=steps, beside=plain_values)
def test_a_word_for_code_is_found_wherever_it_stands_and_whatever_it_says(word, told, way, beside):
    with pytest.raises(BadModelError, match=f"it says '{word}'"):
        check_words("config.json", wrapped({word: told}, way, beside))


def test_a_token_may_be_called_as_a_word_for_code_and_only_a_token():
    tokens = {"auto_map": 7, "x_internal": 8}
    for name, value in (("vocab.json", tokens), ("added_tokens.json", tokens), ("tokenizer.json", {"model": {"vocab": tokens}})):
        check_words(name, value)
        with pytest.raises(BadModelError):
            check_words("config.json", value)
    for name, value in (
        ("vocab.json", {"a": tokens}),
        ("vocab.json", {"auto_map": True}),
        ("vocab.json", {"auto_map": {"a": "b"}}),
        ("tokenizer.json", tokens),
        ("tokenizer.json", {"model": tokens}),
        ("tokenizer.json", {"model": {"vocab": {"auto_map": "evil"}}}),
    ):
        with pytest.raises(BadModelError, match="'auto_map'"):
            check_words(name, value)


@pytest.mark.parametrize("choice", ["sdpa", "flash_attention_2", "eager", None, {"text_config": "sdpa", "vision_config": None}])
def test_kernels_that_an_engine_has_may_be_chosen(choice):
    check_words("config.json", {"attn_implementation": choice})


@pytest.mark.parametrize(
    "choice", ["evil/kernel", "kernels-community/x", "evil:x", "..", "", 1, True, ["sdpa"], {"text_config": "evil/kernel"}]
)
def test_kernels_from_elsewhere_may_not(choice):
    with pytest.raises(BadModelError, match="names a kernel that no engine has"):
        check_words("config.json", {"text_config": {"_attn_implementation": choice}})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"\xff", "it is not UTF-8"),
        (b"{", "it is no JSON"),
        (b"", "it is no JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "its JSON names 'c' twice in one object"),
        (b"[" * 100_000, f"its JSON is nested deeper than {DEPTH_MAX} levels"),
        (b"1" * 5000, "it is no JSON"),
        (b"\xef\xbb\xbf{}", "it is no JSON"),
    ],
)
def test_json_that_parsers_may_read_differently_or_not_at_all(text, reason):
    with pytest.raises(BadModelError, match=reason):
        parse(text)


def test_depth_is_bounded_where_the_parser_still_reads_it():
    deep: Any = 1
    for _ in range(DEPTH_MAX):
        deep = [deep]
    check_words("config.json", deep)
    with pytest.raises(BadModelError, match="nested deeper"):
        check_words("config.json", [deep])
    with pytest.raises(BadModelError, match="nested deeper"):
        check_words("config.json", {"a": deep})


def test_words_of_a_file_stand_in_a_reason_short_and_on_one_line():
    with pytest.raises(BadModelError) as caught:
        check("a.safetensors", with_header({"\n\x1b[31m" + "x" * 9999: 1}, b""))
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < NAME_SHOWN_CHARACTERS + 100


@pytest.mark.parametrize("named", ["b.safetensors", "../a.safetensors", "/a.safetensors", "", "sub/c.safetensors", 1, None])
def test_an_index_names_files_of_its_own_folder_only(named):
    pinned = frozenset({"a.safetensors", "sub/c.safetensors"})
    check_index("model.safetensors.index.json", {"weight_map": {"w": "a.safetensors"}}, pinned)
    check_index("sub/model.safetensors.index.json", {"weight_map": {"w": "c.safetensors"}}, pinned)
    with pytest.raises(BadModelError, match="which the catalogue does not pin"):
        check_index("model.safetensors.index.json", {"weight_map": {"v": "a.safetensors", "w": named}}, pinned)


@given(sizes=st.lists(st.integers(0, 40), max_size=6), extra=st.binary(min_size=1, max_size=9), cut=st.integers(1, 9))
def test_safetensors_are_sound_as_they_were_written_and_neither_longer_nor_shorter(sizes, extra, cut):
    whole = safetensors({f"t{number}": bytes(size) for number, size in enumerate(sizes)})
    check("a.safetensors", whole)
    assert not is_sound("a.safetensors", whole + extra)
    assert not is_sound("a.safetensors", whole[:-cut])


@given(
    spans=st.lists(st.tuples(st.integers(-2, 24), st.integers(-2, 24)), min_size=1, max_size=4),
    data_bytes=st.integers(0, 24),
)
def test_sound_tensors_cover_every_byte_once(spans, data_bytes):
    header = {f"t{at}": {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]} for at, (begin, end) in enumerate(spans)}
    covered = sorted(byte for begin, end in spans for byte in range(begin, end))
    sound = covered == list(range(data_bytes)) and all(0 <= begin <= end for begin, end in spans)
    # An empty tensor has no byte, and still has its place.
    places = sorted(spans)
    sound = sound and all(earlier[1] == later[0] for earlier, later in pairwise(places)) and places[0][0] == 0
    assert is_sound("a.safetensors", with_header(header, bytes(data_bytes))) is sound


def test_sizes_of_tensor_types_are_the_librarys():
    theirs = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert theirs == {kind: sizes for kind, sizes in gguf_header._TENSOR_BLOCKS.items() if kind in theirs}


def test_a_real_gguf_is_sound_and_no_beginning_of_it_is(tiny_gguf):
    check("tiny.gguf", tiny_gguf)
    for length in (*range(0, 3000, 41), len(tiny_gguf) - 40, len(tiny_gguf) - 4):
        assert not is_sound("tiny.gguf", tiny_gguf[:length])
    assert not is_sound("tiny.gguf", tiny_gguf + bytes(32))


@given(place=st.integers(0, 6000), bit=st.integers(0, 7), more=st.integers(0, 6000))
def test_a_bent_gguf_is_sound_or_refused_and_nothing_else_happens(tiny_gguf, place, bit, more):
    bent = bytearray(tiny_gguf)
    bent[place] ^= 1 << bit
    bent[more] ^= 1 << bit
    is_sound("tiny.gguf", bytes(bent))


NAMES = ("a.safetensors", "a.gguf", "config.json", "a.index.json", "tokenizer.model", "merges.txt")


@given(name=st.sampled_from(NAMES), content=st.binary(max_size=200), begin=st.sampled_from([b"", b"GGUF\x03\0\0\0", b'{"a":', b"\x0a\x02"]))
def test_any_bytes_are_sound_or_refused_and_nothing_else_happens(name, content, begin):
    is_sound(name, begin + content)


@given(pieces=st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=9), cut=st.integers(1, 3))
def test_a_sentencepiece_model_is_sound_whole_and_not_cut_short(pieces, cut):
    whole = sentencepiece(tuple(pieces))
    check("tokenizer.model", whole)
    # Two bytes are the description of the training, which need not be there.
    assert is_sound("tokenizer.model", whole[:-cut]) is (cut == 2)


def test_a_file_is_not_read_when_it_is_too_large_to_be_read_whole():
    def unread(_count: int) -> bytes:
        raise AssertionError("read")

    with pytest.raises(BadModelError, match="are the most for a file of its kind"):
        check_content("config.json", 2**40, unread, frozenset())


def test_a_header_longer_than_the_file_is_not_asked_for(tmp_path: Path):
    asked: list[int] = []

    def read(count: int) -> bytes:
        asked.append(count)
        return (2**62).to_bytes(8, "little")

    with pytest.raises(BadModelError, match="longer than the file"):
        check_content("a.safetensors", 1000, read, frozenset())
    assert asked == [8]
