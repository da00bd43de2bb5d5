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
NODE_HEADER: Final = "x-potluck-node"
COST_HEADER: Final = "x-potluck-cost-micro-credits"
CONNECTION_PATH: Final = "/pool/v1/connection"
"""Where a coordinator's HTTP port tells anyone how to reach its other two ports, and under which CA."""
