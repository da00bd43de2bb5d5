"""The call that asks what the tiers are, and how their promise was kept.

Decides how the coordinator's counts become a result. It must not know how it is shown.
"""

from __future__ import annotations

from dataclasses import dataclass

from potluck.calls import POOL_SERVICE, Call
from potluck_protocol.v1 import pool_pb2


@dataclass(frozen=True, slots=True)
class PromiseKept:
    """Requests of the default tier in some time, and those whose first token came in time."""

    request_count: int
    kept_count: int

    @property
    def share(self) -> float | None:
        """Of those that were kept; None: there were none."""
        return self.kept_count / self.request_count if self.request_count else None


@dataclass(frozen=True, slots=True)
class TiersInfo:
    """The tiers of one pool, as one account has them."""

    default_request_count_max: int
    """Of one account in the default tier, within the window."""
    window_seconds: int
    remaining_request_count: int
    reset_seconds: float
    """Until there is room for one request more than that."""
    reserve_percent: int
    """Of each model's room, what flex leaves to the default tier."""
    first_token_seconds: float
    """What the default tier promises."""
    hour: PromiseKept
    day: PromiseKept
    thirty_days: PromiseKept


def get_tiers() -> Call[pool_pb2.GetTiersResponse, TiersInfo]:
    return Call(POOL_SERVICE + "GetTiers", pool_pb2.GetTiersRequest(), pool_pb2.GetTiersResponse, _tiers)


def _tiers(reply: pool_pb2.GetTiersResponse) -> TiersInfo:
    return TiersInfo(
        default_request_count_max=reply.default_request_count_max,
        window_seconds=reply.window_seconds,
        remaining_request_count=reply.remaining_request_count,
        reset_seconds=reply.reset_ms / 1000,
        reserve_percent=reply.reserve_percent,
        first_token_seconds=reply.first_token_ms / 1000,
        hour=_promise(reply.hour),
        day=_promise(reply.day),
        thirty_days=_promise(reply.thirty_days),
    )


def _promise(message: pool_pb2.PromiseKept) -> PromiseKept:
    return PromiseKept(message.request_count, message.kept_count)
