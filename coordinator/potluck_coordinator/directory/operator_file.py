"""The file by which the command line on the coordinator's own machine acts as the operator.

Decides its form and its permissions. It must not know whether the key in it is good.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from potluck_protocol.connection import is_loopback_host, pinned_url
from potluck_protocol.private_files import read_json, write_private

if TYPE_CHECKING:
    from potluck_coordinator.settings import Settings


def local_url(settings: Settings, ca_hash: str) -> str:
    """Where this machine reaches the HTTP port; beyond loopback a plain one is pinned, for clients take no other."""
    scheme = "http" if settings.http_tls_certificate is None else "https"
    host = settings.public_host if scheme == "https" and settings.public_host else _loopback(settings.host)
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.http_port}"
    return url if scheme == "https" or is_loopback_host(host) else pinned_url(url, ca_hash)


def known_operator_key(path: Path) -> str | None:
    """The key in the file; None for no file, or none that can be understood."""
    try:
        document = read_json(path)
    except (OSError, ValueError):
        return None
    api_key = document.get("api_key") if isinstance(document, dict) else None
    return api_key if isinstance(api_key, str) else None


def write_operator_file(path: Path, url: str, api_key: str) -> None:
    """Writes the file whole or not at all, readable by its owner only."""
    write_private(path, json.dumps({"url": url, "api_key": api_key}).encode() + b"\n")


def _loopback(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
