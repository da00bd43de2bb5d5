"""Nodes say what they like of themselves: no word of theirs keeps the pool from being planned for."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from potluck_coordinator.directory.planner import Planner, PoolFacts
from potluck_coordinator.domain.fit.corrections import NOTHING_LEARNED
from potluck_protocol.hardware_codec import inventory_message, inventory_value
from potluck_protocol.values import (
    Accelerator,
    AccountId,
    EngineState,
    EngineStatus,
    GroupOffer,
    Inventory,
    ModelId,
    NodeState,
    ReplicaId,
)
from tests.support.planning import card_entry, machine_entry, node, wish

ENTRIES = {
    entry.model_id: entry
    for entry in (card_entry("8b"), card_entry("70b"), machine_entry("tiny"), card_entry("8b", "8b-gguf", engine_kinds=("llamacpp",)))
}
WISHES = (wish("8b", 2), wish("70b", 1), wish("tiny", None), wish("8b-gguf", 1))
small = st.integers(-(2**31), 2**31 - 1)
large = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, 1, 24 << 30, 64 << 30])
counts = st.integers(0, 2**31 - 1)
"""Less is refused at the link (`tests/unit/test_codec.py`)."""
sizes = st.integers(0, 2**63 - 1) | st.sampled_from([0, 1, 24 << 30, 64 << 30])
words = st.text(max_size=12) | st.sampled_from(["NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 4090", "GPU-0", "GPU-1", "8.6", "8.", "x.y"])
accelerators = st.builds(
    Accelerator,
    name=words,
    uuid=words,
    memory_bytes=large,
    compute_capability=words,
    pcie_width=st.none() | small,
    pcie_width_max=st.none() | small,
    pcie_generation_max=st.none() | small,
    power_limit_milliwatts=st.none() | small,
    numa_node=st.none() | small,
    nvlink_peer_uuids=st.lists(words, max_size=3).map(tuple),
    pcie_peer_uuids=st.lists(words, max_size=3).map(tuple),
)
inventories = st.builds(
    Inventory,
    operating_system=words,
    cpu_count=counts,
    memory_bytes=sizes,
    disk_free_bytes=sizes,
    accelerators=st.lists(accelerators, max_size=4).map(tuple),
    driver_version=words,
    cuda_version=words,
    memory_budget_bytes=sizes,
    engine_kinds=st.lists(st.sampled_from(["vllm", "llamacpp", "attach", "x"]), max_size=3).map(tuple),
    group_offer=st.none() | st.builds(GroupOffer, words, words | st.just("10.0.0.1"), small, st.lists(words.map(AccountId)).map(tuple)),
    attached_model_names=st.lists(words, max_size=2).map(tuple),
)
numbers = st.none() | counts
rates = st.none() | st.floats()
statuses = st.builds(
    EngineStatus,
    replica_id=st.sampled_from(["a/8b", "a/tiny", "b/70b", "group/70b/0", "x"]).map(ReplicaId),
    model_id=st.sampled_from(["8b", "tiny", "70b", "x"]).map(ModelId),
    state=st.sampled_from(EngineState),
    engine_kind=st.sampled_from(["vllm", "llamacpp", "x"]),
    engine_version=words,
    slot_count=counts,
    failure=words,
    kv_capacity_tokens=numbers,
    memory_utilization_percent=counts,
    prefill_tokens_per_second=rates,
    decode_tokens_per_second=rates,
    memory_bytes=numbers,
    prefill_past_tokens=counts,
    decode_past_tokens=counts,
    group_id=st.sampled_from(["", "group/70b/0"]),
    group_generation=counts,
)


@settings(max_examples=100, deadline=None, phases=set(Phase) - {Phase.explain})
@given(
    st.lists(st.tuples(inventories, st.sampled_from(NodeState), st.lists(statuses, max_size=3)), min_size=1, max_size=3),
    st.lists(inventories, min_size=3, max_size=3),
)
def test_whatever_nodes_say_there_is_a_plan_and_an_explanation(said, later):
    boxes = {}
    for name, (inventory, state, engines) in zip("abc", said, strict=False):
        boxes[name] = replace(node(name), inventory=inventory_value(inventory_message(inventory)), state=state, engines=tuple(engines))
    facts = PoolFacts(WISHES, ENTRIES, boxes)
    planner = Planner({}, {}, 0, NOTHING_LEARNED, 0.0)
    planner.advance(facts, 0.0)
    changed = {
        name: replace(box, inventory=inventory_value(inventory_message(new)))
        for (name, box), new in zip(boxes.items(), later, strict=False)
    }
    facts = PoolFacts(WISHES, ENTRIES, changed)
    wishes = planner.advance(facts, 400.0)
    assert wishes.engines.keys() == boxes.keys()
    for entry in ENTRIES:
        assert {verdict.node_id for verdict in planner.explain(facts, entry, 400.0)} == {box.node_id for box in boxes.values()}
    assert set(planner.standings(facts, 400.0)) == set(ENTRIES)
