"""An attempt that its node cannot be told of."""

from __future__ import annotations

import asyncio

import pytest

from potluck_coordinator.gateway import node_session
from potluck_protocol.errors import ErrorCode, PotluckError
from tests.support.request_path import pool, request_of, settled_balance


async def test_of_an_attempt_that_cannot_be_sent_nothing_stays_held(tmp_path, monkeypatch):
    monkeypatch.setattr(node_session, "ATTEMPTS_PER_NODE_MAX", 0)
    async with pool(tmp_path) as (coordinator, node):
        before = await settled_balance(coordinator)
        with pytest.raises(PotluckError) as failure:
            await asyncio.wait_for(coordinator.gateway.requests.begin(await request_of(coordinator)), 5)
        assert failure.value.code is ErrorCode.NO_CAPACITY
        assert node.starts() == []
        after = await settled_balance(coordinator)
        assert (after.available_micro_credits, after.held_micro_credits) == (before.available_micro_credits, 0)
