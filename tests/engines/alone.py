"""One vLLM that is given the whole model: what it says when asked directly, or what it ended of.

    python -m tests.engines.alone MODEL_FOLDER

prints a line of JSON. Within a limit of memory it shows whether a machine of that size could have served the model by itself.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import run as run_process

from potluck_node.engines.process import EngineFailedError
from potluck_node.engines.vllm import environment_of
from tests.engines.one_process import run
from tests.support.group_pool import VLLM_PYTHON
from tests.support.memory_limits import memory_limit

SECONDS_MAX = 600.0


@dataclass(frozen=True, slots=True)
class Alone:
    """What came of one try."""

    text: str
    failure: str
    """The agent's word for it; "" where it answered."""
    kernel_kill_count: int
    """Of its processes, for want of memory."""


def alone(model_folder: Path, limit_bytes: int | None = None) -> Alone:
    """One try in processes of its own, with so much memory; None: this machine's."""
    with ExitStack() as stack:
        limit = stack.enter_context(memory_limit("alone", limit_bytes)) if limit_bytes is not None else None
        command = [*(limit.wrap if limit else ()), sys.executable, "-m", "tests.engines.alone", str(model_folder)]
        said = run_process(command, check=True, capture_output=True, text=True, timeout=SECONDS_MAX).stdout
        found = json.loads(said.splitlines()[-1])
        return Alone(found["text"], found["failure"], limit.out_of_memory_kill_count if limit else 0)


def main() -> None:
    text, failure = "", ""
    try:
        text = asyncio.run(run(environment_of(VLLM_PYTHON), Path(sys.argv[1]))).text
    except EngineFailedError as error:
        failure = error.kind
        print(error, file=sys.stderr)
    print(json.dumps({"text": text, "failure": failure}))


if __name__ == "__main__":
    main()
