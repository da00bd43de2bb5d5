"""Scenarios as people write them: TOML, by the words of `scenario`.

Decides what a file may say; an error names the key, what stands there and what may. It must not know what the words do.
"""

from __future__ import annotations

import math
import re
import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from difflib import get_close_matches
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, get_args, get_origin, get_type_hints

from potluck_coordinator.simulation.policies import NAMES
from potluck_coordinator.simulation.scenario import Scenario
from potluck_coordinator.simulation.scenario_checks import NAME_CHARACTERS_MAX, refuse_impossible
from potluck_protocol.errors import ErrorCode, PotluckError

FOLDER: Final = "scenarios"
HOURS_OF_DAY: Final = 24
NUMBER_MAX: Final = 1e12
"""Of every value, with its sign: thirty thousand years in seconds. What is computed from larger ones overflows."""
SHOWN_CHARACTERS_MAX: Final = 80
"""Of a wrong value, in the words that refuse it."""
LONG_NUMBER: Final = re.compile(r"[0-9_]{1000}")
"""To find the line by; Python itself reads up to 4300 digits."""
TIERS: Final = ("flex", "default")
MAY_BE_BELOW_ZERO: Final = frozenset({"ambient_celsius"})
ABOVE_ZERO: Final = frozenset({
    *("hours", "count", "prefill_tokens_per_second", "step_seconds", "kv_tokens", "batch_max", "prefill_chunk_tokens", "slot_count"),
    *("context_tokens", "celsius_per_watt", "time_constant_seconds", "case_time_constant_seconds", "full_watts", "upload_mbit"),
    *("account_count", "prompt_tokens", "answer_tokens", "answer_tokens_max", "weight", "heat_step_seconds", "first_token_seconds"),
    *("token_seconds", "away_hours", "think_seconds", "turns_mean", "freeze_seconds", "cut_seconds", "slow_seconds", "slow_share"),
    *("patience_seconds", "away_seconds"),
})  # fmt: skip


def scenario_names() -> tuple[str, ...]:
    """Those that come with the package."""
    return tuple(sorted(path.name.removesuffix(".toml") for path in _folder().iterdir() if path.name.endswith(".toml")))


def load_scenario(name_or_path: str) -> Scenario:
    """One of those, or a file's.

    Raises:
        PotluckError: INVALID_REQUEST; there is none, or it says what no scenario can, by its key.
    """
    if name_or_path in scenario_names():
        text, place, base = (_folder() / f"{name_or_path}.toml").read_text(), name_or_path, None
    else:
        path = Path(name_or_path)
        try:
            if not path.is_file():
                known = ", ".join(scenario_names())
                raise _error(f"There is no scenario {name_or_path!r}, and no such file. Those that come with Potluck: {known}.")
            text, place, base = path.read_text(), str(path), path.parent
        except (OSError, UnicodeDecodeError) as error:
            raise _error(f"{path} cannot be read: {error}.") from error
    return parse_scenario(_table(text, place), place, base)


def parse_scenario(table: Mapping[str, Any], place: str, base: Path | None = None) -> Scenario:
    """A scenario from TOML's values; a trace is looked for beside `base`, and without a name it has that of its file."""
    table = {"name": _name_of_file(place), "about": "", **table}
    scenario: Scenario = _record(Scenario, table, place, "")
    if base is not None:
        scenario = replace(scenario, nodes=tuple(_with_trace(node_class, base) for node_class in scenario.nodes))
    refuse_impossible(scenario, place)
    return scenario


def with_value(scenario: Scenario, key: str, text: str) -> Scenario:
    """The scenario with one value changed, as `--sweep` says it; whether it still fits the others is for `refuse_impossible` to say.

    Args:
        scenario: before.
        key: "hours", "faults.deaths_per_hour", "users.0.requests_per_second" or "users.NAME.requests_per_second".
        text: the value, as TOML has it; words need no quotes.

    Raises:
        PotluckError: INVALID_REQUEST; there is no such key, or no such value for it.
    """
    changed: Scenario = _changed(scenario, key.split("."), text, key)
    return changed


def _changed(value: Any, path: list[str], text: str, key: str) -> Any:
    if not path:
        raise _error(f"{key} is {'a table; name one of its values' if is_dataclass(value) else 'in a list, which only a file changes'}.")
    head, rest = path[0], path[1:]
    if isinstance(value, tuple):
        number = next((place for place, one in enumerate(value) if getattr(one, "name", None) == head or str(place) == head), None)
        if number is None:
            raise _error(f"{key}: there is no {head!r} among {', '.join(getattr(one, 'name', '?') for one in value)}.")
        return (*value[:number], _changed(value[number], rest, text, key), *value[number + 1 :])
    if isinstance(value, str | int | float):
        raise _error(f"{key}: what stands before .{'.'.join(path)} is a value, and has no others below it.")
    known = {each.name: each for each in fields(value)}
    if head not in known:
        raise _error(f"{key}: there is no {head!r}{_nearest(head, known)}.")
    current = getattr(value, head)
    if rest or is_dataclass(current):
        return replace(value, **{head: _changed(current, rest, text, key)})
    try:
        told = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        told = text
    return replace(value, **{head: _value(get_type_hints(type(value))[head], told, head, "--sweep", key)})


