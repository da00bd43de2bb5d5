"""`potluck coordinator refused` on folders with no pool in them, and beside a coordinator that runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from potluck_coordinator.data_folder import locked
from potluck_coordinator.domain.lethal import LethalRequest
from potluck_coordinator.refused_command import NODES_GO_ON, refused
from potluck_coordinator.settings import Settings
from potluck_coordinator.storage.store import Store
from potluck_protocol.culprits import FINGERPRINT_BYTES, Fingerprint
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, AttemptId

POSTGRESQL = "postgresql+psycopg://nobody@127.0.0.1:1/none"


def pool_in(folder: Path) -> Settings:
    """Of a coordinator that has served there once."""
    settings = Settings(data_dir=folder)
    store = Store(settings.database_url)
    store.migrate()
    store.close()
    settings.fingerprint_key_file.write_bytes(b"k" * 32)
    return settings


async def test_a_folder_without_a_pool_is_said_to_be_none_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for settings in (
        Settings(data_dir=tmp_path),
        Settings(data_dir=tmp_path / "none"),
        Settings(data_dir=tmp_path, database_url=POSTGRESQL),
    ):
        with pytest.raises(PotluckError, match=r"There is no pool in .*; name its folder with --data-dir") as failure:
            await refused(settings, None)
        assert failure.value.code is ErrorCode.NOT_FOUND
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


async def test_a_pool_without_its_books_gets_no_new_ones(tmp_path: Path) -> None:
    settings = pool_in(tmp_path)
    (tmp_path / "potluck.db").unlink()
    with pytest.raises(PotluckError, match="There is no pool"):
        await refused(settings, "all")
    assert not (tmp_path / "potluck.db").exists()


async def test_beside_a_coordinator_that_runs_nothing_is_read_whatever_its_database(tmp_path: Path) -> None:
    settings = pool_in(tmp_path)
    assert await refused(settings, None) == ["No request is refused for good."]
    with locked(settings):
        for busy in (settings, settings.model_copy(update={"database_url": POSTGRESQL})):
            with pytest.raises(PotluckError, match=r"coordinator runs on .*; stop it first") as failure:
                await refused(busy, None)
            assert failure.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
    assert await refused(settings, "all") == ["0 refused no longer, 0 suspected no longer."]


@pytest.mark.parametrize("url", ["nonsense", "postgresql://user:secret@host:port/name"])
async def test_a_database_url_that_is_none_is_said_to_be_none_without_its_text(tmp_path: Path, url: str) -> None:
    with pytest.raises(PotluckError, match="The database URL cannot be used") as failure:
        await refused(Settings(data_dir=tmp_path, database_url=url), None)
    assert failure.value.code is ErrorCode.INVALID_REQUEST
    assert "secret" not in failure.value.message


async def test_what_is_lifted_is_told_apart_from_what_was_only_suspected(tmp_path: Path) -> None:
    settings = pool_in(tmp_path)
    names = [bytes([number]) * FINGERPRINT_BYTES for number in range(4)]
    store = Store(settings.database_url)
    for name, refused_at in zip(names, (5, 6, None, None), strict=True):
        known = LethalRequest(Fingerprint(name), AttemptId("a"), AccountId("ann"), 1, refused_at)
        await store.run(lambda work, known=known: work.lethal_requests.put(known))
    store.close()
    number, suspect = names[0].hex(), names[2].hex()
    assert await refused(settings, suspect) == [f"{suspect} was not refused, only suspected; it is no longer."]
    assert await refused(settings, number.upper()) == [f"{number.upper()} is refused no longer.", NODES_GO_ON]
    for gone in (number, suspect, "nonsense"):
        with pytest.raises(PotluckError, match=f"No request {gone} is refused"):
            await refused(settings, gone)
    assert await refused(settings, "all") == ["1 refused no longer, 1 suspected no longer.", NODES_GO_ON]
    assert await refused(settings, "all", as_json=True) == ['{\n  "lifted_count": 0,\n  "forgotten_suspect_count": 0\n}']
