"""The agent's state folder: the node's key, its certificate, and what it must know to dial its coordinator.

Decides how these lie on disk, what of them counts as damaged, and that one folder has one agent. It must not know the network.

A folder counts as joined once `node.json` is there; it is written last. The key is kept when a join fails half-way, because the same key
with the same invite gets the same node.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from cryptography.exceptions import UnsupportedAlgorithm

from potluck_protocol.connection import ConnectionDocument
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.identity import certificate_life, new_private_key, node_id_of_certificate, node_id_of_public_key, public_key_der
from potluck_protocol.private_files import read_json, write_private
from potluck_protocol.values import AccountId, NodeId

_KEY: Final = "node.key"
_CERTIFICATE: Final = "node.crt"
_IDENTITY: Final = "node.json"
_LOCK: Final = "lock"
LOCK_TRIES: Final = 10
LOCK_PAUSE_SECONDS: Final = 0.02
"""Who only looks whether an agent runs has the lock for a moment."""


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """Who this node is, and where its pool is."""

    node_id: NodeId
    owner_account_id: AccountId
    display_name: str
    url: str
    """The coordinator's HTTP URL with the CA's hash as its fragment."""
    connection: ConnectionDocument


class StateFolder:
    """One node's files. Nothing is created before something is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def joined(self) -> bool:
        """Whether this folder belongs to a node of a pool."""
        return (self.path / _IDENTITY).exists()

    def create(self) -> None:
        """Makes the folder, 0700; raises PotluckError(INVALID_REQUEST) where that fails."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.chmod(0o700)
        except OSError as error:
            raise PotluckError(
                ErrorCode.INVALID_REQUEST, f"The state folder {self.path} cannot be made ({error.strerror}); name another with --state-dir."
            ) from error

    def identity(self) -> NodeIdentity:
        """Who this node is.

        Raises:
            PotluckError: NOT_FOUND for a folder that has not joined, INVALID_REQUEST for one that is damaged.
        """
        try:
            fields = read_json(self.path / _IDENTITY)
            return NodeIdentity(
                node_id=NodeId(_text(fields, "node_id")),
                owner_account_id=AccountId(_text(fields, "owner_account_id")),
                display_name=_text(fields, "display_name"),
                url=_text(fields, "url"),
                connection=ConnectionDocument.from_json(json.dumps(fields["connection"]).encode()),
            )
        except FileNotFoundError:
            raise PotluckError(
                ErrorCode.NOT_FOUND,
                f"This machine has not joined a pool ({self.path} holds no node); run `potluck node join INVITE` first.",
            ) from None
        except (ValueError, KeyError, TypeError, RecursionError, PotluckError) as error:
            raise self._damaged(_IDENTITY) from error

    def write_identity(self, identity: NodeIdentity) -> None:
        """Makes this folder a node's, or renews what it knows."""
        fields = asdict(identity)
        write_private(self.path / _IDENTITY, json.dumps(fields, indent=1).encode())

    def proof(self, identity: NodeIdentity) -> tuple[bytes, bytes | None]:
        """What this node shows at a handshake: its key and its certificate, PEM; the certificate may have lapsed.

        None for a certificate that is missing, damaged or another node's: like a lapsed one it is replaced by proof of the key.

        Nobody else looks into them: gRPC ends the process for an empty file, and takes a wrong one for a coordinator that is not there.

        Raises:
            PotluckError: NOT_FOUND where the key is missing; INVALID_REQUEST where it is damaged or another node's, or where the identity
                names a CA that is none, or is not its pool's.
        """
        private_key_pem = self.private_key()
        if node_id_of_public_key(public_key_der(private_key_pem)) != identity.node_id:
            raise self._damaged(_KEY, "belongs to another node")
        try:
            certificate_life(identity.connection.ca_certificate_pem.encode())
            pin = urlsplit(identity.url).fragment
        except ValueError as error:
            raise self._damaged(_IDENTITY) from error
        if pin not in {"", identity.connection.ca_hash}:
            raise self._damaged(_IDENTITY, "names the CA of another pool")
        return private_key_pem, self._certificate_of(identity.node_id)

    def private_key(self) -> bytes:
        """The node's key, PEM; raises PotluckError(NOT_FOUND) without one, INVALID_REQUEST for one that is damaged."""
        private_key_pem = self._read(_KEY)
        try:
            public_key_der(private_key_pem)
        except (ValueError, TypeError, UnsupportedAlgorithm, PotluckError) as error:
            raise self._damaged(_KEY) from error
        return private_key_pem

    def made_private_key(self) -> bytes:
        """The node's key, made now if there is none: it is never replaced."""
        self.create()
        if not (self.path / _KEY).exists():
            write_private(self.path / _KEY, new_private_key())
        return self.private_key()

    def certificate(self) -> bytes:
        """The node's certificate, PEM; raises PotluckError(NOT_FOUND) without one."""
        return self._read(_CERTIFICATE)

    def _certificate_of(self, node_id: NodeId) -> bytes | None:
        try:
            certificate_pem = self.certificate()
            # At a time when it was good: whether it still is, is its owner's question.
            named = node_id_of_certificate(certificate_pem, certificate_life(certificate_pem).valid_from_unix_ms)
        except (ValueError, PotluckError):
            return None
        return certificate_pem if named == node_id else None

    def write_certificate(self, certificate_pem: str) -> None:
        """Keeps a new certificate."""
        write_private(self.path / _CERTIFICATE, certificate_pem.encode())

    def remove(self) -> None:
        """Removes the key and everything else: the node cannot come back under its name."""
        # The marker goes first: a removal that is cut off leaves a folder that has not joined.
        (self.path / _IDENTITY).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for one agent, while its process lives; raises PotluckError(ALREADY_EXISTS) where another has it."""
        self.create()
        descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not _taken(descriptor, LOCK_TRIES):
                raise PotluckError(
                    ErrorCode.ALREADY_EXISTS, f"Another agent is running on {self.path}; stop it, or use another folder with --state-dir."
                )
            yield
        finally:
            os.close(descriptor)

    @property
    def locked(self) -> bool:
        """Whether an agent is running on this folder."""
        if not (self.path / _LOCK).exists():
            return False
        descriptor = os.open(self.path / _LOCK, os.O_RDWR)
        try:
            return not _taken(descriptor, 1)
        finally:
            os.close(descriptor)

    def _read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            raise PotluckError(ErrorCode.NOT_FOUND, f"{self.path} holds no {name}; {self._way_back}") from None

    def _damaged(self, name: str, how: str = "is damaged") -> PotluckError:
        return PotluckError(ErrorCode.INVALID_REQUEST, f"{self.path / name} {how}; {self._way_back}")

    @property
    def _way_back(self) -> str:
        place = shlex.quote(str(self.path))
        return f"ask for a new invite, then: rm -r {place}; potluck node join --state-dir {place}"


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is no text")
    return value


def _taken(descriptor: int, try_count: int) -> bool:
    """Whether this process has the lock now; it lets go of it by closing the file."""
    for attempt in range(try_count):
        if attempt:
            time.sleep(LOCK_PAUSE_SECONDS)
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False
