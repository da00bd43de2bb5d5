from __future__ import annotations

import asyncio

import pytest

from potluck_coordinator.desks import KeyIdentity
from potluck_coordinator.gateway import key_cache
from potluck_coordinator.gateway.key_cache import KEY_CHARACTERS_MAX, REFUSED_SECONDS, REMEMBERED_SECONDS, KeyCache
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, KeyPrefix

GOOD = "sk-potluck-abcdefgh-" + "x" * 43


class MovableClock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic_seconds(self) -> float:
        return self.seconds

    def unix_ms(self) -> int:
        return int(self.seconds * 1000)


class Directory:
    """Counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.expires_at_unix_ms = 0
        self.generation = 1
        self.gate: asyncio.Event | None = None

    async def authenticate(self, secret: str) -> KeyIdentity:
        self.asked.append(secret)
        if self.gate is not None:
            await self.gate.wait()
        if not secret.startswith(GOOD):
            raise PotluckError(ErrorCode.INVALID_API_KEY)
        return KeyIdentity(KeyPrefix("abcdefgh"), AccountId("acct_a"), operator=False, expires_at_unix_ms=self.expires_at_unix_ms)


@pytest.fixture
def clock() -> MovableClock:
    return MovableClock()


@pytest.fixture
def directory() -> Directory:
    return Directory()


@pytest.fixture
def cache(directory: Directory, clock: MovableClock) -> KeyCache:
    return KeyCache(directory.authenticate, lambda: directory.generation, clock)


async def refused(cache: KeyCache, header: str | None) -> None:
    with pytest.raises(PotluckError) as caught:
        await cache.identify(header)
    assert caught.value.code is ErrorCode.INVALID_API_KEY
    assert "x" * 43 not in caught.value.message


async def test_a_good_key_is_asked_for_once_a_minute(cache: KeyCache, directory: Directory, clock: MovableClock) -> None:
    for _ in range(3):
        assert (await cache.identify(f"Bearer {GOOD}")).account_id == "acct_a"
    assert (await cache.identify(f"bearer  {GOOD}")).account_id == "acct_a"
    assert len(directory.asked) == 1
    clock.seconds += REMEMBERED_SECONDS
    await cache.identify(f"Bearer {GOOD}")
    assert len(directory.asked) == 2


async def test_a_refused_key_is_asked_for_once_in_a_while(cache: KeyCache, directory: Directory, clock: MovableClock) -> None:
    for _ in range(5):
        await refused(cache, "Bearer sk-potluck-bad")
    assert len(directory.asked) == 1
    await cache.identify(f"Bearer {GOOD}")
    await refused(cache, "Bearer sk-potluck-worse")
    assert len(directory.asked) == 3
    clock.seconds += REFUSED_SECONDS
    await refused(cache, "Bearer sk-potluck-bad")
    assert len(directory.asked) == 4
    directory.generation += 1
    await refused(cache, "Bearer sk-potluck-bad")
    assert len(directory.asked) == 5


async def test_a_directory_that_is_away_refuses_nobody(clock: MovableClock) -> None:
    async def away(_secret: str) -> KeyIdentity:
        raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE)

    cache = KeyCache(away, lambda: 1, clock)
    with pytest.raises(PotluckError):
        await cache.identify(f"Bearer {GOOD}")
    assert len(cache) == 0


async def test_the_memory_of_refused_keys_is_bounded(cache: KeyCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_cache, "REMEMBERED_MAX", 3)
    for number in range(10):
        await refused(cache, f"Bearer sk-potluck-{number}")
    assert len(cache) == 3


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        GOOD,
        f"Basic {GOOD}",
        "Bearer sk-other-1",
        f"Bearer {GOOD}{'y' * KEY_CHARACTERS_MAX}",
        "Bearer sk-potluck-é",
    ],
)
async def test_what_cannot_be_a_key_does_not_reach_the_directory(cache: KeyCache, directory: Directory, header: str | None) -> None:
    await refused(cache, header)
    assert directory.asked == []


async def test_a_revocation_anywhere_empties_the_memory(cache: KeyCache, directory: Directory) -> None:
    await cache.identify(f"Bearer {GOOD}")
    directory.generation += 1
    await cache.identify(f"Bearer {GOOD}")
    assert len(directory.asked) == 2


async def test_an_answer_from_before_a_revocation_is_not_kept(cache: KeyCache, directory: Directory) -> None:
    directory.gate = asyncio.Event()
    waiting = asyncio.ensure_future(cache.identify(f"Bearer {GOOD}"))
    await asyncio.sleep(0)
    directory.generation += 1
    directory.gate.set()
    await waiting
    assert len(cache) == 0


async def test_expiry_counts_although_the_key_is_remembered(cache: KeyCache, directory: Directory, clock: MovableClock) -> None:
    directory.expires_at_unix_ms = clock.unix_ms() + 5000
    await cache.identify(f"Bearer {GOOD}")
    clock.seconds += 5
    await cache.identify(f"Bearer {GOOD}")
    assert len(directory.asked) == 2


async def test_the_memory_is_bounded(cache: KeyCache, directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_cache, "REMEMBERED_MAX", 3)
    for number in range(5):
        await cache.identify(f"Bearer {GOOD}{number}")
    assert len(cache) == 3
    await cache.identify(f"Bearer {GOOD}4")
    assert len(directory.asked) == 5
    await cache.identify(f"Bearer {GOOD}0")
    assert len(directory.asked) == 6


async def test_secrets_are_not_kept(cache: KeyCache) -> None:
    await cache.identify(f"Bearer {GOOD}")
    assert GOOD not in repr(vars(cache))
