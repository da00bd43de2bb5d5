"""Looks into the files of a model, in a process of its own: what is in them may be made to take all memory, or all of the processor.

`python -m potluck_node.model_store.checker ROOT --pinned NAME… --check NAME…` ends with 0 when the files to check hold what they should,
and with EXIT_BAD and the reason as its last line on stderr when one does not. Decides what the process may take. `domain.model_folder`
judges.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from potluck_node.child_process import ChildProcess
from potluck_node.domain.model_folder import check_content
from potluck_node.domain.strict_json import BadModelError
from potluck_node.lifeline import exit_with_parent
from potluck_node.model_store.download import FetchFailedError

EXIT_BAD: Final = 65
MEMORY_BYTES_MAX: Final = 3 * 1024**3
"""Of address space. The tokenizer of a vocabulary of 262,144 needs a sixth of it."""
TIME_LIMIT_SECONDS: Final = 300.0
_BUFFER_BYTES: Final = 1024 * 1024
_PASSED_VARIABLES: Final = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")


async def check_files(root: Path, pinned_names: Sequence[str], unchecked_names: Sequence[str], environment: Mapping[str, str]) -> None:
    """Returns when the unchecked ones of a model's files hold what they should.

    Raises:
        BadModelError: one does not; the text names it.
        FetchFailedError: the check itself failed.
    """
    arguments = ("-m", "potluck_node.model_store.checker", str(root), "--pinned", *pinned_names, "--check", *unchecked_names)
    try:
        child = ChildProcess.spawn(arguments, {name: value for name, value in environment.items() if name in _PASSED_VARIABLES})
    except OSError as error:
        raise FetchFailedError(f"the check of the model's files could not be started: {error}") from error
    try:
        ending = await asyncio.wait_for(child.wait(), TIME_LIMIT_SECONDS)
    except TimeoutError:
        raise BadModelError(f"the model's files could not be checked within {TIME_LIMIT_SECONDS:.0f} s") from None
    finally:
        await child.stop()
    if ending == f"exit status {EXIT_BAD}":
        raise BadModelError(child.stderr.text(1))
    if ending:
        raise FetchFailedError(f"the check of the model's files ended with {ending}: {child.stderr.text(1)}")


def _check(root: Path, name: str, pinned_names: frozenset[str]) -> None:
    path = root / name
    try:
        with path.open("rb", buffering=_BUFFER_BYTES) as file:
            check_content(name, path.stat().st_size, file.read, pinned_names)
    except BadModelError as error:
        raise BadModelError(f"{path.name} is not loaded: {error}") from None
    except MemoryError:
        raise BadModelError(f"{path.name} is not loaded: to look into it takes more than {MEMORY_BYTES_MAX} bytes of memory") from None


def _bound_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # noqa: PLC0415 - not on every system

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))


def main() -> None:
    exit_with_parent()
    _bound_memory()
    parser = argparse.ArgumentParser(prog="potluck_node.model_store.checker")
    parser.add_argument("root", type=Path)
    parser.add_argument("--pinned", nargs="+", required=True)
    parser.add_argument("--check", nargs="+", required=True)
    options = parser.parse_args()
    try:
        for name in options.check:
            _check(options.root, name, frozenset(options.pinned))
    except BadModelError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the answer
        sys.exit(EXIT_BAD)


if __name__ == "__main__":
    main()
