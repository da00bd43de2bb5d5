"""What the operator's settings come to at one gateway: its limits, and how it is reached.

Decides nothing else. It must not know who keeps to a limit.
"""

from __future__ import annotations

from potluck_coordinator.domain.admission import AdmissionLimits
from potluck_coordinator.domain.nodes import LivenessLimits
from potluck_coordinator.gateway.gate import TierLimits
from potluck_coordinator.gateway.requests import RequestLimits
from potluck_coordinator.rate_text import rate_limit
from potluck_coordinator.settings import Settings
from potluck_protocol.connection import is_loopback_host


def liveness_limits(settings: Settings) -> LivenessLimits:
    """The lease and its companions as the operator set them."""
    return LivenessLimits(
        lease_ttl_seconds=settings.lease_ttl_ms / 1000,
        heartbeat_busy_seconds=settings.heartbeat_busy_ms / 1000,
        heartbeat_idle_seconds=settings.heartbeat_idle_ms / 1000,
        link_grace_seconds=settings.link_grace_ms / 1000,
    )


def request_limits(settings: Settings) -> RequestLimits:
    """What requests are let in by, as the operator set it."""
    return RequestLimits(
        AdmissionLimits(settings.queue_length_max, settings.queue_deadline_seconds),
        TierLimits(
            rate_limit(settings.default_tier_rate),
            settings.default_tier_reserve_percent,
            settings.default_tier_first_token_seconds,
            is_shared=settings.gateways > 1,
        ),
    )


def link_address(settings: Settings, machine: str, port: int) -> str:
    """Where nodes reach a gateway on a machine of the cluster; without a host where that is whatever host a node knows the pool by."""
    host = settings.public_hosts.get(machine, machine)
    if is_loopback_host(host):
        host = settings.public_host or ""
    return host_port(host, port)


def host_port(host: str, port: int) -> str:
    """As addresses are written."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
