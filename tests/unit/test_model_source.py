"""What this node will touch at all: names of several files, and what they count for on the disk."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_node.domain.model_source import FILES_MAX, check_model_file
from potluck_node.domain.plan import Fetch, LocalLimits, Refuse, plan
from potluck_protocol.values import DesiredEngine, DesiredState, ModelFile, ModelId, PinnedFile, ReplicaId


def pinned(name: str, mark: str = "a", size_bytes: int = 10) -> PinnedFile:
    return PinnedFile(name, mark * 64, size_bytes)


def model_of(*files: PinnedFile, source: str = "hf:org/name@main") -> ModelFile:
    first, *others = files
    return ModelFile(ModelId("m"), source, first.file_name, first.sha256, first.size_bytes, "", tuple(others))


def test_the_files_of_a_model_from_a_hub_may_be_called_as_they_are():
    names = ("config.json", "model-00001-of-00099.safetensors", "tokenizer.model", "merges.txt", "vocab.txt", "chat_template.jinja")
    check_model_file(model_of(*map(pinned, (*names, "original/config.json", "UD-Q4_K_XL/M-00001-of-00002.gguf", "vocab.json"))))


@pytest.mark.parametrize(
    "name",
    [
        *("modeling.py", "a.so", "a.bin", "a.pt", "a.pkl", "README.md", "LICENSE", "a.txt", "vocab.txt.py", "my-merges.txt", "a.jinja"),
        *("tokenizer.model.bin", "x-tokenizer.model", "a.JSON", "a.GGUF", "a.json.gz", "json", "tokenizer.model/a.py"),
    ],
)
def test_anything_that_could_be_code_is_no_file_of_a_model(name):
    with pytest.raises(ValueError, match="the formats that hold no code"):
        check_model_file(model_of(pinned("config.json"), pinned(name)))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a.json", "a.json"), "are one file on some disks"),
        (("a.json", "A.json"), "are one file on some disks"),
        (("sub/a.json", "Sub/a.json"), "are one file on some disks"),
        (("a.json", "a.json/b.json"), "lies in 'a.json', which is a file itself"),
        (("x/y/a.json", "X.json", "x/Y.json", "x/y.json/a.json"), "lies in 'x/Y.json', which is a file itself"),
        (("a.json", "../b.json"), "not a plain relative path"),
        (("a.json", "./b.json"), "not a plain relative path"),
        (("a.json", "c//b.json"), "not a plain relative path"),
    ],
)
def test_names_that_do_not_go_together_or_lead_elsewhere(names, words):
    with pytest.raises(ValueError, match=words):
        check_model_file(model_of(*map(pinned, names)))


def test_every_file_is_pinned_and_there_are_not_too_many():
    for wrong, words in ((replace(pinned("b.json"), sha256="a"), "not pinned"), (replace(pinned("b.json"), size_bytes=0), "no size")):
        with pytest.raises(ValueError, match=words):
            check_model_file(model_of(pinned("a.json"), wrong))
    files = [pinned(f"{number}.json") for number in range(FILES_MAX)]
    check_model_file(model_of(*files))
    with pytest.raises(ValueError, match="1001 files"):
        check_model_file(model_of(*files, pinned("more.json")))


def planned(budget_bytes: int, *models: ModelFile, kind: str = "scripted") -> list[type]:
    engines = tuple(DesiredEngine(ReplicaId(f"r{number}"), model, kind, 1, 256) for number, model in enumerate(models))
    limits = LocalLimits(frozenset({"scripted", "attach"}), disk_budget_bytes=budget_bytes)
    return [type(action) for action in plan(DesiredState(1, engines), {}, limits, 0.0).actions]


def test_the_disk_budget_counts_all_files_of_a_model_and_shared_ones_once():
    first = model_of(pinned("config.json", "a", 10), pinned("a.safetensors", "b", 80))
    second = model_of(pinned("config.json", "c", 10), pinned("a.safetensors", "b", 80))
    assert planned(89, first) == [Refuse]
    assert planned(90, first) == [Fetch]
    assert planned(99, first, second) == [Fetch, Refuse]
    assert planned(100, first, second) == [Fetch, Fetch]
    same_bytes_twice = model_of(pinned("a.json", "a", 60), pinned("b.json", "a", 60))
    assert planned(60, same_bytes_twice) == [Fetch]
    assert planned(1, replace(first, source="path:/models")) == [Fetch], "the owner's files are not the pool's"
    assert planned(1, ModelFile(ModelId("m"), "attach:m", "", "", 0), kind="attach") == [Fetch], "an attached engine has its own"
