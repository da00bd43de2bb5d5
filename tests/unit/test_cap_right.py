"""Who may cap the power of cards, what the doctor says of it, and the command that gives the right."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from potluck_node import cap_right as looked_at
from potluck_node import power_cap_program
from potluck_node.cap_right import cap_right, only_root_writes, right_giving_command
from potluck_node.domain.doctor_caps import check_caps
from potluck_node.domain.findings import CapRight, Examination, Level, OwnerWord
from potluck_node.domain.hardware import Card, CardIdentity, Hardware

CAPPABLE = Card(0, CardIdentity(power_limit_min_milliwatts=100_000))


def examined(right: CapRight | None, watts: int | None = None, card: Card = CAPPABLE) -> Examination:
    owner = OwnerWord(power_limit_watts=watts, cap_right=right, cap_right_command="sudo do this")
    return Examination(Hardware(cards=(card,)), None, owner)


@pytest.mark.parametrize(
    ("right", "watts", "levels", "fix"),
    [
        (CapRight.ROOT, None, [Level.OK], ""),
        (CapRight.PROGRAM, 250, [Level.OK], ""),
        (CapRight.NONE, None, [Level.OK], "sudo do this"),
        (CapRight.NONE, 250, [Level.WARN], "sudo do this"),
        (CapRight.UNSAFE, None, [Level.FAIL], "sudo do this"),
        (CapRight.ROOT, 80, [Level.OK, Level.WARN], ""),
        (None, 250, [], None),
    ],
)
def test_the_doctor_says_whether_power_may_be_capped_and_how_to_let_it(right, watts, levels, fix):
    findings = check_caps(examined(right, watts))
    assert [finding.level for finding in findings] == levels
    assert not findings or findings[0].fix == fix


def test_of_cards_that_tell_no_caps_nothing_is_said():
    assert check_caps(examined(CapRight.NONE, 250, Card(0))) == ()
    assert check_caps(examined(CapRight.NONE, 250, Card(0, CAPPABLE.identity, lost=True))) == ()


@pytest.fixture
def plain_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Not root, with a `sudo` that allows what the file `allowed` names."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sudo").write_text(f'#!/bin/sh\n[ "$1 $2 $3" = "-n -l --" ] && [ "$(cat {tmp_path}/allowed)" = "$4" ]\n')
    (folder / "sudo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 1_000)
    return tmp_path


def test_the_right_is_roots_or_the_programs_that_sudo_allows(plain_user, monkeypatch):
    program = plain_user / "potluck-power-cap"
    assert cap_right(program) is CapRight.NONE
    program.touch(0o755)
    assert cap_right(program) is CapRight.UNSAFE, "its folder is anybody's"
    monkeypatch.setattr(looked_at, "only_root_writes", lambda _: True)
    (plain_user / "allowed").write_text("/usr/bin/something-else")
    assert cap_right(program) is CapRight.NONE
    (plain_user / "allowed").write_text(str(program))
    assert cap_right(program) is CapRight.PROGRAM
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert cap_right(plain_user / "nothing") is CapRight.ROOT


def test_what_the_system_installed_is_roots_alone_and_what_is_not_there_is_nobodys():
    assert only_root_writes(Path("/bin/sh"))
    assert not only_root_writes(Path("/nowhere/at/all"))


def test_a_file_that_others_write_or_in_a_folder_that_others_write_is_not_roots_alone(tmp_path):
    program = tmp_path / "potluck-power-cap"
    program.touch(0o755)
    # Its folder lies in one where everybody writes.
    assert not only_root_writes(program)


def test_the_command_installs_the_program_for_root_and_one_rule_for_one_user():
    command = right_giving_command(Path("/usr/local/sbin/potluck-power-cap"), user_id=0)
    install, rule, check = command.split(" && ")
    assert shlex.split(install) == [
        *("sudo", "install", "-o", "root", "-g", "root", "-m", "0755"),
        *(str(Path(power_cap_program.__file__)), "/usr/local/sbin/potluck-power-cap"),
    ]
    assert "'root ALL=(root) NOPASSWD: /usr/local/sbin/potluck-power-cap GPU-* [0-9]*'" in rule
    assert rule.endswith("-m 0440 /dev/stdin /etc/sudoers.d/potluck-power-cap")
    assert check == "sudo visudo -c"
    assert "'#4242424 ALL=(root)" in right_giving_command(user_id=4_242_424)
