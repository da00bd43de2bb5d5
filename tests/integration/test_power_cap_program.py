"""The small program that caps a card's power as root: on a driver's library that was compiled for this test, alone and behind `sudo -n`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from potluck_node import power_cap_program
from potluck_node.power_caps import CapRefusedError, program_is_usable, run_program

CARD = "GPU-00000000-0000-4000-8000-000000000000"
PROGRAM = Path(power_cap_program.__file__)
LIBRARY = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static int fails(const char *call) { const char *named = getenv("FAIL"); return named && !strcmp(named, call) ? atoi(getenv("CODE")) : 0; }
static int known;
int nvmlInit_v2(void) { return fails("init"); }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **card) {
    *card = &known;
    return strcmp(uuid, "GPU-00000000-0000-4000-8000-000000000000") ? 6 : 0;
}
int nvmlDeviceGetPowerManagementLimitConstraints(void *card, unsigned *lowest, unsigned *highest) {
    if (card != &known) return 2;
    *lowest = 100000; *highest = 385000;
    return fails("constraints");
}
int nvmlDeviceSetPowerManagementLimit(void *card, unsigned milliwatts) {
    if (card != &known) return 2;
    int code = fails("set");
    if (code) return code;
    FILE *file = fopen(getenv("SET"), "a");
    fprintf(file, "%u\n", milliwatts);
    return fclose(file);
}
"""
"""What `power_cap_program` calls, by the C signatures of nvml.h. It writes down what was set."""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("a C compiler is missing")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "nvml.c").write_text(LIBRARY)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", folder / "nvml.c"], check=True)
    return folder


def started(driver: Path, set_file: Path, *arguments: str, fail: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", PROGRAM, *arguments],
        env={"LD_LIBRARY_PATH": str(driver), "SET": str(set_file), "FAIL": fail, "CODE": str(code)},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def test_it_sets_the_cap_of_the_card_that_is_named(driver, tmp_path):
    done = started(driver, tmp_path / "set", CARD, "280000")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "set").read_text() == "280000\n"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        ((), 2, "usage: potluck-power-cap"),
        (("--help",), 2, "usage: potluck-power-cap"),
        ((CARD,), 2, "usage"),
        ((CARD, "280000", "280000"), 2, "usage"),
        ((CARD, "280"), 2, "usage"),
        ((CARD, "0280000"), 2, "usage"),
        ((CARD, "280000\n"), 2, "usage"),
        ((CARD, "280000.0"), 2, "usage"),
        ((CARD, "-280000"), 2, "usage"),
        ((CARD, "٢٨٠٠٠٠"), 2, "usage"),
        ((CARD, "99999999"), 2, "usage"),
        ((f"{CARD}; reboot", "280000"), 2, "usage"),
        (("0", "280000"), 2, "usage"),
        ((CARD.lower(), "280000"), 2, "usage"),
        ((CARD.replace("4000", "4001"), "280000"), 3, "there is no card"),
        ((CARD, "99999"), 4, "the card takes 100000 to 385000 mW, not 99999"),
        ((CARD, "385001"), 4, "the card takes 100000 to 385000 mW"),
    ],
)
def test_it_takes_one_card_and_one_cap_of_its_range_and_nothing_else(driver, tmp_path, arguments, exit_code, words):
    done = started(driver, tmp_path / "set", *arguments)
    assert done.returncode == exit_code
    assert words in done.stderr
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("fail", "code", "exit_code", "words"),
    [
        ("init", 9, 3, "the driver cannot be used (NVML error 9)"),
        ("constraints", 3, 6, "does not say which caps"),
        ("set", 4, 5, "only root may set a cap"),
        ("set", 15, 6, "the cap was not set (NVML error 15)"),
    ],
)
def test_it_says_why_the_driver_did_not_do_it(driver, tmp_path, fail, code, exit_code, words):
    done = started(driver, tmp_path / "set", CARD, "280000", fail=fail, code=code)
    assert (done.returncode, words in done.stderr, (tmp_path / "set").exists()) == (exit_code, True, False)


def test_without_a_driver_it_says_so(tmp_path):
    done = started(tmp_path, tmp_path / "set", CARD, "280000")
    assert (done.returncode, "no NVIDIA driver here" in done.stderr) == (3, True)


def test_it_is_one_file_of_the_standard_library_that_reads_nothing_of_its_users(driver, tmp_path):
    """As its owner installs it: a copy elsewhere, started by its first line, with a module of the user's in the way."""
    copy = tmp_path / "potluck-power-cap"
    copy.write_text(PROGRAM.read_text().replace("/usr/bin/python3", sys.executable, 1))
    copy.chmod(0o755)
    assert PROGRAM.read_text().startswith("#!/usr/bin/python3 -I\n")
    (tmp_path / "re.py").write_text("raise SystemExit(77)")
    environment = {"LD_LIBRARY_PATH": str(driver), "SET": str(tmp_path / "set"), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([copy, CARD, "250000"], env=environment, cwd=tmp_path, check=False, timeout=30)
    assert (done.returncode, (tmp_path / "set").read_text()) == (0, "250000\n")


@pytest.fixture
def sudo(driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `sudo` that lets everything through, or nothing: it writes down how it was started."""
    folder = tmp_path / "bin"
    folder.mkdir()
    sudo = folder / "sudo"
    sudo.write_text(
        f"""#!/bin/sh
printf "%s\\n" "$*" >> {tmp_path}/asked
[ -e {tmp_path}/forbidden ] && {{ echo "sudo: a password is required" >&2; exit 1; }}
[ "$1 $2" = "-n --" ] || exit 99
shift 2
LD_LIBRARY_PATH={driver} SET={tmp_path}/set exec "$@"
"""
    )
    sudo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


def installed(folder: Path) -> Path:
    program = folder / "potluck-power-cap"
    program.write_text(PROGRAM.read_text().replace("/usr/bin/python3", sys.executable, 1))
    program.chmod(0o755)
    return program


def test_the_agent_starts_it_by_sudo_that_asks_nobody(sudo):
    program = installed(sudo)
    assert program_is_usable(program)
    run_program(program, CARD, 280_000)
    assert (sudo / "asked").read_text() == f"-n -- {program} {CARD} 280000\n"
    assert (sudo / "set").read_text() == "280000\n"


def test_a_refusal_of_sudo_or_of_the_program_is_told(sudo):
    program = installed(sudo)
    with pytest.raises(CapRefusedError, match="the card takes 100000 to 385000 mW, not 400000"):
        run_program(program, CARD, 400_000)
    (sudo / "forbidden").touch()
    with pytest.raises(CapRefusedError, match="a password is required"):
        run_program(program, CARD, 280_000)


def test_without_the_program_or_without_sudo_there_is_no_way(sudo, monkeypatch):
    assert not program_is_usable(sudo / "potluck-power-cap")
    monkeypatch.setenv("PATH", str(sudo / "nowhere"))
    assert not program_is_usable(installed(sudo))
