"""The pool's own certificate authority.

Decides what every certificate of the pool says. It must not know who deserves one: enrolment asks for a node's certificate once it has
judged the node. Nothing but the public key of a request ever reaches a certificate.

The CA is made once, and its certificate is what invites and pinned URLs name by hash. A new CA would be a new pool.
"""

from __future__ import annotations

import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from potluck_coordinator.pool_desk import ServerIdentity
from potluck_protocol.channels import SERVER_NAME
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.identity import gateway_uri, new_private_key, node_id_of_public_key, node_uri, public_key_der
from potluck_protocol.private_files import write_private

NODE_LIFE: Final = timedelta(hours=24)
NODE_BACKDATE: Final = timedelta(minutes=5)
"""A volunteer's clock may be behind ours by as much."""
SERVER_LIFE: Final = timedelta(days=5 * 365)
"""Longer than any process runs: the key is made anew at each start and lives in memory only."""
CA_LIFE: Final = timedelta(days=20 * 365)
LONG_BACKDATE: Final = timedelta(days=1)

_KEY_FILE: Final = "ca.key"
_CERTIFICATE_FILE: Final = "ca.pem"
_DIGITAL_SIGNATURE_ONLY: Final = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
_CERTIFICATES_ONLY: Final = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


class CertificateAuthority:
    """Signs the pool's certificates; `load_or_create` makes one."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate
        self.ca_certificate_pem: Final = certificate.public_bytes(serialization.Encoding.PEM).decode()

    @classmethod
    def load_or_create(cls, folder: Path, now_unix_ms: int) -> CertificateAuthority:
        """The CA kept in the folder (0700, files 0600), made there at the first start, whole or not at all.

        Raises:
            PotluckError: INTERNAL_ERROR for a folder whose files are incomplete, damaged or not of one CA.
        """
        key_file, certificate_file = folder / _KEY_FILE, folder / _CERTIFICATE_FILE
        if not key_file.exists() and not certificate_file.exists():
            _create(folder, _moment(now_unix_ms))
        try:
            key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
            certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        except (FileNotFoundError, ValueError, TypeError) as error:
            raise _unusable(folder) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise _unusable(folder)
        return cls(key, certificate)

    def issue_node_certificate(self, public_key_spki_der: bytes, now_unix_ms: int) -> str:
        """A node's certificate, PEM, for 24 h: its name is the hash of its key."""
        key = serialization.load_der_public_key(public_key_spki_der)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise PotluckError(ErrorCode.INVALID_CERTIFICATE, "A node's key must be a P-256 key.")
        now = _moment(now_unix_ms)
        name = x509.UniformResourceIdentifier(node_uri(node_id_of_public_key(public_key_spki_der)))
        builder = self._leaf(key, name, ExtendedKeyUsageOID.CLIENT_AUTH)
        builder = builder.not_valid_before(now - NODE_BACKDATE).not_valid_after(now + NODE_LIFE)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()

    def issue_server_certificate(self, now_unix_ms: int) -> ServerIdentity:
        """A new key and certificate under which a gateway serves its gRPC and link ports."""
        return self._issue_identity(x509.DNSName(SERVER_NAME), ExtendedKeyUsageOID.SERVER_AUTH, now_unix_ms)

    def issue_gateway_certificate(self, epoch: int, now_unix_ms: int) -> ServerIdentity:
        """A new key and certificate by which a gateway shows other gateways who it is. Good for as long as its epoch is."""
        return self._issue_identity(x509.UniformResourceIdentifier(gateway_uri(epoch)), ExtendedKeyUsageOID.CLIENT_AUTH, now_unix_ms)

    def _issue_identity(self, name: x509.GeneralName, usage: x509.ObjectIdentifier, now_unix_ms: int) -> ServerIdentity:
        key_pem = new_private_key()
        key = serialization.load_der_public_key(public_key_der(key_pem))
        assert isinstance(key, ec.EllipticCurvePublicKey)
        now = _moment(now_unix_ms)
        builder = self._leaf(key, name, usage)
        builder = builder.not_valid_before(now - LONG_BACKDATE).not_valid_after(now + SERVER_LIFE)
        certificate = builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        return ServerIdentity(key_pem, certificate + self.ca_certificate_pem.encode(), self.ca_certificate_pem)

    def _leaf(self, key: ec.EllipticCurvePublicKey, name: x509.GeneralName, usage: x509.ObjectIdentifier) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            # Critical, because the subject is empty: the name is all there is.
            .add_extension(x509.SubjectAlternativeName([name]), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_DIGITAL_SIGNATURE_ONLY, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )


def _create(folder: Path, now: datetime) -> None:
    """Writes the files beside their place and moves the folder in, so that no crash leaves a key without its certificate."""
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = Path(tempfile.mkdtemp(prefix=".ca-", dir=folder.parent))  # 0700 by mkdtemp's promise
    try:
        key = ec.generate_private_key(ec.SECP256R1())
        key_pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        write_private(draft / _KEY_FILE, key_pem)
        write_private(draft / _CERTIFICATE_FILE, _self_signed(key, now).public_bytes(serialization.Encoding.PEM))
        draft.rename(folder)
    except OSError as error:
        if not (folder / _KEY_FILE).exists():
            raise PotluckError(
                ErrorCode.INTERNAL_ERROR, f"The CA cannot be kept in {folder} ({error.strerror}); choose another data folder."
            ) from error
        # Another start made it in the meantime: that one counts.
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _self_signed(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Potluck pool CA")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - LONG_BACKDATE)
        .not_valid_after(now + CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_CERTIFICATES_ONLY, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return builder.sign(key, hashes.SHA256())


def _moment(unix_ms: int) -> datetime:
    return datetime.fromtimestamp(unix_ms / 1000, UTC)


def _unusable(folder: Path) -> PotluckError:
    return PotluckError(
        ErrorCode.INTERNAL_ERROR,
        f"The CA in {folder} is incomplete or damaged. Bring both files back from a backup; a new CA would be a pool no node knows.",
    )
