"""Whether this user may cap the power of cards, and the command that gives the right.

Decides what counts as a right: being root, or the owner's program behind `sudo -n`. It changes nothing, and asks nobody for a password. It
must not know when a cap is wanted.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import stat
from pathlib import Path
from typing import Final

from potluck_node import power_cap_program
from potluck_node.domain.findings import CapRight
from potluck_node.power_caps import PROGRAM, program_is_usable
from potluck_node.root_programs import UnendedError, run_as_root

ANY_CARD: Final = "GPU-00000000-0000-0000-0000-000000000000"
ANY_MILLIWATTS: Final = "100000"
ASK_SECONDS_MAX: Final = 10.0
SUDOERS: Final = Path("/etc/sudoers.d/potluck-power-cap")
USERS_FROM: Final = 1_000
"""Below are the system's own groups."""
_PLAIN_NAME: Final = re.compile(r"[a-z_][a-z0-9_-]*", re.ASCII)


def cap_right(program: Path = PROGRAM) -> CapRight:
    """What this user may do. Blocks for as long as sudo takes."""
    if os.geteuid() == 0:
        return CapRight.ROOT
    if not program_is_usable(program):
        return CapRight.NONE
    if not only_root_writes(program):
        return CapRight.UNSAFE
    try:
        exit_code, _ = run_as_root(("-l", "--", str(program), ANY_CARD, ANY_MILLIWATTS), ASK_SECONDS_MAX)
    except (OSError, UnendedError):
        return CapRight.NONE
    return CapRight.PROGRAM if exit_code == 0 else CapRight.NONE


def only_root_writes(program: Path) -> bool:
    """Whether nobody but root could put something else in the program's place."""
    try:
        file, *folders = [place.stat() for place in (program, *program.resolve().parents)]
    except OSError:
        return False
    # Debian lets the group staff write /usr/local, and says itself that it is as good as root.
    others = [file.st_mode & (stat.S_IWGRP | stat.S_IWOTH)]
    others += [folder.st_mode & stat.S_IWOTH or (folder.st_mode & stat.S_IWGRP and folder.st_gid >= USERS_FROM) for folder in folders]
    return not any(others) and all(place.st_uid == 0 for place in (file, *folders))


def right_giving_command(program: Path = PROGRAM, user_id: int | None = None) -> str:
    """To type once, as somebody who may use sudo: installs the program where root alone writes, and lets this user start it."""
    source = shlex.quote(str(Path(power_cap_program.__file__)))
    rule = f"{_user_word(os.geteuid() if user_id is None else user_id)} ALL=(root) NOPASSWD: {program} GPU-* [0-9]*"
    return (
        f"sudo install -o root -g root -m 0755 {source} {program} && "
        f"echo '{rule}' | sudo install -o root -g root -m 0440 /dev/stdin {SUDOERS} && sudo visudo -c"
    )


def _user_word(user_id: int) -> str:
    """As sudoers names a user; by number where the name has letters that mean something else there."""
    try:
        name = pwd.getpwuid(user_id).pw_name
    except KeyError:
        name = ""
    return name if _PLAIN_NAME.fullmatch(name) else f"#{user_id}"
