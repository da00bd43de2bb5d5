"""Who a node is: its key, the request that proves the key, and the certificate that names it.

Decides what a node's identity consists of and which certificates carry one. It must not know the CA's key, nodes' status or any table: a
certificate that passes here may still be a revoked node's.

A node id is the hash of its public key, so nobody can take another's name. P-256 only: Ed25519 client certificates fail gRPC's handshake.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import NodeId

NODE_URI_PREFIX: Final = "spiffe://potluck/node/"
GATEWAY_URI_PREFIX: Final = "spiffe://potluck/gateway/"
REQUEST_BYTES_MAX: Final = 4 * 1024
_NODE_ID_CHARACTERS: Final = 26
_ONE_NAME: Final = "The certificate does not carry exactly one name, that of its own key's node."


@dataclass(frozen=True, slots=True)
class CertificateLife:
    """When a certificate is good."""

    valid_from_unix_ms: int
    valid_until_unix_ms: int


def new_private_key() -> bytes:
    """A new P-256 key as PKCS#8 PEM. Keep it by `private_files.write_private`; it leaves the machine never."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_key_der(private_key_pem: bytes) -> bytes:
    """The SubjectPublicKeyInfo of a key made by `new_private_key`."""
    return _spki(serialization.load_pem_private_key(private_key_pem, password=None).public_key())


def certificate_request(private_key_pem: bytes) -> bytes:
    """A PKCS#10 request, DER, signed by the key. It says nothing else: the coordinator takes only the public key from it."""
    key = serialization.load_pem_private_key(private_key_pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("a node's key is a P-256 key")
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def node_id_of_public_key(spki_der: bytes) -> NodeId:
    """The id that belongs to a public key."""
    digest = hashlib.sha256(spki_der).digest()
    return NodeId(base64.b32encode(digest).decode().lower()[:_NODE_ID_CHARACTERS])


def node_uri(node_id: NodeId) -> str:
    """The URI that a node's certificate carries."""
    return NODE_URI_PREFIX + node_id


def gateway_uri(epoch: int) -> str:
    """The URI that a gateway shows to other gateways."""
    return f"{GATEWAY_URI_PREFIX}{epoch}"


def public_key_of_request(certificate_request_der: bytes) -> bytes:
    """The SubjectPublicKeyInfo, DER, of a request whose signature proves possession of the key.

    Raises:
        PotluckError: INVALID_CERTIFICATE for a request that is malformed, badly signed, or for another kind of key than P-256.
    """
    if len(certificate_request_der) > REQUEST_BYTES_MAX:
        raise PotluckError(ErrorCode.INVALID_CERTIFICATE, "The certificate request is too large.")
    try:
        request = x509.load_der_x509_csr(certificate_request_der)
        signed = request.is_signature_valid
        key = request.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion) as error:
        raise PotluckError(
            ErrorCode.INVALID_CERTIFICATE, "The certificate request cannot be read; make a new key and join again."
        ) from error
    if not signed:
        raise PotluckError(ErrorCode.INVALID_CERTIFICATE, "The certificate request is not signed by its own key.")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise PotluckError(ErrorCode.INVALID_CERTIFICATE, "A node's key must be a P-256 key.")
    return _spki(key)


def node_id_of_certificate(certificate_pem: bytes, now_unix_ms: int) -> NodeId:
    """The node that a certificate names. Who signed it was for the TLS handshake to decide.

    Raises:
        PotluckError: INVALID_CERTIFICATE unless the certificate is good now, is for client authentication, is no CA's, and carries exactly
            one URI, which is the one that belongs to its own public key.
    """
    key, uri = _client_of(certificate_pem, now_unix_ms)
    node_id = node_id_of_public_key(key)
    if uri != node_uri(node_id):
        raise PotluckError(ErrorCode.INVALID_CERTIFICATE, _ONE_NAME)
    return node_id


def gateway_epoch_of_certificate(certificate_pem: bytes, now_unix_ms: int) -> int:
    """The epoch of the gateway that a certificate names; raises PotluckError(INVALID_CERTIFICATE) as `node_id_of_certificate` does."""
    _, uri = _client_of(certificate_pem, now_unix_ms)
    epoch = uri.removeprefix(GATEWAY_URI_PREFIX)
    if epoch == uri or not epoch.isdecimal():
        raise PotluckError(ErrorCode.INVALID_CERTIFICATE, "The certificate is not a gateway's.")
    return int(epoch)


def _client_of(certificate_pem: bytes, now_unix_ms: int) -> tuple[bytes, str]:
    """The SubjectPublicKeyInfo and the one URI of a client's certificate that is good now."""
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        key = certificate.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise PotluckError(ErrorCode.INVALID_CERTIFICATE, "The certificate is not a node's certificate of this pool.") from error
    life = certificate_life(certificate_pem)
    if not life.valid_from_unix_ms <= now_unix_ms < life.valid_until_unix_ms:
        raise PotluckError(
            ErrorCode.INVALID_CERTIFICATE, "The node's certificate is not good at this time; renew it, and check both sides' clocks."
        )
    uris = [name.value for name in names if isinstance(name, x509.UniformResourceIdentifier)]
    if len(list(names)) != 1 or len(uris) != 1:
        raise PotluckError(ErrorCode.INVALID_CERTIFICATE, _ONE_NAME)
    if ExtendedKeyUsageOID.CLIENT_AUTH not in list(usage) or constraints.ca:
        raise PotluckError(ErrorCode.INVALID_CERTIFICATE, "The certificate is not one for a client.")
    return _spki(key), uris[0]


def certificate_life(certificate_pem: bytes) -> CertificateLife:
    """From when until when a certificate is good; raises ValueError for text that is none."""
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    return CertificateLife(
        valid_from_unix_ms=int(certificate.not_valid_before_utc.timestamp() * 1000),
        valid_until_unix_ms=int(certificate.not_valid_after_utc.timestamp() * 1000),
    )


def _spki(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise PotluckError(ErrorCode.INVALID_CERTIFICATE, "A node's key must be a P-256 key.")
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
