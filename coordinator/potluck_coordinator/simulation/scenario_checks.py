"""Which scenarios cannot be, though each of their values could.

Decides by values beside each other, for files and for what a sweep makes of them, before any world begins. What one value may be alone
`scenario_file` decides. It must not know how a world runs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from potluck_coordinator.simulation.homes import read_trace
from potluck_coordinator.simulation.scenario import Scenario, Users
from potluck_protocol.errors import ErrorCode, PotluckError

NODES_MAX: Final = 100_000
HOURS_MAX: Final = 24 * 28
NAME_CHARACTERS_MAX: Final = 100
NAME: Final = re.compile(r"[^\W_][\w.-]*")
"""Plots are files of that name, and a hidden one would not be found."""


def refuse_impossible(scenario: Scenario, place: str) -> None:
    """Goes through all that values have to do with each other.

    Args:
        scenario: with its traces where they can be opened.
        place: the file, or the sweep, that says so.

    Raises:
        PotluckError: INVALID_REQUEST; what cannot be, by its place and key.
    """
    if not NAME.fullmatch(scenario.name) or len(scenario.name) > NAME_CHARACTERS_MAX:
        words = f"up to {NAME_CHARACTERS_MAX} letters, digits, dots, dashes and underscores, of which the first is a letter or digit"
        raise _error(f"{place}: name is {words}, not {scenario.name[:NAME_CHARACTERS_MAX]!r}.")
    if not scenario.nodes or not scenario.users:
        raise _error(f"{place}: a scenario has at least one [[nodes]] and one [[users]].")
    if sum(node_class.count for node_class in scenario.nodes) > NODES_MAX or scenario.hours > HOURS_MAX:
        raise _error(f"{place}: a world has up to {NODES_MAX} nodes and {HOURS_MAX} hours.")
    for kind, names in (("nodes", [one.name for one in scenario.nodes]), ("users", [one.name for one in scenario.users])):
        if len(set(names)) < len(names):
            raise _error(f"{place}: every entry of [[{kind}]] has a name of its own.")
    if scenario.warm_up_seconds >= scenario.seconds:
        raise _error(f"{place}: warm_up_seconds is {scenario.warm_up_seconds:g}, and the scenario lasts {scenario.seconds:g} s.")
    for users in scenario.users:
        _refuse_users(users, scenario, place)
    for node_class in scenario.nodes:
        if node_class.churn.trace:
            read_trace(Path(node_class.churn.trace), node_class.count)


def _refuse_users(users: Users, scenario: Scenario, place: str) -> None:
    if sum(rate > 0 for rate in (users.requests_per_second, users.sessions_per_hour, users.people)) != 1:
        raise _error(f"{place}: users {users.name!r} need one of requests_per_second, sessions_per_hour and people.")
    if (mean := users.shared_prefix_tokens + users.prompt_tokens) >= (room := scenario.request_tokens_max):
        words = f"prompts of {mean:g} tokens in the mean, and no node has a context and a cache (kv_tokens) for more than {room}"
        raise _error(f"{place}: users {users.name!r} send {words}.")


def _error(words: str) -> PotluckError:
    return PotluckError(ErrorCode.INVALID_REQUEST, words)
