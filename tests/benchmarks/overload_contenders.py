"""The fleet of engines that can be over-admitted, and each contender in front of one of its own.

Decides the engines' cost model and what they can bear: slow ones, so that a machine of two cores is not what runs out. It must not know
which load comes.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from potluck_node.engines.batch_model import CostModel
from tests.benchmarks.contenders import MODEL, Contender, wait_until_answers, write_script
from tests.benchmarks.open_load import ANSWER_TOKENS, OpenTarget, mean_tokens
from tests.benchmarks.peer_contenders import STARTS
from tests.benchmarks.pool import PoolModel, account_keys, start_pool
from tests.benchmarks.processes import Child, descendants, free_port, title

ENGINE_COUNT: Final = 2
ACCOUNT_COUNT: Final = 4
CONTEXT_LENGTH_TOKENS: Final = 2048
SLOT_COUNT: Final = 64
"""More than the cache has room for, as engines are started in practice: tokens must bound what runs, not slots."""
COST: Final = CostModel(
    prefill_tokens_per_second=2500,
    step_ms=30,
    step_ms_per_request=1.5,
    kv_capacity_tokens=6000,
    batch_max=SLOT_COUNT,
    step_tokens_max=512,
    kv_overcommit_max=1.5,
    waiting_tokens_max=30_000,
)
"""About a twentieth of a card; waiting prompts of five times its cache kill it."""
SCRIPT: Final[Mapping[str, object]] = {
    "tokens": list(ANSWER_TOKENS),
    "token_count": CONTEXT_LENGTH_TOKENS,
    "count_in_prompt": True,
    "load_ms": 3000,
    "cost": asdict(COST),
}
POOL_SETTINGS: Final[Mapping[str, str]] = {
    "POTLUCK_COORDINATOR_QUEUE_DEADLINE_SECONDS": "2",
    "POTLUCK_COORDINATOR_DEFAULT_TIER_RESERVE_PERCENT": "0",
}
"""What is begun later than the objective for first tokens is of no use to these clients; and all of them ask for the same tier."""
WATCH_SECONDS: Final = 0.25
NAMES: Final = ("Potluck", "LiteLLM", "sglang-router")


def fleet_requests_per_second() -> float:
    """About what all engines together can do of the mix, with full batches: the middle of where the peak is looked for."""
    prompt_tokens, answer_tokens = mean_tokens()
    batch = COST.kv_capacity_tokens / (prompt_tokens + answer_tokens)
    return ENGINE_COUNT / (prompt_tokens / COST.prefill_tokens_per_second + answer_tokens * COST.step_seconds(round(batch)) / batch)


def start(name: str, folder: Path) -> tuple[Contender, OpenTarget]:
    """A contender with engines of its own, all ready; raises PeerUnavailableError or RuntimeError."""
    folder.mkdir()
    if name == "Potluck":
        model = PoolModel(SCRIPT, CONTEXT_LENGTH_TOKENS, SLOT_COUNT, POOL_SETTINGS)
        contender = start_pool(folder, frozenset(), frozenset(), model=model, node_count=ENGINE_COUNT).contender
        try:
            return contender, _target(contender, tuple(f"Bearer {key}" for key in account_keys(folder, ACCOUNT_COUNT)))
        except BaseException:
            contender.stop()
            raise
    contender = _start_peer(name, folder)
    return contender, _target(contender, (contender.authorization,) * ACCOUNT_COUNT)


def _start_peer(name: str, folder: Path) -> Contender:
    engines: list[Contender] = []
    try:
        script = write_script(folder, SCRIPT)
        engines.extend(start_engine(folder, script, number) for number in range(ENGINE_COUNT))
        for engine in engines:
            wait_until_answers(engine)
        router = STARTS[name](folder, [engine.url for engine in engines], frozenset())
    except BaseException:
        for engine in engines:
            engine.stop()
        raise
    router.children[:0] = [child for engine in engines for child in engine.children]
    return router


def start_engine(folder: Path, script: Path, number: int) -> Contender:
    port = free_port()
    command = [sys.executable, "-m", "tests.benchmarks.kept_engine", "-m", "potluck_node.engines.scripted_server", "--model", str(script)]
    command += ["--alias", MODEL, "--context", str(CONTEXT_LENGTH_TOKENS), "--slots", str(SLOT_COUNT), "--port", str(port)]
    child = Child(command, folder / f"engine-{number}.log")
    return Contender(f"engine {number}", f"http://127.0.0.1:{port}", lambda: {"engine": child.family}, children=[child])


def _target(contender: Contender, authorizations: tuple[str, ...]) -> OpenTarget:
    address = urlsplit(contender.url)
    return OpenTarget(address.hostname or "127.0.0.1", address.port or 80, MODEL, authorizations)


class DeathWatch:
    """Counts the engines of a contender that are gone, whoever starts them again."""

    def __init__(self, contender: Contender) -> None:
        self._roots = [child.process_id for child in contender.children]
        self._over = threading.Event()
        self._living: set[int] = set()
        self.count = 0

    def _look(self) -> None:
        now = {process_id for root in self._roots for process_id in descendants(root) if is_engine(title(process_id))}
        self.count += len(self._living - now)
        self._living = now

    def _watch(self) -> None:
        while not self._over.wait(WATCH_SECONDS):
            self._look()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Looks a few times a second while the block runs, and once when it is over."""
        self._look()
        self.count = 0
        self._over.clear()
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
            self._look()


def is_engine(shown: str) -> bool:
    """Whether a process with this command line is an engine, and not who keeps one."""
    return "potluck_node.engines.scripted_server" in shown and "kept_engine" not in shown
