from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_protocol import identity
from potluck_protocol.channels import SERVER_NAME
from potluck_protocol.errors import ErrorCode, PotluckError
from tests.support.certificates import CLIENT, SERVER, bent_certificate

NOW = 1_800_000_000_000
MOMENT = datetime.fromtimestamp(NOW / 1000, UTC)
HOUR_MS = 3_600_000


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority.load_or_create(tmp_path_factory.mktemp("pool") / "ca", NOW)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(PotluckError) as caught:
        call()
    assert caught.value.code is ErrorCode.INVALID_CERTIFICATE
    return caught.value.message


def test_the_whole_way_from_key_to_certificate(authority: CertificateAuthority) -> None:
    key_pem = identity.new_private_key()
    spki = identity.public_key_of_request(identity.certificate_request(key_pem))
    assert spki == identity.public_key_der(key_pem)
    pem = authority.issue_node_certificate(spki, NOW).encode()
    node_id = identity.node_id_of_certificate(pem, NOW)
    assert node_id == identity.node_id_of_public_key(spki)
    assert len(node_id) == 26
    life = identity.certificate_life(pem)
    assert (life.valid_from_unix_ms, life.valid_until_unix_ms) == (NOW - 300_000, NOW + 24 * HOUR_MS)


def test_a_certificate_says_nothing_but_the_nodes_name(authority: CertificateAuthority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    wishes = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "operator")]))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://potluck/node/somebodyelse")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=3), critical=True)
        .sign(key, hashes.SHA256())
    )
    spki = identity.public_key_of_request(wishes.public_bytes(serialization.Encoding.DER))
    certificate = x509.load_pem_x509_certificate(authority.issue_node_certificate(spki, NOW).encode())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == [identity.node_uri(identity.node_id_of_public_key(spki))]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [CLIENT]
    assert certificate.subject == x509.Name([])


@pytest.mark.parametrize("age_ms", [-300_001, 24 * HOUR_MS, 1000 * HOUR_MS])
def test_outside_its_life_a_certificate_names_nobody(authority: CertificateAuthority, age_ms: int) -> None:
    pem = authority.issue_node_certificate(identity.public_key_der(identity.new_private_key()), NOW).encode()
    assert "not good at this time" in refused(lambda: identity.node_id_of_certificate(pem, NOW + age_ms))


STRANGE: dict[str, dict[str, object]] = {
    "no name": {"uris": []},
    "two names": {"uris": ["spiffe://potluck/node/a", "spiffe://potluck/node/b"]},
    "another's name": {"uris": ["spiffe://potluck/node/aaaaaaaaaaaaaaaaaaaaaaaaaa"]},
    "another scheme": {"uris": ["https://potluck/node/aaaaaaaaaaaaaaaaaaaaaaaaaa"]},
    "its name and a DNS name": {"other_names": [x509.DNSName(SERVER_NAME)]},
    "only a DNS name": {"uris": [], "other_names": [x509.DNSName(SERVER_NAME)]},
    "no extended key usage": {"usages": []},
    "for servers only": {"usages": [SERVER]},
    "a CA's": {"ca": True},
    "not yet good": {"starts_in": timedelta(minutes=1)},
    "no longer good": {"ends_in": timedelta(seconds=-1)},
}


@pytest.mark.parametrize("changes", STRANGE.values(), ids=STRANGE)
def test_strange_certificates_name_nobody(authority: CertificateAuthority, changes: dict[str, object]) -> None:
    credential = bent_certificate(authority, identity.new_private_key(), now=MOMENT, **changes)  # type: ignore[arg-type]
    refused(lambda: identity.node_id_of_certificate(credential.certificate_pem, NOW))


def test_the_builder_of_strange_certificates_also_makes_a_good_one(authority: CertificateAuthority) -> None:
    key_pem = identity.new_private_key()
    credential = bent_certificate(authority, key_pem, now=MOMENT, common_name="ignored")
    assert identity.node_id_of_certificate(credential.certificate_pem, NOW) == identity.node_id_of_public_key(
        identity.public_key_der(key_pem)
    )


def test_the_servers_certificate_is_no_nodes(authority: CertificateAuthority) -> None:
    server = authority.issue_server_certificate(NOW)
    refused(lambda: identity.node_id_of_certificate(server.certificate_chain_pem, NOW))
    certificate = x509.load_pem_x509_certificate(server.certificate_chain_pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [SERVER_NAME]
    assert server.private_key_pem.decode() not in repr(server)


def _request(key: object) -> bytes:
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.DER)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "key",
    [ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)],
    ids=["Ed25519", "P-384", "RSA"],
)
def test_other_kinds_of_keys_are_refused(key: object) -> None:
    assert "P-256" in refused(lambda: identity.public_key_of_request(_request(key)))


def test_a_request_for_a_key_one_does_not_have_is_refused() -> None:
    mine, theirs = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    der = _request(mine)
    spki = [
        key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo) for key in (mine, theirs)
    ]
    assert spki[0] in der
    assert "not signed" in refused(lambda: identity.public_key_of_request(der.replace(spki[0], spki[1])))


def outcome(request_der: bytes) -> ErrorCode | None:
    try:
        identity.public_key_of_request(request_der)
    except PotluckError as error:
        return error.code
    return None


@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 255))
def test_damaged_requests_raise_nothing_else(junk: bytes, position: int, value: int) -> None:
    whole = bytearray(REQUEST)
    whole[position % len(whole)] = value
    for candidate in (junk, bytes(whole), b"\0" * 5000):
        assert outcome(candidate) in {None, ErrorCode.INVALID_CERTIFICATE}


REQUEST = identity.certificate_request(identity.new_private_key())


@pytest.mark.parametrize("pem", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_text_that_is_no_certificate_names_nobody(pem: bytes) -> None:
    refused(lambda: identity.node_id_of_certificate(pem, NOW))
