"""How a peer finds a pool and knows that it is the right one: the connection document, invites and the CA's hash.

Decides what is trusted before the first secret is sent. It must need nothing that the base SDK, which uses it, does not need anyway.

The pin is the sha256 of the CA certificate's DER. Whatever was hashed is also what is handed on: the PEM text is decoded strictly and
written anew, so that text which two parsers read differently cannot smuggle in a second CA.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import json
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field, replace
from hmac import compare_digest
from http.client import HTTPException
from typing import Final
from urllib.parse import SplitResult, urlsplit, urlunsplit

from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.metadata import CONNECTION_PATH
from potluck_protocol.values import TokenId
from potluck_protocol.version import PROTOCOL_VERSION

FETCH_LIMIT_SECONDS: Final = 10.0
DOCUMENT_BYTES_MAX: Final = 64 * 1024
CA_HASH_CHARACTERS: Final = 52
_INVITE_SCHEME: Final = "potluck1"
_INVITE_CHARACTERS_MAX: Final = 2048
_PEM_HEADER: Final = "-----BEGIN CERTIFICATE-----"
_PEM_FOOTER: Final = "-----END CERTIFICATE-----"
_BASE32: Final = frozenset("abcdefghijklmnopqrstuvwxyz234567")
_BASE64URL: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


@dataclass(frozen=True, slots=True)
class ConnectionDocument:
    """What a coordinator's HTTP port says of its other two ports."""

    protocol_version: int
    pool_id: str
    grpc_port: int
    link_port: int
    host: str | None
    """None: the host of the URL that the document came from. `fetch_connection` always fills it in."""
    ca_certificate_pem: str

    @property
    def ca_hash(self) -> str:
        """The pin of this pool."""
        return certificate_hash(self.ca_certificate_pem)

    @property
    def grpc_target(self) -> str:
        """Where SDKs and joining nodes dial; only of a fetched document."""
        return self._target(self.grpc_port)

    @property
    def link_target(self) -> str:
        """Where agents dial their link; only of a fetched document."""
        return self._target(self.link_port)

    def _target(self, port: int) -> str:
        if self.host is None:
            raise ValueError("the document names no host; take it from fetch_connection, which fills it in")
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"

    def to_json(self) -> bytes:
        """The body of the connection route."""
        return json.dumps(
            {
                "protocol_version": self.protocol_version,
                "pool_id": self.pool_id,
                "grpc_port": self.grpc_port,
                "link_port": self.link_port,
                "host": self.host,
                "ca_certificate_pem": self.ca_certificate_pem,
            }
        ).encode()

    @classmethod
    def from_json(cls, body: bytes) -> ConnectionDocument:
        """The document of a body; raises PotluckError(COORDINATOR_UNAVAILABLE) for anything else.

        The certificate in it is the canonical text of exactly one certificate.
        """
        try:
            fields = json.loads(body)
            document = cls(
                protocol_version=_integer(fields, "protocol_version", 1, 1_000_000),
                pool_id=_text(fields, "pool_id"),
                grpc_port=_integer(fields, "grpc_port", 1, 65_535),
                link_port=_integer(fields, "link_port", 1, 65_535),
                host=_optional_host(fields),
                ca_certificate_pem=_canonical_pem(_text(fields, "ca_certificate_pem")),
            )
        except (AttributeError, TypeError, KeyError, ValueError, RecursionError) as error:
            raise PotluckError(
                ErrorCode.COORDINATOR_UNAVAILABLE,
                "What answers at this URL is not a Potluck coordinator's HTTP port; check the address and the port.",
            ) from error
        return document


