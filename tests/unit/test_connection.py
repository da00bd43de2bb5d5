from __future__ import annotations

import base64
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_protocol import connection
from potluck_protocol.connection import ConnectionDocument, Invite, certificate_hash, fetch_connection, is_loopback_host, pinned_url
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import TokenId
from potluck_protocol.version import PROTOCOL_VERSION

NOW = 1_800_000_000_000
SECRET = "s" * 43


@pytest.fixture(scope="module")
def ca_pem(tmp_path_factory: pytest.TempPathFactory) -> str:
    return CertificateAuthority.load_or_create(tmp_path_factory.mktemp("a") / "ca", NOW).ca_certificate_pem


@pytest.fixture(scope="module")
def other_ca_pem(tmp_path_factory: pytest.TempPathFactory) -> str:
    return CertificateAuthority.load_or_create(tmp_path_factory.mktemp("b") / "ca", NOW).ca_certificate_pem


def document(ca_pem: str, **changes: object) -> dict[str, object]:
    fields = {"protocol_version": 1, "pool_id": "pool", "grpc_port": 8601, "link_port": 8602, "host": None, "ca_certificate_pem": ca_pem}
    return fields | changes


class Served:
    """An HTTP server that answers every GET alike and remembers the paths."""

    def __init__(self) -> None:
        self.status = 200
        self.body = b""
        self.headers: dict[str, str] = {}
        self.paths: list[str] = []
        self.drip_seconds = 0.0
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                served.paths.append(self.path)
                self.send_response(served.status)
                for name, value in served.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(served.body)))
                self.end_headers()
                if not served.drip_seconds:
                    self.wfile.write(served.body)
                    return
                with suppress(OSError):
                    for byte in served.body:
                        self.wfile.write(bytes([byte]))
                        time.sleep(served.drip_seconds)

            def log_message(self, *args: object) -> None:
                del args

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def show(self, fields: dict[str, object]) -> None:
        self.body = json.dumps(fields).encode()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    thread = threading.Thread(target=served.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield served
    served.server.shutdown()
    served.server.server_close()
    thread.join()


def refused(call: Callable[[], object], code: ErrorCode) -> str:
    with pytest.raises(PotluckError) as caught:
        call()
    assert caught.value.code is code
    return caught.value.message


def outcome(call: Callable[[], object]) -> ErrorCode | None:
    try:
        call()
    except PotluckError as error:
        return error.code
    return None


def test_fetches_the_document_and_fills_in_the_host(served: Served, ca_pem: str) -> None:
    served.show(document(ca_pem))
    found = fetch_connection(served.url + "/", certificate_hash(ca_pem))
    assert served.paths == ["/pool/v1/connection"]
    assert (found.grpc_target, found.link_target) == ("127.0.0.1:8601", "127.0.0.1:8602")
    assert ssl.PEM_cert_to_DER_cert(found.ca_certificate_pem) == ssl.PEM_cert_to_DER_cert(ca_pem)


def test_the_document_survives_its_own_json(ca_pem: str) -> None:
    original = ConnectionDocument(1, "pool", 1, 65535, "fd00::1", ca_pem)
    again = ConnectionDocument.from_json(original.to_json())
    assert again.ca_hash == original.ca_hash
    assert again.grpc_target == "[fd00::1]:1"


def test_the_documents_own_host_wins(served: Served, ca_pem: str) -> None:
    served.show(document(ca_pem, host="pool.example.org"))
    assert fetch_connection(served.url).grpc_target == "pool.example.org:8601"


def test_another_ca_than_the_pin_is_refused(served: Served, ca_pem: str, other_ca_pem: str) -> None:
    served.show(document(other_ca_pem))
    assert "another CA" in refused(lambda: fetch_connection(served.url, certificate_hash(ca_pem)), ErrorCode.INVALID_CERTIFICATE)
    refused(lambda: fetch_connection(pinned_url(served.url, certificate_hash(ca_pem))), ErrorCode.INVALID_CERTIFICATE)


def test_a_second_certificate_behind_the_pinned_one_is_refused(served: Served, ca_pem: str, other_ca_pem: str) -> None:
    # ssl.PEM_cert_to_DER_cert reads base64 up to the first padding: only the pinned certificate. OpenSSL would trust both.
    padded = ca_pem.replace("\n-----END", "=\n-----END") if "=" not in ca_pem else ca_pem
    for text in (ca_pem + other_ca_pem, padded + other_ca_pem, ca_pem.rstrip() + "\n" + other_ca_pem, "junk\n" + ca_pem):
        served.show(document(text))
        refused(lambda: fetch_connection(served.url, certificate_hash(ca_pem)), ErrorCode.COORDINATOR_UNAVAILABLE)


def test_what_was_hashed_is_what_is_handed_on(served: Served, ca_pem: str) -> None:
    served.show(document(ca_pem.replace("\n", "\r\n")))
    assert fetch_connection(served.url, certificate_hash(ca_pem)).ca_certificate_pem.strip() == ca_pem.strip()


def test_plain_http_to_another_host_needs_a_pin() -> None:
    message = refused(lambda: fetch_connection("http://192.0.2.1:8600"), ErrorCode.INVALID_REQUEST)
    assert "pin" in message


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8600", "ftp://127.0.0.1", "http://", "http://host:port", "http://a b", "http://u:p@host", "file:///x"]
)
def test_urls_that_are_none_are_refused(url: str) -> None:
    refused(lambda: fetch_connection(url), ErrorCode.INVALID_REQUEST)


