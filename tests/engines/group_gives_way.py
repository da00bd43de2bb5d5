"""A shard group gives way to one node that can hold the model alone: nobody's answer breaks, and both members' machines are free again.

    python -m tests.engines.group_gives_way

prints a line of JSON and exits 1 if a promise is broken. It needs what `tests.engines.group_loss` needs, and takes some minutes: three
vLLMs on one machine's processors.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.coordinator_process import wait_gone, wait_until
from tests.support.group_pool import MODEL, PROMPT, TOKENS, GroupPool, group_pool
from tests.support.safetensors_model import built_in_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

BUSY_TOKENS = 60
ANSWER_SECONDS_MAX = 300.0
FREED_SECONDS_MAX = 150.0
"""The group may finish its answers for 120 s, and its engines take some to end."""


@dataclass(slots=True)
class Answers:
    """What somebody got who asked all the while."""

    whole: int = 0
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Way:
    """What came of it."""

    group_ready_seconds: float
    alone_after_seconds: float
    freed_after_seconds: float
    answers_whole: int
    answers_broken: tuple[str, ...]
    text_is_the_same: bool
    explained: dict[str, str]
    findings: tuple[str, ...]

    def broken(self) -> list[str]:
        """The promises that were not kept."""
        broken = [*self.findings, *(f"an answer broke: {error}" for error in self.answers_broken)]
        if self.answers_whole < 2:
            broken.append(f"only {self.answers_whole} answers were asked for meanwhile")
        if self.freed_after_seconds > FREED_SECONDS_MAX:
            broken.append(f"the group's last process ended {self.freed_after_seconds:.0f} s after the node answered")
        if not self.text_is_the_same:
            broken.append("the node alone says something else")
        if any("serves stage" in words for words in self.explained.values()):
            broken.append(f"the group still stands: {self.explained}")
        return broken


@contextmanager
def asking(pool: GroupPool) -> Iterator[Answers]:
    """One answer after the other, until the block ends."""
    answers, enough = Answers(), threading.Event()

    def ask() -> None:
        while not enough.is_set():
            try:
                stream = pool.stream("Count from one to five hundred, in words.", max_tokens=BUSY_TOKENS)
                stream.read_to_end()
            except OSError as error:
                answers.errors.append(str(error))
                continue
            if stream.done:
                answers.whole += 1
            else:
                answers.errors.append(str(stream.error))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        enough.set()
        thread.join(ANSWER_SECONDS_MAX)


def give_way(pool: GroupPool) -> Way:
    """The group serves; then Dan comes, whose machine has room for the whole model."""
    began = time.monotonic()
    pool.potluck("deploy", MODEL, "--replicas", "1")
    pool.wait_ready()
    group_ready_seconds = time.monotonic() - began
    text = pool.greedy(PROMPT, TOKENS)
    engines = [process for name in ("ann", "bob") for process in pool.nodes[name].engine_processes()]
    with asking(pool) as answers:
        came_at = time.monotonic()
        pool.bring_whole_node("dan")
        wait_until(lambda: pool.verdicts().get("dan", {}).get("verdict") == "serves", ANSWER_SECONDS_MAX, f"dan serves\n{pool.logs()}")
        alone_at = time.monotonic()
        wait_gone(engines, FREED_SECONDS_MAX + 30)
        freed_at = time.monotonic()
    return Way(
        group_ready_seconds=round(group_ready_seconds, 1),
        alone_after_seconds=round(alone_at - came_at, 1),
        freed_after_seconds=round(freed_at - alone_at, 1),
        answers_whole=answers.whole,
        answers_broken=tuple(answers.errors),
        text_is_the_same=pool.greedy(PROMPT, TOKENS) == text,
        explained={name: f"{row['verdict']}: {row['reason']}" for name, row in pool.verdicts().items()},
        findings=tuple(json.loads(pool.potluck("audit", "--json"))["findings"]),
    )


def main() -> int:
    """Plays it once."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends this ends the pool with it
    with tempfile.TemporaryDirectory() as folder, group_pool(Path(folder) / "pool", built_in_folder()) as pool:
        way = give_way(pool)
    print(json.dumps({**asdict(way), "broken": way.broken()}))
    return 1 if way.broken() else 0


if __name__ == "__main__":
    sys.exit(main())
