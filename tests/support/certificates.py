"""Certificates as the pool would never make them: every field can be bent, to see that it is refused."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_protocol import identity

CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH
SERVER = ExtendedKeyUsageOID.SERVER_AUTH


@dataclass(frozen=True)
class Credential:
    """A private key with its certificate, both PEM."""

    key_pem: bytes
    certificate_pem: bytes


def bent_certificate(
    authority: CertificateAuthority,
    key_pem: bytes,
    *,
    uris: list[str] | None = None,
    other_names: list[x509.GeneralName] | None = None,
    usages: list[x509.ObjectIdentifier] | None = None,
    starts_in: timedelta = timedelta(minutes=-5),
    ends_in: timedelta = timedelta(hours=24),
    ca: bool = False,
    common_name: str = "",
    now: datetime | None = None,
) -> Credential:
    """A certificate signed by the authority's real key. `usages=[]` leaves extended key usage out; `uris=None` is the key's own name."""
    moment = now or datetime.now(UTC)
    public_key = serialization.load_der_public_key(identity.public_key_der(key_pem))
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    if uris is None:
        uris = [identity.node_uri(identity.node_id_of_public_key(identity.public_key_der(key_pem)))]
    names: list[x509.GeneralName] = [*(x509.UniformResourceIdentifier(uri) for uri in uris), *(other_names or [])]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(x509.load_pem_x509_certificate(authority.ca_certificate_pem.encode()).subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment + starts_in)
        .not_valid_after(moment + ends_in)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    if usages is None:
        usages = [CLIENT]
    if usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    certificate = builder.sign(authority._key, hashes.SHA256())
    return Credential(key_pem, certificate.public_bytes(serialization.Encoding.PEM))
