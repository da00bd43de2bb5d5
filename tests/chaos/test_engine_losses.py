"""A sample of what `tests.chaos.engine_loss` shows in full: all but the waiting for half a minute of silence, and for a breaker."""

from __future__ import annotations

import pytest

from tests.chaos import engine_loss
from tests.support.pool_processes import running_pool


@pytest.mark.timeout(240)
def test_an_engine_that_dies_or_does_not_fit_is_soon_back_and_one_request_kills_no_third(tmp_path):
    pool_of = running_pool(
        tmp_path,
        node_module="tests.support.starved_agent",
        with_llamacpp=True,
        llamacpp_context_tokens=engine_loss.CONTEXT_TOKENS,
    )
    with pool_of as pool:
        for fault in (engine_loss.starve, engine_loss.kill, engine_loss.kill_by_request):
            assert fault(pool).broken == ()
