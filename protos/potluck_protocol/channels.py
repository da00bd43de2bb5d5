"""gRPC's options for both ends: those that must be alike, and each end's own.

Decides when a connection counts as dead, how large a message may be, and how soon a channel that lost its coordinator tries again (a link's
dials are the agent's `domain.session`'s). It must not know what is called over a channel. Whether a node is alive is decided by heartbeats,
not here: gRPC answers keepalive pings even while the peer's event loop is blocked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

SERVER_NAME: Final = "coordinator.potluck"
"""The DNS name in the coordinator's certificate. Peers check for this name whatever address they dialled, because the pool's own CA signs
for one coordinator only and addresses of home and campus networks change."""

MESSAGE_BYTES_MAX: Final = 8 * 1024 * 1024
"""One frame at most. A request body is at most half of it, so whoever fills a frame bounds how many bodies go into it."""

WINDOW_BYTES: Final = 4 * 1024 * 1024
"""What one side may send before the other has read any of it."""

Options = list[tuple[str, int | str]]


def options_with(options: Options, changes: Mapping[str, int | str]) -> Options:
    """`options` with these values instead of its own: of two values for one name gRPC takes the first."""
    return list({**dict(options), **changes}.items())


_KEEPALIVE: Final[Options] = [
    # A peer that vanished without a word is noticed within about 15 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Without it a frozen peer is noticed after about 69 s whatever keepalive_timeout_ms says.
    ("grpc.http2.ping_timeout_ms", 5_000),
    # Also between calls, and however long nothing but pings is sent.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC would send a ping with nearly each small message to find out how wide the window should be: with a heartbeat a second that is a
    # third of what the heartbeat costs. The window is as wide as half a second of a 64 Mbit/s line instead.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
]

SERVER_OPTIONS: Final[Options] = [
    *_KEEPALIVE,
    # The default of 300 s would answer the agents' own pings with GOAWAY too_many_pings.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # A call carries a key and a request id.
    ("grpc.max_metadata_size", 4 * 1024),
    # Two processes sharing a port would split the nodes between a live coordinator and a dying one. Several gateways of one share theirs.
    ("grpc.so_reuseport", 0),
]

LINK_KEEPALIVE_MS: Final = 20_000
"""A link without a word for so long is pinged, which costs as much as a heartbeat. An idle agent says something every 9.25 s at most, and
hears an answer every 18.5 s; at both ends the lease tells of a loss sooner."""

LINK_SERVER_OPTIONS: Final = options_with(SERVER_OPTIONS, {"grpc.keepalive_time_ms": LINK_KEEPALIVE_MS})

CHANNEL_OPTIONS: Final[Options] = [
    *_KEEPALIVE,
    ("grpc.ssl_target_name_override", SERVER_NAME),
    ("grpc.default_authority", SERVER_NAME),
    # A coordinator that comes back is found within seconds; by default the pauses grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]

HANDSHAKE_MS_MAX: Final = 10_000
"""Until a link's connection stands. A thousand nodes that come back together wait for each other's handshakes: whoever gave up sooner and
came again would make the others wait for longer."""

LINK_CHANNEL_OPTIONS: Final = options_with(
    CHANNEL_OPTIONS,
    {
        "grpc.keepalive_time_ms": LINK_KEEPALIVE_MS,
        # A pool of its own: otherwise a new channel may be given the dead connection of the last one.
        "grpc.use_local_subchannel_pool": 1,
    },
)
"""A node's link has a channel of its own."""

# What gRPC calls a pause between attempts is the time that an attempt has, too.
PATIENT_LINK_CHANNEL_OPTIONS: Final = options_with(LINK_CHANNEL_OPTIONS, {"grpc.min_reconnect_backoff_ms": HANDSHAKE_MS_MAX})
"""Where a connection is known to be taken, so that silence means that the coordinator has much to do; elsewhere it may be a lost packet."""
