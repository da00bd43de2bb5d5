"""Engines that live in Python environments of their own, which their owner names by its interpreter.

Decides whether an environment has an engine in it, and what to do where it has not. It must not import the engine, nor run its interpreter.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from potluck_protocol.errors import ErrorCode, PotluckError


@cache  # every status names the version
def installed_version(python: Path, package_pattern: str) -> str:
    """Of a package in an interpreter's environment, by its metadata; empty: there is none. The pattern is a regular expression."""
    metadata = re.compile(rf"(?:{package_pattern})-(?P<version>[^-]+)\.dist-info")
    folders = python.parent.parent.glob("lib*/python3*/site-packages/*.dist-info")
    found = [match["version"] for folder in folders if (match := metadata.fullmatch(folder.name))]
    return found[0] if found else ""


def not_installed(python: Path, name: str, requirement: str, setting: str) -> PotluckError:
    """That there is no such engine in the environment, and how to make one that has it."""
    folder = python.parent.parent
    return PotluckError(
        ErrorCode.INVALID_REQUEST,
        f"There is no {name} in the environment of {python}. To make one: "
        f"python3 -m venv {folder} && {folder}/bin/pip install {requirement}, then set {setting} to {folder}/bin/python.",
    )