@dataclass(frozen=True, slots=True)
class Invite:
    """One string that carries a pool's address, its CA's hash and a single-use join token."""

    url: str
    ca_hash: str
    token_id: TokenId
    token_secret: str = field(repr=False)

    def encode(self) -> str:
        """The string to hand to a volunteer."""
        url = base64.urlsafe_b64encode(self.url.encode()).rstrip(b"=").decode()
        return f"{_INVITE_SCHEME}.{url}.{self.ca_hash}.{self.token_id}.{self.token_secret}"

    @classmethod
    def parse(cls, text: str) -> Invite:
        """The invite in a pasted string, whose line breaks and blanks are ignored.

        Raises:
            PotluckError: INVALID_INVITE, naming what is wrong with it but quoting none of it.
        """
        compact = "".join(text[: _INVITE_CHARACTERS_MAX * 2].split())
        if len(compact) > _INVITE_CHARACTERS_MAX:
            raise _bad_invite("it is too long")
        parts = compact.split(".")
        if parts[0] != _INVITE_SCHEME:
            raise _bad_invite(f'it does not begin with "{_INVITE_SCHEME}."')
        if len(parts) != 5:
            raise _bad_invite(f"it has {len(parts)} parts where there are 5")
        _, encoded_url, ca_hash, token_id, token_secret = parts
        try:
            raw = encoded_url.encode("ascii")
            url = base64.b64decode(raw + b"=" * (-len(raw) % 4), altchars=b"-_", validate=True).decode()
            url = _checked_url(url).geturl()
        except (ValueError, PotluckError) as error:
            raise _bad_invite("its address part is damaged") from error
        if not _is_ca_hash(ca_hash):
            raise _bad_invite("its CA hash part is damaged")
        if not 8 <= len(token_id) <= 32 or not set(token_id) <= _BASE64URL:
            raise _bad_invite("its token part is damaged")
        if not 32 <= len(token_secret) <= 64 or not set(token_secret) <= _BASE64URL:
            raise _bad_invite("its secret part is damaged")
        return cls(url, ca_hash, TokenId(token_id), token_secret)


def certificate_hash(certificate_pem: str) -> str:
    """The pin of a CA: sha256 of its certificate's DER, lower base32 without padding.

    Raises:
        ValueError: the text is not exactly one PEM certificate.
    """
    digest = hashlib.sha256(_certificate_der(certificate_pem)).digest()
    return base64.b32encode(digest).decode().rstrip("=").lower()


def pinned_url(url: str, ca_hash: str) -> str:
    """The URL with the pin as its fragment, as the coordinator prints it for clients on other machines."""
    return urlunsplit(urlsplit(url)._replace(fragment=ca_hash))


