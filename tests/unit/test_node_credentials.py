"""What a node shows at a handshake is looked into first: gRPC ends the process for an empty file, and says nothing of a wrong one."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from typer.testing import CliRunner

from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_node import settings as node_settings
from potluck_node.command import app
from potluck_node.credentials import Credentials
from potluck_node.identity_store import NodeIdentity, StateFolder
from potluck_protocol.clock import SystemClock
from potluck_protocol.connection import ConnectionDocument, certificate_hash
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.identity import new_private_key, node_id_of_public_key, public_key_der
from potluck_protocol.values import AccountId
from tests.support.certificates import bent_certificate

clock = SystemClock()


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.load_or_create(tmp_path / "ca", clock.unix_ms())


@pytest.fixture
def folder(tmp_path: Path, authority: CertificateAuthority) -> StateFolder:
    """A node's, as a join leaves it; nothing answers where its coordinator was."""
    folder = StateFolder(tmp_path / "state of Ana")
    key_der = public_key_der(folder.made_private_key())
    folder.write_certificate(authority.issue_node_certificate(key_der, clock.unix_ms()))
    ca_pem = authority.ca_certificate_pem
    url = f"http://127.0.0.1:9#{certificate_hash(ca_pem)}"
    connection = ConnectionDocument(1, "pool", 9, 9, "127.0.0.1", ca_pem)
    folder.write_identity(NodeIdentity(node_id_of_public_key(key_der), AccountId("acct_ana"), "box", url, connection))
    return folder


def of_kind(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, password: bytes | None = None) -> bytes:
    sealing = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, sealing)


DAMAGE = {
    "empty": b"",
    "zeros": bytes(241),
    "garbage": b"garbage\n",
    "no text": b"\xff\xfe",
    "half of one": new_private_key()[:100],
    "nothing between": b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
}
KEYS = {
    **DAMAGE,
    "another node's": new_private_key(),
    "of another curve": of_kind(ec.generate_private_key(ec.SECP384R1())),
    "of another kind": of_kind(rsa.generate_private_key(65537, 2048)),
    "sealed": of_kind(ec.generate_private_key(ec.SECP256R1()), b"word"),
}


def way_back(folder: StateFolder) -> str:
    return f"ask for a new invite, then: rm -r '{folder.path}'; potluck node join --state-dir '{folder.path}'"


def refused(folder: StateFolder, file: str) -> PotluckError:
    """What the agent is told instead of a handshake."""
    with pytest.raises(PotluckError) as caught:
        Credentials(folder, clock, lambda: 0.0)
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    assert caught.value.message.startswith(f"{folder.path}/{file} ")
    assert caught.value.message.endswith(f"; {way_back(folder)}")
    return caught.value


def test_a_whole_folder_opens_a_channel(folder: StateFolder) -> None:
    assert Credentials(folder, clock, lambda: 0.0).valid_until_unix_ms > clock.unix_ms()


@pytest.mark.parametrize("content", KEYS.values(), ids=KEYS)
def test_a_key_that_is_not_the_nodes_is_told_with_what_mends_it(folder: StateFolder, content: bytes) -> None:
    (folder.path / "node.key").write_bytes(content)
    refused(folder, "node.key")


def is_renewed(folder: StateFolder) -> bool:
    """Whether the certificate counts as one that lapsed: then the next is fetched with the key before anything is dialled."""
    credentials = Credentials(folder, clock, lambda: 0.0)
    return credentials.renewal_due() and credentials.valid_until_unix_ms <= clock.unix_ms()


@pytest.mark.parametrize("content", [*DAMAGE.values(), None], ids=[*DAMAGE, "missing"])
def test_a_certificate_that_is_none_is_renewed_by_the_key(folder: StateFolder, content: bytes | None) -> None:
    (folder.path / "node.crt").unlink()
    if content is not None:
        (folder.path / "node.crt").write_bytes(content)
    assert is_renewed(folder)


def test_a_certificate_of_another_nodes_key_or_for_another_use_is_renewed(folder: StateFolder, authority: CertificateAuthority) -> None:
    assert not is_renewed(folder)
    other = public_key_der(new_private_key())
    folder.write_certificate(authority.issue_node_certificate(other, clock.unix_ms()))
    assert is_renewed(folder)
    folder.write_certificate(bent_certificate(authority, folder.private_key(), ca=True).certificate_pem.decode())
    assert is_renewed(folder)


def test_a_certificate_that_has_lapsed_is_no_damage_for_it_is_renewed_by_the_key(
    folder: StateFolder, authority: CertificateAuthority
) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=90)
    folder.write_certificate(authority.issue_node_certificate(public_key_der(folder.private_key()), int(long_ago.timestamp() * 1000)))
    assert is_renewed(folder)


def test_a_ca_that_is_none_or_another_pools_is_told(folder: StateFolder, tmp_path: Path) -> None:
    identity = folder.identity()
    other = CertificateAuthority.load_or_create(tmp_path / "other", clock.unix_ms()).ca_certificate_pem
    none = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    for ca_pem, words in ((other, "names the CA of another pool"), (none, "is damaged")):
        folder.write_identity(replace(identity, connection=replace(identity.connection, ca_certificate_pem=ca_pem)))
        assert words in str(refused(folder, "node.json"))
    folder.write_identity(replace(identity, url="http://[::1"))
    assert "is damaged" in str(refused(folder, "node.json"))


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_a_join_does_not_go_on_with_a_damaged_key(tmp_path: Path, content: bytes) -> None:
    folder = StateFolder(tmp_path / "state")
    folder.create()
    (folder.path / "node.key").write_bytes(content)
    with pytest.raises(PotluckError, match=r"node\.key is damaged; ask for a new invite, then: rm -r"):
        folder.made_private_key()


@pytest.mark.parametrize("content", [b"", b"garbage\n", None], ids=["empty", "garbage", "missing"])
def test_the_agent_ends_with_one_line_and_the_doctor_fails(
    folder: StateFolder, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    file = "node.key"
    monkeypatch.setattr(node_settings, "config_path", lambda: folder.path / "node.toml")
    if content is None:
        (folder.path / file).unlink()
    else:
        (folder.path / file).write_bytes(content)
    place = ["--state-dir", str(folder.path)]
    for command in (["run"], ["leave"]):
        answered = CliRunner().invoke(app, [*command, *place])
        assert (answered.exit_code, answered.stderr.count("\n")) == (1, 1), answered.stderr
        assert file in answered.stderr
        assert way_back(folder) in answered.stderr
    examined = CliRunner().invoke(app, ["doctor", *place])
    assert examined.exit_code == 2
    (line,) = [line for line in examined.stdout.splitlines() if line.startswith("FAIL  node ")]
    assert file in line
    assert line.endswith(f"→ end the agent if it runs, {way_back(folder)}")
    assert CliRunner().invoke(app, ["leave", "--force", *place]).exit_code == 0
    assert not folder.path.exists()
