"""The rules of the command line that hold for every command there is: results for programs, words for whoever reads `--help`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.core import TyperGroup, TyperOption

from potluck.commands.root import build_app

WITHOUT_JSON = {
    "potluck up": "it runs until Ctrl-C, and what it tells is what to type next",
    "potluck demo": "a show for a person: it leaves nothing behind that a program could use",
    "potluck chat": "the answer is text, alone on standard output as it is written; programs ask by the SDK or HTTP",
    "potluck coordinator serve": "it runs until Ctrl-C; its log is JSON with --log-format json",
    "potluck node run": "it runs until Ctrl-C; its log is JSON with --log-format json",
}
"""Commands that have no result to print as JSON, and why."""


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Everything that does something when it is typed, a group that lists included."""
    if not isinstance(command, TyperGroup):
        yield path, command
        return
    if command.invoke_without_command and path != "potluck":
        yield path, command
    for name, sub_command in command.commands.items():
        yield from commands(sub_command, f"{path} {name}")


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    return dict(commands(typer.main.get_command(build_app(None)), "potluck"))


def test_every_command_with_a_result_prints_it_as_json_too(tree):
    without = {name for name, command in tree.items() if not any("--json" in option.opts for option in command.params)}

    assert len(tree) > 35
    assert without == set(WITHOUT_JSON)


def test_every_command_and_every_option_says_what_it_is_for(tree):
    silent = [name for name, command in tree.items() if not command.help]
    silent += [
        f"{name} {option.opts[0]}"
        for name, command in tree.items()
        for option in command.params
        if isinstance(option, TyperOption) and not option.help
    ]

    assert not silent
