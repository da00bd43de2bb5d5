"""One of two engines is killed, or frozen, under 16 streams: the same driver against every contender.

Decides when the blow falls and whom it hits: the engine that is busier. Meanwhile short requests are asked one after the other, as new
clients would. It must not know what stands between it and the engines.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import aiohttp

from tests.benchmarks.answers import ended, tokens_of
from tests.benchmarks.contenders import MODEL, Contender
from tests.benchmarks.load import Load, prompt
from tests.benchmarks.loss_traces import LossFigures, Trace, loss_figures
from tests.benchmarks.processes import Handle, cpu_seconds
from tests.benchmarks.turns import PACE_MS

STREAM_COUNT: Final = 16
TOKEN_COUNT: Final = 150
PROBE_TOKEN_COUNT: Final = 3
PROBE_SECONDS: Final = 0.2
"""From one short request to the next."""
BLOW_AFTER_SECONDS: Final = 1.0
_LOOK_SECONDS: Final = 0.4
"""How long the engines are watched before, to see which is busier."""


@dataclass(frozen=True, slots=True)
class Blow:
    """What is done to the one engine."""

    name: str
    signal_number: int
    asking_seconds: float
    """How long after the blow short requests are asked."""
    patience_seconds: float
    """How long after the blow the trial lasts at most."""


KILL: Final = Blow("kill -9", signal.SIGKILL, 4.0, 6.0)
FREEZE: Final = Blow("SIGSTOP", signal.SIGSTOP, 5.0, 9.0)


@dataclass(frozen=True, slots=True)
class Victim:
    """What may be hit: the engine by whose work the busier one is known, and all processes that are hit with it."""

    engine: int
    processes: tuple[Handle, ...]

    def send(self, signal_number: int) -> None:
        for process in self.processes:
            process.send(signal_number)

    def close(self) -> None:
        for process in self.processes:
            process.close()


@dataclass(frozen=True, slots=True)
class Trial:
    """One contender with two engines, and what is done to the busier one."""

    contender: Contender
    victims: Sequence[Victim]
    blow: Blow


def run_trials(trials: Sequence[Trial]) -> list[tuple[LossFigures, int]]:
    """Runs them at the same time; of each the figures, and which of its victims was hit. What was frozen stays so."""

    async def together() -> list[tuple[LossFigures, int]]:
        return await asyncio.gather(*map(_run, trials))

    return asyncio.run(together())


async def _run(trial: Trial) -> tuple[LossFigures, int]:
    victims, blow = trial.victims, trial.blow
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as http:
        ask = _Asking(http, trial.contender)
        step_seconds = PACE_MS / 1000 / STREAM_COUNT
        streams = [asyncio.create_task(ask.stream(TOKEN_COUNT, index * step_seconds)) for index in range(STREAM_COUNT)]
        await asyncio.sleep(BLOW_AFTER_SECONDS - _LOOK_SECONDS)
        before = [cpu_seconds(victim.engine) or 0.0 for victim in victims]
        await asyncio.sleep(_LOOK_SECONDS)
        spent = [(cpu_seconds(victim.engine) or 0.0) - earlier for victim, earlier in zip(victims, before, strict=True)]
        hit = spent.index(max(spent))
        lost_at = time.monotonic()
        victims[hit].send(blow.signal_number)
        probes: list[asyncio.Task[None]] = []
        while time.monotonic() < lost_at + blow.asking_seconds:
            probes.append(asyncio.create_task(ask.stream(PROBE_TOKEN_COUNT, 0.0, probe=True)))
            await asyncio.sleep(PROBE_SECONDS)
        left_seconds = max(0.0, lost_at + blow.patience_seconds - time.monotonic())
        _, late = await asyncio.wait([*streams, *probes], timeout=left_seconds)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
    return loss_figures(ask.traces, TOKEN_COUNT, ask.probes, PROBE_TOKEN_COUNT, lost_at), hit


class _Asking:
    """Asks, and keeps what came."""

    def __init__(self, http: aiohttp.ClientSession, contender: Contender) -> None:
        self._http = http
        self._url = f"{contender.url}/v1/chat/completions"
        self._headers = {"authorization": contender.authorization, "content-type": "application/json"}
        self._asked_count = 0
        """Every prompt begins with another number: routers send those that begin alike to one engine."""
        self.traces: list[Trace] = []
        self.probes: list[Trace] = []

    async def stream(self, token_count: int, delay_seconds: float, *, probe: bool = False) -> None:
        """One request to its end, or until it is given up."""
        load = Load(streamed=True, connection_count=1, token_count=token_count, pace_ms=PACE_MS)
        self._asked_count += 1
        words = [{"role": "user", "content": f"{self._asked_count}. {prompt(load)}"}]
        body = json.dumps({"model": MODEL, "messages": words, "max_tokens": token_count, "stream": True})
        await asyncio.sleep(delay_seconds)
        asked_at = time.monotonic()
        pieces: list[tuple[float, bytes]] = []
        refused, over_at = False, None
        try:
            async with self._http.post(self._url, data=body.encode(), headers=self._headers) as answer:
                refused = answer.status != 200
                while piece := await answer.content.readany():
                    pieces.append((time.monotonic(), piece))
            over_at = time.monotonic()
        except aiohttp.ClientError:
            # Cut off in the middle it is truncated; without any answer it has failed.
            over_at, refused = time.monotonic(), refused or not pieces
        finally:
            whole = b"".join(data for _, data in pieces)
            kept = self.probes if probe else self.traces
            kept.append(Trace(asked_at, tokens_of(pieces), over_at, ended(whole), refused or b'"error"' in whole))
