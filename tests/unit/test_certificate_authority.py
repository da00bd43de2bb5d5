from __future__ import annotations

import threading
from pathlib import Path

import pytest

from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_protocol.errors import ErrorCode, PotluckError

NOW = 1_800_000_000_000


def test_it_is_made_once_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "ca"
    made = CertificateAuthority.load_or_create(folder, NOW)
    assert CertificateAuthority.load_or_create(folder, NOW + 10**9).ca_certificate_pem == made.ca_certificate_pem
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {(entry.name, entry.stat().st_mode & 0o777) for entry in folder.iterdir()} == {("ca.key", 0o600), ("ca.pem", 0o600)}
    assert [entry.name for entry in folder.parent.iterdir()] == ["ca"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "ca").mkdir()
    CertificateAuthority.load_or_create(tmp_path / "ca", NOW)
    assert (tmp_path / "ca" / "ca.key").exists()


def test_starts_that_race_agree_on_one(tmp_path: Path) -> None:
    found: list[str] = []
    ready = threading.Barrier(8)

    def start() -> None:
        ready.wait()
        found.append(CertificateAuthority.load_or_create(tmp_path / "ca", NOW).ca_certificate_pem)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["ca"]


@pytest.mark.parametrize("victim", ["ca.key", "ca.pem"])
@pytest.mark.parametrize("damage", ["remove", "junk", "exchange"])
def test_a_damaged_ca_is_never_replaced(tmp_path: Path, victim: str, damage: str) -> None:
    CertificateAuthority.load_or_create(tmp_path / "ca", NOW)
    CertificateAuthority.load_or_create(tmp_path / "other", NOW)
    path = tmp_path / "ca" / victim
    match damage:
        case "remove":
            path.unlink()
        case "junk":
            path.write_bytes(b"junk")
        case _:
            path.write_bytes((tmp_path / "other" / victim).read_bytes())
    with pytest.raises(PotluckError) as caught:
        CertificateAuthority.load_or_create(tmp_path / "ca", NOW)
    assert caught.value.code is ErrorCode.INTERNAL_ERROR
    assert "backup" in caught.value.message
