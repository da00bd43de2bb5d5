"""What Ray is given to come up with: its environment on a machine of our own, and which settings a cluster of several cannot serve with.

Decides that our own Ray is on loopback, asks for a token, and gives way to nobody. It must not import Ray.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from potluck_coordinator.settings import Settings
from potluck_protocol.connection import is_loopback_host
from potluck_protocol.errors import ErrorCode, PotluckError


def ray_environment(settings: Settings) -> Mapping[str, str]:
    """What Ray must find in its environment before it is imported; a cluster joined by address has its own."""
    if settings.ray_address is not None:
        return {}
    return private_ray(settings.ray_token_file)


def private_ray(token_file: Path) -> Mapping[str, str]:
    """Of a Ray of our own on this machine."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(_token_file(token_file)),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's word for "this machine only": its address becomes 127.0.0.1, which `_node_ip_address` would not do.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Any free port; the fixed default would collide with another coordinator's.
        "AUTOSCALER_METRIC_PORT": "0",
        # Ray's workers give way to everything else on the machine (niceness 15), and for these two everything else waits.
        "RAY_worker_niceness": "0",
        # Ray's own out-of-memory killer would pick the gateway when something else fills the machine.
        "RAY_memory_monitor_refresh_ms": "0",
    }


def _token_file(path: Path) -> Path:
    """The file with Ray's token, 0600, made once."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return path


def check_host(settings: Settings, machine_count: int) -> None:
    """Raises INVALID_REQUEST for a host by which gateways on other machines would not be reached."""
    if min(machine_count, settings.gateways) > 1 and is_loopback_host(settings.host):
        raise PotluckError(
            ErrorCode.INVALID_REQUEST,
            f"The cluster has {machine_count} machines, and gateways on the others cannot be reached at {settings.host}: give "
            "--host 0.0.0.0, or this machine's own address in the cluster, for which every gateway takes that of its machine.",
        )
