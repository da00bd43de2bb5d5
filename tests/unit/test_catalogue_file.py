"""Catalogue files: what is read, and what is refused with which words."""

from __future__ import annotations

import pytest

from potluck_coordinator.catalogue_file import built_in_catalogue, parse_catalogue, read_catalogue
from potluck_protocol.errors import ErrorCode, PotluckError

GOOD = """
[[model]]
model_id = "tiny"
source = "path:/srv/models"
file_name = "tiny.gguf"
sha256 = "{sha256}"
size_bytes = 10
engine_kind = "llamacpp"
context_length_tokens = 512
slot_count = 2
prompt_price_micro_credits = 1
completion_price_micro_credits = 2
licence = "MIT"
endpoints = ["/v1/chat/completions"]
created_at_unix_seconds = 1
""".format(sha256="a" * 64)


def test_the_built_in_catalogue_offers_a_model_that_needs_no_hub():
    (entry,) = built_in_catalogue()
    assert entry.model_id == "smollm2-135m-instruct"
    assert entry.file.source.startswith("wheel:")
    assert len(entry.file.sha256) == len(entry.file.source_sha256) == 64


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


def test_a_model_named_twice_is_refused():
    with pytest.raises(PotluckError, match="twice"):
        parse_catalogue(GOOD + GOOD, "mine.toml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PotluckError, match=r"absent\.toml"):
        read_catalogue(tmp_path / "absent.toml")
