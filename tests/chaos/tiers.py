"""Show: the default tier keeps its promise while flex is flooded, and a client that has had its hour backs off as it is told.

    python -m tests.chaos.tiers [SECONDS]

starts a coordinator and two nodes with scripted engines as processes, floods flex at three times what they can do while one account
asks in the default tier at its own pace, then asks for one request more than an hour has, and lets OpenAI's own client wait for a short
window. It prints a line for each part and exits 1 if a promise is broken.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import httpx2
import openai

from tests.support.coordinator_process import CoordinatorProcess
from tests.support.pool_processes import MODEL, NodeProcess, Pool, command, new_invite, write_catalogue

FIRST_TOKEN_SECONDS = 2.0
"""The objective that the coordinator is started with."""
KEPT_SHARE_MIN = 0.95
HOUR_REQUESTS = 100
WINDOW_SECONDS = 5
"""Of the second coordinator, which gives an account three requests in that time."""
SCRIPT = {"tokens": [" a"], "token_count": 40, "ttft_ms": 50, "inter_token_ms": 50}
"""An answer holds its slot for two seconds: two nodes of eight slots make eight in a second."""
FLOOD_PER_SECOND = 24.0
POLITE_PER_SECOND = 1.5


@dataclass
class Flood:
    """What came of a flooded flex tier beside a default tier in use."""

    part: str = "flood"
    seconds: float = 0.0
    default_count: int = 0
    default_kept_count: int = 0
    default_first_token_seconds_worst: float = 0.0
    default_refused_count: int = 0
    flex_answered_count: int = 0
    flex_refused_count: int = 0
    flex_first_token_seconds_median: float = 0.0
    compliance_request_count: int = 0
    compliance_kept_count: int = 0
    tiers_told: tuple[str, ...] = ()
    broken: list[str] = field(default_factory=list)


@dataclass
class Hour:
    """What the request after an hour's last one is told, and how OpenAI's client waits."""

    part: str = "hour"
    answered_count: int = 0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    error_code: str = ""
    flex_after_status: int = 0
    told_seconds: list[float] = field(default_factory=list)
    slept_seconds: list[float] = field(default_factory=list)
    answered_after_waiting: bool = False
    broken: list[str] = field(default_factory=list)


def body(tier: str, **fields: object) -> dict[str, object]:
    return {"model": MODEL, "service_tier": tier, "max_tokens": 40, "messages": [{"role": "user", "content": "count"}], **fields}


class Asker:
    """Asks a pool over HTTP with one key; each answer's tier and time to its first token is written down."""

    def __init__(self, client: httpx2.AsyncClient, url: str, api_key: str, tier: str) -> None:
        self._client, self._url, self._api_key, self._tier = client, url, api_key, tier
        self.first_token_seconds: list[float] = []
        self.refused_count = 0
        self.tiers: set[str] = set()
        self.tasks: set[asyncio.Task[None]] = set()

    async def flood(self, per_second: float, seconds: float) -> None:
        """Open loop: whatever becomes of those before, the next one comes in its time."""
        began = time.monotonic()
        number = 0
        while (now := time.monotonic()) - began < seconds:
            task = asyncio.ensure_future(self._ask(number))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
            number += 1
            await asyncio.sleep(max(0.0, began + number / per_second - now))
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _ask(self, number: int) -> None:
        began = time.monotonic()
        request = body(self._tier, stream=True, user=f"{self._tier}-{number}")
        headers = {"authorization": f"Bearer {self._api_key}"}
        async with self._client.stream("POST", f"{self._url}/v1/chat/completions", json=request, headers=headers) as answer:
            if answer.status_code != httpx2.codes.OK:
                self.refused_count += 1
                return
            self.tiers.add(answer.headers["x-potluck-service-tier"])
            first = True
            async for line in answer.aiter_lines():
                if first and line.startswith("data: "):
                    first = False
                    self.first_token_seconds.append(time.monotonic() - began)
                    self.tiers.add(json.loads(line[6:])["service_tier"])


def new_key(pool: Pool, name: str) -> str:
    account_id = command(pool, "accounts", "create", name).stdout.split()[0]
    return command(pool, "keys", "create", "--account", account_id).stdout.strip()


