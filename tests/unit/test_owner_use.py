"""When the owner's hands were last on the machine: what logind, terminals and the X display tell, and what is said where nothing does."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from potluck_node.domain.rest import Use
from potluck_node.probe import display, logind, terminals
from potluck_node.probe.local_zone import local_zone
from potluck_node.probe.owner_use import NOBODY_SECONDS, newest, owner_use

NOW = 1_795_000_000.0


def session(**fields: str) -> str:
    lines = {"Class": "user", "IdleHint": "no", "IdleSinceHint": "0", "State": "active", "Type": "x11"} | fields
    return "".join(f"{name}={value}\n" for name, value in lines.items())


def idle_since(seconds_ago: float, **fields: str) -> str:
    return session(IdleHint="yes", IdleSinceHint=str(round((NOW - seconds_ago) * 1e6)), **fields)


@pytest.mark.parametrize(
    ("sessions", "seconds"),
    [
        ([], float("inf")),
        ([session()], 0.0),
        ([idle_since(90)], 90.0),
        ([idle_since(900), idle_since(90, Type="tty")], 90.0),
        ([idle_since(900), session(Class="greeter")], 900.0),
        ([session(Class="manager")], float("inf")),
        ([idle_since(900), session(State="closing")], 900.0),
        ([session(IdleHint="yes", IdleSinceHint="")], 0.0),
    ],
)
def test_of_several_sessions_the_newest_use_counts_and_only_those_of_people(sessions: list[str], seconds: float) -> None:
    asked: list[Sequence[str]] = []

    def loginctl(arguments: Sequence[str]) -> str:
        asked.append(arguments)
        if arguments[0] == "list-sessions":
            return "".join(f" {number} 1000 ana seat0 tty2\n" for number in range(len(sessions)))
        return "\n".join(sessions)

    assert logind.idle_seconds(NOW, loginctl=loginctl) == pytest.approx(seconds)
    assert asked[-1][-len(sessions) :] == [str(number) for number in range(len(sessions))] or not sessions


def test_a_desktop_that_never_tells_logind_is_left_to_the_display() -> None:
    def loginctl(arguments: Sequence[str]) -> str:
        return " 1 1000 ana\n 2 1000 ana\n" if arguments[0] == "list-sessions" else session() + "\n" + idle_since(700, Type="tty")

    assert logind.idle_seconds(NOW, loginctl=loginctl) == 0.0
    assert logind.idle_seconds(NOW, without="x11", loginctl=loginctl) == pytest.approx(700)


@pytest.mark.parametrize("failure", [FileNotFoundError(), subprocess.CalledProcessError(1, "loginctl"), subprocess.TimeoutExpired("x", 5)])
def test_a_machine_without_logind_says_nothing_by_it(failure: Exception) -> None:
    def loginctl(_arguments: Sequence[str]) -> str:
        raise failure

    assert logind.idle_seconds(NOW, loginctl=loginctl) is None


def test_terminals_tell_by_the_time_of_the_last_word_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utmp, devices = tmp_path / "utmp", tmp_path / "dev"
    (devices / "pts").mkdir(parents=True)
    for name, seconds_ago in (("tty1", 5000), ("pts/3", 120), ("pts/4", 1)):
        (devices / name).touch()
        os.utime(devices / name, (NOW - seconds_ago, NOW))
    monkeypatch.setattr(psutil, "users", lambda: [SimpleNamespace(terminal=name) for name in ("tty1", "pts/3", ":0", None)])
    assert terminals.idle_seconds(NOW, utmp, devices) is None
    utmp.touch()
    assert terminals.idle_seconds(NOW, utmp, devices) == pytest.approx(120), "nobody is logged in on pts/4"
    monkeypatch.setattr(psutil, "users", list)
    assert terminals.idle_seconds(NOW, utmp, devices) == float("inf")


@pytest.mark.parametrize(
    ("environment", "printed", "seconds"),
    [
        ({}, "5000", None),
        ({"DISPLAY": ":0"}, "5000\n", 5.0),
        ({"DISPLAY": ":0"}, "couldn't open display", None),
        ({"DISPLAY": ":0"}, FileNotFoundError(), None),
        ({"DISPLAY": ":0"}, subprocess.CalledProcessError(1, "xprintidle"), None),
    ],
)
def test_a_display_tells_where_there_is_one(environment: dict[str, str], printed: object, seconds: float | None) -> None:
    def xprintidle(_environment: object) -> str:
        if isinstance(printed, Exception):
            raise printed
        return str(printed)

    assert display.idle_seconds(environment, xprintidle) == seconds


def test_the_newest_use_counts_and_says_who_told_of_it() -> None:
    assert newest({"logind": 50.0, "the X display": 7.0}) == Use(7.0, "by the X display")
    assert newest({"terminals": float("inf")}) == Use(NOBODY_SECONDS, "by terminals")
    assert newest({}).idle_seconds is None
    assert "logind" in newest({}).words


def test_this_machine_is_looked_at_without_a_failure() -> None:
    use = owner_use(datetime.now(UTC).timestamp(), os.environ)
    assert use.words
    assert use.idle_seconds is None or use.idle_seconds >= 0


def test_the_clock_on_the_wall_is_that_of_tz_else_of_the_machines_file_else_utc(tmp_path: Path) -> None:
    rules = tmp_path / "zoneinfo" / "Asia" / "Kathmandu"
    rules.parent.mkdir(parents=True)
    rules.write_bytes(tzif(5 * 3600 + 45 * 60))
    localtime = tmp_path / "localtime"
    localtime.symlink_to(rules)
    moment = datetime(2026, 7, 1, 12)  # noqa: DTZ001 - on the wall
    assert str(local_zone({}, localtime)) == "Asia/Kathmandu"
    assert local_zone({}, localtime).utcoffset(moment).total_seconds() == 20_700
    assert str(local_zone({"TZ": "America/St_Johns"}, localtime)) == "America/St_Johns"
    assert str(local_zone({"TZ": "Nowhere/At_All"}, localtime)) == "Asia/Kathmandu"
    assert str(local_zone({"TZ": "../../etc/passwd"}, localtime)) == "Asia/Kathmandu"
    assert local_zone({}, tmp_path / "missing") is UTC
    localtime.unlink()
    localtime.write_bytes(b"no rules")
    assert local_zone({}, localtime) is UTC


def tzif(offset_seconds: int) -> bytes:
    """The rules of a zone that never changes, in the form of RFC 8536."""

    def block(version: bytes) -> bytes:
        counts = b"".join(count.to_bytes(4, "big") for count in (0, 0, 0, 0, 1, 4))
        return b"TZif" + version + bytes(15) + counts + offset_seconds.to_bytes(4, "big") + bytes([0, 0]) + b"+XX\0"

    return block(b"2") + block(b"2") + b"\n<+XX>-5:45\n"