def _record(kind: type[Any], table: Any, place: str, key: str) -> Any:
    if not isinstance(table, Mapping):
        raise _error(f"{place}: {key} is a table, not {_shown(table)}.")
    known: dict[str, Field[Any]] = {each.name: each for each in fields(kind)}
    for name in table:
        if name not in known:
            raise _error(f"{place}: there is no key {_joined(key, name)}{_nearest(name, known)}.")
    hints = get_type_hints(kind)
    missing = [name for name, each in known.items() if each.default is MISSING and each.default_factory is MISSING and name not in table]
    if missing:
        raise _error(f"{place}: {_joined(key, missing[0])} is missing.")
    return kind(**{name: _value(hints[name], value, name, place, _joined(key, name)) for name, value in table.items()})


def _value(kind: Any, value: Any, name: str, place: str, key: str) -> Any:
    if get_origin(kind) is tuple:
        return _values(get_args(kind)[0], value, name, place, key)
    if is_dataclass(kind):
        assert isinstance(kind, type)
        return _record(kind, value, place, key)
    if isinstance(kind, types.GenericAlias) or kind is Any:
        raise AssertionError(f"a scenario has no values of {kind}")
    if kind is bool or kind is str or issubclass(kind, StrEnum):
        return _word(kind, value, name, place, key)
    is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) < math.inf:
        raise _error(f"{place}: {key} is {'a whole number' if kind is int else 'a number'}, not {_shown(value)}.")
    if (value < 0 and name not in MAY_BE_BELOW_ZERO) or (value == 0 and name in ABOVE_ZERO):
        raise _error(f"{place}: {key} is {'above' if name in ABOVE_ZERO else 'not below'} zero, not {_shown(value)}.")
    if abs(value) > NUMBER_MAX:
        raise _error(f"{place}: {key} is no more than {NUMBER_MAX:g}, not {_shown(value)}.")
    if name.endswith("_share") and value > 1:
        raise _error(f"{place}: {key} is a share from 0 to 1, not {_shown(value)}.")
    return kind(value)


def _values(kind: Any, value: Any, name: str, place: str, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _error(f"{place}: {key} is a list, not {_shown(value)}.")
    if name == "hourly" and value and (len(value) != HOURS_OF_DAY or not any(value)):
        raise _error(f"{place}: {key} has {HOURS_OF_DAY} factors, one for each hour of the day and not all of them zero.")
    return tuple(_value(kind, one, "policy" if name == "policies" else name, place, f"{key}[{number}]") for number, one in enumerate(value))


def _word(kind: Any, value: Any, name: str, place: str, key: str) -> Any:
    if kind is bool:
        if not isinstance(value, bool):
            raise _error(f"{place}: {key} is true or false, not {_shown(value)}.")
        return value
    known = TIERS if name == "tier" else NAMES if name == "policy" else tuple(kind) if issubclass(kind, StrEnum) else ()
    if not isinstance(value, str) or (known and value not in known):
        raise _error(f"{place}: {key} is {', '.join(known) or 'a text'}, not {_shown(value)}.")
    return kind(value)


def _table(text: str, place: str) -> Mapping[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _error(f"{place} is not TOML: {error}.") from error
    except RecursionError as error:
        raise _error(f"{place} is not TOML that can be read: its brackets are nested too deeply.") from error
    except ValueError as error:
        # Python's bound on the digits of a number, which no place comes with.
        lines = [str(number) for number, line in enumerate(text.splitlines(), start=1) if LONG_NUMBER.search(line)]
        raise _error(f"{place}, line {' or '.join(lines) or '?'}: a number has too many digits.") from error


def _name_of_file(place: str) -> str:
    """A scenario's name is its plots', and a file may be called what no name may."""
    return re.sub(r"[^\w.-]+", "-", Path(place).stem).lstrip("._-")[:NAME_CHARACTERS_MAX] or "scenario"


def _with_trace(node_class: Any, base: Path) -> Any:
    trace = node_class.churn.trace
    return replace(node_class, churn=replace(node_class.churn, trace=str(base / trace))) if trace else node_class


def _folder() -> Any:
    return files("potluck_coordinator.simulation") / FOLDER


def _joined(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _nearest(name: str, known: Mapping[str, object]) -> str:
    close = get_close_matches(name, known, 1)
    return f"; do you mean {close[0]}?" if close else f"; there are {', '.join(known)}"


def _shown(value: object) -> str:
    """As it was written, roughly. Hexadecimal numbers may be read that Python refuses to write out."""
    try:
        words = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    except RecursionError:
        return "what is nested too deeply"
    return words if len(words) <= SHOWN_CHARACTERS_MAX else f"{words[:SHOWN_CHARACTERS_MAX]}…"


def _error(words: str) -> PotluckError:
    return PotluckError(ErrorCode.INVALID_REQUEST, words)
