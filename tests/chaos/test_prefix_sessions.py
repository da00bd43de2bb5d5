"""A sample of what `tests.chaos.prefix_sessions` shows in full: where conversations go. How long they wait is the command's to show."""

from __future__ import annotations

import pytest

from tests.chaos.prefix_sessions import CACHED_SHARE_MIN, converse, session_pool


@pytest.mark.timed  # places by measured speeds: a conversation rightly leaves a replica that others on the machine slow down
@pytest.mark.timeout(400)
async def test_conversations_find_the_replica_that_has_read_them(tmp_path):
    async with session_pool(tmp_path) as pool:
        talked = await converse(pool, sessions=2, turns=3)
    share = {policy: outcome.cached_share for policy, outcome in talked.items()}
    assert share["ours"] >= CACHED_SHARE_MIN * share["oracle"], share
    assert share["ours"] > share["round robin"], share