def test_a_damaged_pin_is_not_taken_for_none(served: Served, ca_pem: str) -> None:
    served.show(document(ca_pem))
    refused(lambda: fetch_connection(served.url + "#abc"), ErrorCode.INVALID_REQUEST)
    assert served.paths == []


def test_redirects_are_not_followed(served: Served, ca_pem: str) -> None:
    served.show(document(ca_pem))
    served.status, served.headers = 302, {"Location": served.url + "/elsewhere"}
    assert "302" in refused(lambda: fetch_connection(served.url), ErrorCode.COORDINATOR_UNAVAILABLE)
    assert served.paths == ["/pool/v1/connection"]


@pytest.mark.parametrize(
    "change",
    [
        {"grpc_port": 0},
        {"grpc_port": "8601"},
        {"link_port": True},
        {"host": "a/b"},
        {"host": 5},
        {"ca_certificate_pem": "x"},
        {"pool_id": ""},
    ],
)
def test_documents_with_wrong_fields_are_refused(served: Served, ca_pem: str, change: dict[str, object]) -> None:
    served.show(document(ca_pem, **change))
    refused(lambda: fetch_connection(served.url), ErrorCode.COORDINATOR_UNAVAILABLE)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"null", b"\xff", b"{}", b"[" * 100_000])
def test_other_servers_are_not_coordinators(served: Served, body: bytes) -> None:
    served.body = body
    refused(lambda: fetch_connection(served.url), ErrorCode.COORDINATOR_UNAVAILABLE)


def test_a_coordinator_serves_the_version_before_its_own_and_no_older(served: Served, ca_pem: str) -> None:
    served.show(document(ca_pem, protocol_version=PROTOCOL_VERSION + 1))
    assert fetch_connection(served.url).protocol_version == PROTOCOL_VERSION + 1
    served.show(document(ca_pem, protocol_version=PROTOCOL_VERSION + 2))
    refused(lambda: fetch_connection(served.url), ErrorCode.PROTOCOL_VERSION_UNSUPPORTED)


def test_a_dripping_answer_is_given_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FETCH_LIMIT_SECONDS", 0.2)
    served.body, served.drip_seconds = b" " * 1000, 0.02
    assert "TimeoutError" in refused(lambda: fetch_connection(served.url), ErrorCode.COORDINATOR_UNAVAILABLE)


def test_an_endless_answer_is_given_up(served: Served) -> None:
    served.body = b" " * (connection.DOCUMENT_BYTES_MAX + 1)
    assert "too large" in refused(lambda: fetch_connection(served.url), ErrorCode.COORDINATOR_UNAVAILABLE)


def test_nobody_there_is_named(served: Served) -> None:
    served.server.server_close()
    assert "cannot be reached" in refused(lambda: fetch_connection(served.url), ErrorCode.COORDINATOR_UNAVAILABLE)


def test_loopback_never_goes_through_a_proxy(served: Served, ca_pem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    served.show(document(ca_pem))
    assert fetch_connection(served.url).pool_id == "pool"


def test_an_invite_survives_the_paste(ca_pem: str) -> None:
    invite = Invite("http://192.168.1.7:8600", certificate_hash(ca_pem), TokenId("abcdefghijkl"), SECRET)
    text = invite.encode()
    assert Invite.parse(f"  {text[:40]}\n   {text[40:]}\r\n") == invite
    assert SECRET not in repr(invite)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda text: "", "begin"),
        (lambda text: text[1:], "begin"),
        (lambda text: text[:-20], "secret"),
        (lambda text: text.rpartition(".")[0], "parts"),
        (lambda text: text + ".x", "parts"),
        (lambda text: text.replace(".", "..", 1), "parts"),
        (lambda text: text.replace(text.split(".")[1], "!!"), "address"),
        (lambda text: text.replace(text.split(".")[1], base64.urlsafe_b64encode(b"ftp://x").decode().rstrip("=")), "address"),
        (lambda text: text.replace(text.split(".")[2], "a" * 51), "CA hash"),
        (lambda text: text.replace("abcdefghijkl", "a"), "token"),
        (lambda text: text + "x" * 5000, "long"),
    ],
)
def test_a_damaged_invite_says_which_part(ca_pem: str, damage: Callable[[str], str], word: str) -> None:
    text = Invite("http://192.168.1.7:8600", certificate_hash(ca_pem), TokenId("abcdefghijkl"), SECRET).encode()
    message = refused(lambda: Invite.parse(damage(text)), ErrorCode.INVALID_INVITE)
    assert word in message
    assert SECRET not in message


@given(st.text(max_size=200) | st.text(alphabet="potluck1.aZ0-_=", max_size=300).map(lambda text: "potluck1." + text))
def test_parsing_raises_nothing_else(text: str) -> None:
    assert outcome(lambda: Invite.parse(text)) in {None, ErrorCode.INVALID_INVITE}


@given(
    st.binary(max_size=300)
    | st.dictionaries(st.text(max_size=20), st.integers() | st.text(max_size=20)).map(lambda d: json.dumps(d).encode())
)
def test_reading_a_document_raises_nothing_else(body: bytes) -> None:
    with pytest.raises(PotluckError):
        ConnectionDocument.from_json(body)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.9", True),
        ("::1", True),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("10.0.0.1", False),
    ],
)
def test_loopback_is_known_by_address(host: str, *, expected: bool) -> None:
    assert is_loopback_host(host) is expected


def test_the_module_needs_only_the_standard_library() -> None:
    text = Path(connection.__file__).read_text()
    assert "cryptography" not in text