def is_loopback_host(host: str) -> bool:
    """Whether the name stands for this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def fetch_connection(url: str, ca_hash: str | None = None) -> ConnectionDocument:
    """The connection document behind a coordinator's URL, once it is known to be the right coordinator's.

    Blocks; gives up after 10 s without a byte, or of a body that does not end.

    Args:
        url: the HTTP base URL, perhaps with the pin as its fragment (`http://host:port#PIN`).
        ca_hash: the pin an invite carries.

    Returns:
        The document with `host` filled in and `ca_certificate_pem` in canonical form.

    Raises:
        PotluckError: INVALID_REQUEST for a URL that cannot be used safely, COORDINATOR_UNAVAILABLE where no coordinator answers,
            INVALID_CERTIFICATE where one answers with another CA than the pin says, PROTOCOL_VERSION_UNSUPPORTED.
    """
    address = _checked_url(url)
    host = address.hostname or ""
    pins = {pin for pin in (ca_hash, address.fragment) if pin}
    for pin in pins:
        if not _is_ca_hash(pin):
            raise PotluckError(ErrorCode.INVALID_REQUEST, "The pin after # in the URL is damaged; copy the whole URL again.", param="url")
    if len(pins) > 1:
        raise PotluckError(ErrorCode.INVALID_REQUEST, "The URL carries another pin than the one given beside it.", param="url")
    if address.scheme == "http" and not pins and not is_loopback_host(host):
        raise PotluckError(
            ErrorCode.INVALID_REQUEST,
            f"http://{host} cannot be trusted without a pin; use the URL with # and the CA's hash that the coordinator prints, or https.",
            param="url",
        )
    base = urlunsplit(address._replace(fragment="")).rstrip("/")
    document = ConnectionDocument.from_json(_fetched_body(base + CONNECTION_PATH, base, host))
    if not document.protocol_version - 1 <= PROTOCOL_VERSION <= document.protocol_version:
        raise PotluckError(
            ErrorCode.PROTOCOL_VERSION_UNSUPPORTED,
            f"The coordinator speaks protocol version {document.protocol_version}, this side {PROTOCOL_VERSION}; upgrade the older.",
        )
    for pin in pins:
        if not compare_digest(pin, document.ca_hash):
            raise PotluckError(
                ErrorCode.INVALID_CERTIFICATE,
                f"{base} answers with another CA than this invite or URL was made for: it is another pool, or someone in between. "
                "Nothing secret was sent. Ask the operator for a new invite or URL.",
            )
    return replace(document, host=document.host or host)


def _opener(host: str) -> urllib.request.OpenerDirector:
    # Without the redirect handler that build_opener adds: a redirect could lead from a trusted address to one that nobody vouched for.
    opener = urllib.request.OpenerDirector()
    handlers: list[urllib.request.BaseHandler] = [
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ]
    if not is_loopback_host(host):
        # Loopback is trusted because no other machine takes part; a proxy would.
        handlers.append(urllib.request.ProxyHandler())
    for handler in handlers:
        opener.add_handler(handler)
    return opener


def _fetched_body(document_url: str, base: str, host: str) -> bytes:
    deadline = time.monotonic() + FETCH_LIMIT_SECONDS
    body = b""
    try:
        with _opener(host).open(document_url, timeout=FETCH_LIMIT_SECONDS) as response:
            while piece := response.read1(DOCUMENT_BYTES_MAX):
                body += piece
                if len(body) > DOCUMENT_BYTES_MAX:
                    raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, f"{base} is not a Potluck coordinator: its answer is too large.")
                if time.monotonic() > deadline:
                    raise TimeoutError
    except urllib.error.HTTPError as error:
        error.close()
        raise PotluckError(
            ErrorCode.COORDINATOR_UNAVAILABLE,
            f"{base} answers HTTP {error.code} where a Potluck coordinator shows its connection document; check the address.",
        ) from None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise PotluckError(
            ErrorCode.COORDINATOR_UNAVAILABLE,
            f"{base} cannot be reached ({reason}); is the coordinator running there (`potluck coordinator serve`), and the address right?",
        ) from error
    return body


def _checked_url(url: str) -> SplitResult:
    try:
        address = urlsplit(url)
        port_is_number = address.port is None or address.port > 0
    except ValueError:
        address, port_is_number = SplitResult("", "", "", "", ""), False
    usable = address.scheme in {"http", "https"} and port_is_number and address.hostname and _is_host(address.hostname)
    if not usable or address.username is not None or address.query:
        raise PotluckError(ErrorCode.INVALID_REQUEST, "The URL must look like http://host:port or https://host.", param="url")
    return address


def _canonical_pem(certificate_pem: str) -> str:
    return ssl.DER_cert_to_PEM_cert(_certificate_der(certificate_pem))


def _certificate_der(certificate_pem: str) -> bytes:
    text = certificate_pem.strip()
    if not text.startswith(_PEM_HEADER) or not text.endswith(_PEM_FOOTER) or text.count("-----") != 4:
        raise ValueError("not exactly one PEM certificate")
    body = "".join(text[len(_PEM_HEADER) : -len(_PEM_FOOTER)].split())
    try:
        # Strict: ssl.PEM_cert_to_DER_cert stops at the first padding and ignores whatever follows.
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error


def _is_ca_hash(text: str) -> bool:
    return len(text) == CA_HASH_CHARACTERS and set(text) <= _BASE32


def _is_host(host: str) -> bool:
    return 0 < len(host) <= 253 and host.isascii() and all(character.isalnum() or character in "-._:%" for character in host)


def _optional_host(fields: dict[str, object]) -> str | None:
    host = fields.get("host")
    if host is None:
        return None
    if not isinstance(host, str) or not _is_host(host):
        raise ValueError("host")
    return host


def _text(fields: dict[str, object], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str) or not value:
        raise ValueError(name)
    return value


def _integer(fields: dict[str, object], name: str, lowest: int, highest: int) -> int:
    value = fields[name]
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise ValueError(name)
    return value


def _bad_invite(reason: str) -> PotluckError:
    return PotluckError(ErrorCode.INVALID_INVITE, f"This is not a whole invite: {reason}. Copy it again, from potluck1 to its last letter.")
