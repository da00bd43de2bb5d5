"""Names of gRPC metadata keys and HTTP headers.

Decides how they are spelt, once for all who write or read them.
"""

from __future__ import annotations

from typing import Final

AUTHORIZATION: Final = "authorization"
"""`Bearer KEY`, in gRPC metadata and HTTP alike."""
ERROR_DETAIL: Final = "potluck-error-bin"
"""Trailing metadata: an `ErrorDetail` message."""
REQUEST_ID: Final = "x-request-id"
IDEMPOTENCY_KEY: Final = "idempotency-key"
"""In gRPC metadata and HTTP alike: the same key of the same account is one request, however often it is sent."""
WHEN_GONE: Final = "potluck-when-gone"
"""gRPC metadata beside a key: "finish" (else) or "cancel", what becomes of the answer when its client has gone."""
REPLAYED_HEADER: Final = "idempotent-replayed"
"""In an answer that somebody else's request, with the same key, was the first to get."""
TRUST_HEADER: Final = "x-potluck-trust"
"""Of an HTTP request: `TRUST_REQUIRED` and nothing else, for it to run on trusted nodes or be refused."""
TRUST_REQUIRED: Final = "required"
NODE_HEADER: Final = "x-potluck-node"
TIER_HEADER: Final = "x-potluck-service-tier"
COST_HEADER: Final = "x-potluck-cost-micro-credits"
CONNECTION_PATH: Final = "/pool/v1/connection"
"""Where a coordinator's HTTP port tells anyone how to reach its other two ports, and under which CA."""
