"""The trials of a run: which contenders lose what, each with two engines of its own.

Decides the order, and that Potluck loses an engine alone and a whole node. It must not know how a trial is judged.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from tests.benchmarks.contenders import Contender, PeerUnavailableError, start_engine, wait_until_answers
from tests.benchmarks.loss_traces import LossRow
from tests.benchmarks.losses import FREEZE, KILL, Blow, Trial, Victim, run_trials
from tests.benchmarks.peer_contenders import STARTS
from tests.benchmarks.pool import Pool
from tests.benchmarks.processes import Handle

BLOWS: Final = (KILL, FREEZE)
ENGINE_COUNT: Final = 2


def peer_losses(
    names: Sequence[str], folder: Path, relay_cores: frozenset[int], home_cores: frozenset[int], say: Callable[[str], None]
) -> tuple[list[LossRow], dict[str, str]]:
    """The trials of these peers, all at the same time, and why some have none."""
    rows: list[LossRow] = []
    absent: dict[str, str] = {}
    for blow in BLOWS:
        say(f"{blow.name} of one of two engines: {', '.join(names)}")
        with contextlib.ExitStack() as stack:
            trials: list[Trial] = []
            for name in names:
                place = folder / f"{name} {blow.name}"
                place.mkdir()
                try:
                    trials.append(stack.enter_context(_with_engines(name, place, blow, relay_cores, home_cores)))
                except PeerUnavailableError as error:
                    absent[name] = str(error)
            for trial, (figures, hit) in zip(trials, run_trials(trials), strict=True):
                trial.victims[hit].send(signal.SIGKILL)  # whoever stops what is frozen would wait for it
                rows.append(LossRow(trial.contender.name, "engine", blow.name, blow is FREEZE, figures))
    return rows, absent


@contextlib.contextmanager
def _with_engines(name: str, folder: Path, blow: Blow, relay_cores: frozenset[int], home_cores: frozenset[int]) -> Iterator[Trial]:
    with contextlib.ExitStack() as stack:
        engines: list[Contender] = []
        for number in range(ENGINE_COUNT):
            engines.append(start_engine(folder, home_cores, number))
            stack.callback(engines[-1].stop)
        contender = STARTS[name](folder, [engine.url for engine in engines], relay_cores)
        stack.callback(contender.stop)
        victims = [_held(ids[0], ids) for ids in (engine.process_ids()["engine"] for engine in engines)]
        for victim in victims:
            stack.callback(victim.close)
        yield Trial(contender, victims, blow)


def pool_losses(pool: Pool, say: Callable[[str], None]) -> list[LossRow]:
    """Potluck's trials: an engine lost alone, which its agent sees, and a whole node with its agent, which only the coordinator can see."""
    rows: list[LossRow] = []
    for lost in ("engine", "node"):
        for blow in BLOWS:
            say(f"{blow.name} of one of two {lost}s: Potluck")
            pool.wait_until_ready()
            wait_until_answers(pool.contender)
            victims = [_victim(pool, number, lost) for number in range(len(pool.nodes))]
            ((figures, hit),) = run_trials([Trial(pool.contender, victims, blow)])
            victims[hit].send(signal.SIGKILL)
            for victim in victims:
                victim.close()
            rows.append(LossRow(pool.contender.name, lost, blow.name, blow is FREEZE, figures))
            if lost == "node":
                pool.start_again(hit)
    return rows


def _victim(pool: Pool, number: int, lost: str) -> Victim:
    engine = pool.engine_of(number)
    return _held(engine, (engine,) if lost == "engine" else pool.nodes[number].family)


def _held(engine: int, process_ids: Sequence[int]) -> Victim:
    return Victim(engine, tuple(Handle(process_id) for process_id in process_ids))
