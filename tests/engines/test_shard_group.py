"""Two owners' nodes serve a model that neither of them holds, and lose each other.

`python -m tests.engines.group_loss` does the same with every fault there is. A vLLM on one processor takes about a minute to start.
"""

from __future__ import annotations

import pytest

from tests.engines.alone import alone
from tests.engines.group_loss import form, lose
from tests.support import group_pool as pools
from tests.support.group_pool import group_pool, limit_bytes
from tests.support.large_model import large_folder

pytestmark = [
    pytest.mark.namespaces,
    pytest.mark.skipif(not pools.available(), reason="needs root, `ip netns` (Debian's iproute2) and memory control groups"),
    pytest.mark.timeout(1_500),
]


@pytest.fixture(scope="module")
def text_alone(vllm_engine):
    """What one process with all of this machine's memory says; asked before the members take theirs."""
    return alone(large_folder()).text


@pytest.fixture(scope="module")
def pool(tmp_path_factory, text_alone):
    with group_pool(tmp_path_factory.mktemp("group") / "pool", large_folder()) as running:
        yield running


@pytest.fixture(scope="module")
def formed(pool):
    return form(pool)


def test_one_process_with_as_much_memory_as_the_larger_member_is_killed_by_the_kernel(vllm_engine):
    model_folder = large_folder()
    one = alone(model_folder, limit_bytes(model_folder, "bob"))
    assert (one.text, one.failure, one.kernel_kill_count > 0) == ("", "out_of_memory", True)


def test_two_nodes_that_hold_it_together_say_what_one_process_with_all_the_memory_says(formed, text_alone):
    assert formed.text == text_alone
    assert formed.broken() == []


def test_a_group_listens_on_the_named_private_addresses_alone(pool, formed):
    for name, listeners in formed.listeners.items():
        assert {address for address, _ in listeners} <= {pool.nodes[name].host.address}
    assert formed.listeners["eve"] == []


@pytest.mark.parametrize("fault", ["member's agent"])
def test_a_lost_member_breaks_the_group_within_five_seconds_and_it_forms_anew(pool, formed, fault):
    loss = lose(pool, fault, formed.text)
    assert loss.broken() == [], loss
