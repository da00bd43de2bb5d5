"""Two owners' nodes serve a model that neither of them holds, and lose each other.

`python -m tests.engines.group_loss` does the same with every fault there is. A vLLM on one processor takes about a minute to start.
"""

from __future__ import annotations

import pytest

from tests.engines.group_loss import form, lose
from tests.support import namespaces
from tests.support.group_pool import group_pool

pytestmark = [
    pytest.mark.namespaces,
    pytest.mark.skipif(not namespaces.available(), reason="needs root and `ip netns` (Debian's iproute2)"),
    pytest.mark.timeout(1_500),
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory, text_of_one_process):
    with group_pool(tmp_path_factory.mktemp("group") / "pool") as running:
        yield running


@pytest.fixture(scope="module")
def formed(pool):
    return form(pool)


def test_two_nodes_that_hold_it_together_say_what_one_process_says(formed, text_of_one_process):
    assert formed.text == text_of_one_process
    assert formed.broken() == []


def test_a_group_listens_on_the_named_private_addresses_alone(pool, formed):
    for name, listeners in formed.listeners.items():
        assert {address for address, _ in listeners} <= {pool.nodes[name].host.address}
    assert formed.listeners["eve"] == []


@pytest.mark.parametrize("fault", ["member's agent"])
def test_a_lost_member_breaks_the_group_within_five_seconds_and_it_forms_anew(pool, formed, fault):
    loss = lose(pool, fault, formed.text)
    assert loss.broken() == [], loss
