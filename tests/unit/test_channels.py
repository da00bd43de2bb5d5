"""gRPC ignores an option whose name it does not know: a misspelt one is found here or by users."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpc._cython import cygrpc

from potluck_protocol.channels import PATIENT_LINK_CHANNEL_OPTIONS, SERVER_OPTIONS


@pytest.mark.parametrize("name", sorted({name for name, _ in [*PATIENT_LINK_CHANNEL_OPTIONS, *SERVER_OPTIONS]}))
def test_the_library_knows_every_option(name):
    assert name.encode() in Path(cygrpc.__file__).read_bytes()