async def flooded(pool: Pool, seconds: float) -> Flood:
    """The default tier at its pace beside a flex tier at three times what the nodes can do."""
    flooder, polite = new_key(pool, "flooder"), new_key(pool, "polite")
    limits = httpx2.Limits(max_connections=1000)
    async with httpx2.AsyncClient(limits=limits, timeout=120) as client:
        flex, default = Asker(client, pool.url, flooder, "flex"), Asker(client, pool.url, polite, "default")
        await asyncio.gather(flex.flood(FLOOD_PER_SECOND, seconds), default.flood(POLITE_PER_SECOND, seconds))
    kept = sum(each <= FIRST_TOKEN_SECONDS for each in default.first_token_seconds)
    told = json.loads(command(pool, "tiers", "--json").stdout)["hour"]
    found = Flood(
        seconds=seconds,
        default_count=len(default.first_token_seconds) + default.refused_count,
        default_kept_count=kept,
        default_first_token_seconds_worst=round(max(default.first_token_seconds, default=0.0), 3),
        default_refused_count=default.refused_count,
        flex_answered_count=len(flex.first_token_seconds),
        flex_refused_count=flex.refused_count,
        flex_first_token_seconds_median=round(sorted(flex.first_token_seconds)[len(flex.first_token_seconds) // 2], 3),
        compliance_request_count=told["request_count"],
        compliance_kept_count=told["kept_count"],
        tiers_told=tuple(sorted(default.tiers)),
    )
    if kept < KEPT_SHARE_MIN * found.default_count:
        found.broken.append(f"{kept} of {found.default_count} had their first token in {FIRST_TOKEN_SECONDS} s")
    if not found.flex_refused_count:
        found.broken.append("the flood was none: nobody of it was refused")
    if found.tiers_told != ("default",):
        found.broken.append(f"the default tier's answers say {found.tiers_told}")
    if found.compliance_request_count != found.default_count or abs(found.compliance_kept_count - kept) > max(
        1, 0.02 * found.default_count
    ):
        found.broken.append("the pool's own count of its promise is another")
    return found


def hour(pool: Pool) -> Hour:
    """One request more than an hour has."""
    api_key = new_key(pool, "hourly")
    found = Hour()
    with httpx2.Client(timeout=60, headers={"authorization": f"Bearer {api_key}"}) as client:

        def ask(tier: str) -> httpx2.Response:
            return client.post(f"{pool.url}/v1/chat/completions", json=body(tier, max_tokens=1))

        began = time.monotonic()
        for _ in range(HOUR_REQUESTS):
            found.answered_count += ask("default").status_code == httpx2.codes.OK
        refused = ask("default")
        elapsed = time.monotonic() - began
        found.flex_after_status = ask("auto").status_code
    found.status, found.error_code = refused.status_code, refused.json()["error"]["code"]
    found.headers = {name: value for name, value in refused.headers.items() if name.startswith(("retry-after", "x-ratelimit"))}
    expected = {"x-ratelimit-limit-requests": str(HOUR_REQUESTS), "x-ratelimit-remaining-requests": "0"}
    if found.answered_count != HOUR_REQUESTS or found.status != httpx2.codes.TOO_MANY_REQUESTS:
        found.broken.append(f"{found.answered_count} answered, then {found.status}")
    if any(found.headers.get(name) != value for name, value in expected.items()):
        found.broken.append(f"the headers say {found.headers}")
    retry_after = int(found.headers.get("retry-after", "0"))
    if not 3600 - elapsed - 2 <= retry_after <= 3600:
        found.broken.append(f"retry-after is {retry_after} s, and the first of the hour is {elapsed:.0f} s ago")
    if found.flex_after_status != httpx2.codes.OK:
        found.broken.append("without a tier, the request after the last one is not answered")
    return found


def backs_off(pool: Pool, found: Hour) -> None:
    """OpenAI's own client, whose retries are its own affair, against a window of seconds."""
    moments: list[tuple[float, int, float]] = []

    def note(response: httpx2.Response) -> None:
        moments.append((time.monotonic(), response.status_code, float(response.headers.get("retry-after-ms", "0")) / 1000))

    http_client = httpx2.Client(event_hooks={"response": [note]}, timeout=60)
    with openai.OpenAI(base_url=f"{pool.url}/v1", api_key=new_key(pool, "client"), max_retries=3, http_client=http_client) as client:
        for _ in range(4):
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "count"}], max_tokens=1, service_tier="default"
            )
    for (refused_at, status, told), (next_at, _, _) in pairwise(moments):
        if status == httpx2.codes.TOO_MANY_REQUESTS:
            found.told_seconds.append(told)
            found.slept_seconds.append(round(next_at - refused_at, 3))
    found.answered_after_waiting = bool(moments) and moments[-1][1] == httpx2.codes.OK
    if len(found.told_seconds) != 1 or not found.answered_after_waiting:
        found.broken.append(
            f"it was told {found.told_seconds} and the last answer was {moments[-1][1]}: one wait is enough where the time is true"
        )
    for told, slept in zip(found.told_seconds, found.slept_seconds, strict=True):
        if not told <= slept <= told + 1.0:
            found.broken.append(f"it was told {told} s and slept {slept} s")


def started(stack: ExitStack, folder: Path, *flags: str) -> Pool:
    """A coordinator with two nodes."""
    catalogue = write_catalogue(folder / "models", SCRIPT)
    coordinator = stack.enter_context(CoordinatorProcess(folder / "coordinator", "--catalogue", str(catalogue), *flags))
    coordinator.wait_ready()
    pool = Pool(folder, coordinator, [])
    for number in range(2):
        pool.nodes.append(stack.enter_context(NodeProcess(folder / f"node-{number}", new_invite(pool))))
    pool.wait_connected()
    return pool


def settings_file(folder: Path) -> str:
    file = folder / "settings.toml"
    file.write_text(f"default_tier_first_token_seconds = {FIRST_TOKEN_SECONDS}\n")
    return str(file)


def show(seconds: float) -> Iterator[Flood | Hour]:
    """All of it, with a flood of so many seconds."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        pool = started(stack, Path(name), "--settings", settings_file(Path(name)))
        yield asyncio.run(flooded(pool, seconds))
        told = hour(pool)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        pool = started(stack, Path(name), "--default-tier-rate", f"3 per {WINDOW_SECONDS} seconds")
        backs_off(pool, told)
    yield told


def main() -> int:
    """The whole show."""
    failed = False
    for part in show(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0):
        print(json.dumps(asdict(part)), flush=True)
        failed = failed or bool(part.broken)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
