"""Which models are asked of groups, and why each node has, or has not, a replica."""

from __future__ import annotations

from dataclasses import replace

from potluck_coordinator.domain.planning.explain import Verdict, explain, standing
from potluck_coordinator.domain.planning.plan import drafted, plan
from potluck_coordinator.domain.planning.words import (
    Trouble,
)
from potluck_protocol.rest import RestCause
from potluck_protocol.values import ModelId, NodeId, NodeState
from tests.support.planning import GIB, card_entry, cards, machine_entry, node, status, view, wish

TINY, OTHER = machine_entry("tiny"), machine_entry("other")
REFUSED = Trouble("not allowed here", refused=True)


# Groups.


def test_a_model_that_no_node_holds_is_asked_of_a_group_and_one_that_some_node_holds_is_not():
    small = [node(name, memory_gib=6, kinds=("vllm",)) for name in "ab"]
    made = plan(view(small, [card_entry("8b")], [wish("8b", 1)]))
    (need,) = made.needs
    assert (need.replica_id, need.layer_count, need.engine_kind) == ("group/8b/0", 32, "vllm")
    assert set(made.rooms) == {"a", "b"}
    assert made.rooms["a"].memory_bytes < 6 * GIB
    assert plan(view([*small, node("c", cards=1)], [card_entry("8b")], [wish("8b", 1)])).needs == ()
    assert plan(view(small, [card_entry("8b")], [wish("8b", None)])).needs == ()


# Explaining.


def verdicts(pool, model_id):
    return {verdict.node_id: verdict for verdict in explain(drafted(pool), ModelId(model_id), {})}


def test_every_node_has_the_reason_that_ruled_it_out():
    nodes = [
        node("serves", cards=1),
        node("offline", cards=1, connected=False),
        node("paused", cards=1, state=NodeState.PAUSED, rest_causes=(RestCause.HOURS, RestCause.HEAT)),
        node("llama", cards=1, kinds=("llamacpp",)),
        node("small", cards=cards(1, "NVIDIA GeForce RTX 3080", 10 * GIB, "small")),
        node("full", cards=1),
        node("refuses", cards=1),
        node("slower", cards=cards(1, "NVIDIA RTX A5000", node="slower")),
    ]
    before = view(nodes, [card_entry("32b"), card_entry("8b")], [wish("32b", 1), wish("8b", 1)])
    troubles = {("refuses", model_id, f"refuses/{model_id}"): REFUSED for model_id in ("32b", "8b")}
    made = plan(before)
    standing_replicas = {
        "serves/32b": replace(
            next(one for one in made.replicas.values() if one.model_id == "32b"), replica_id="serves/32b", node_id="serves"
        ),
        "full/8b": replace(next(one for one in made.replicas.values() if one.model_id == "8b"), replica_id="full/8b", node_id="full"),
    }
    for key, name in (("serves/32b", "serves"), ("full/8b", "full")):
        shape = replace(standing_replicas[key].sizing.shape, card_uuids=(f"GPU-{name}-0",))
        standing_replicas[key] = replace(standing_replicas[key], sizing=replace(standing_replicas[key].sizing, shape=shape))
    said = {NodeId("serves"): (status("serves/32b", "32b"),), NodeId("full"): (status("full/8b", "8b"),)}
    pool = replace(
        before,
        now_seconds=before.now_seconds + 30,
        standing=standing_replicas,
        troubles=troubles,
        nodes={node_id: replace(each, engines=said.get(node_id, ())) for node_id, each in before.nodes.items()},
    )
    found = verdicts(pool, "32b")
    assert {name: verdict.verdict for name, verdict in found.items()} == {
        "serves": Verdict.SERVES,
        "slower": Verdict.OUTSCORED,
        "full": Verdict.FULL,
        "refuses": Verdict.REFUSED,
        "small": Verdict.NO_FIT,
        "llama": Verdict.NO_ENGINE,
        "paused": Verdict.PAUSED,
        "offline": Verdict.OFFLINE,
    }
    assert list(found) == sorted(found, key=lambda name: list(Verdict).index(found[name].verdict))
    assert "8b has the room; 0 of 1 cards are free" in found["full"].reason
    assert "GiB" in found["small"].reason
    assert found["llama"].reason == "it needs the engine vllm, and the node has llamacpp"
    assert (found["offline"].reason, found["refuses"].reason) == ("not connected for 30 s", "not allowed here")
    assert found["paused"].reason == "at rest for 30 s: it is outside its owner's hours, its cards stayed too hot"
    here, there = (float(word) for word in found["slower"].reason.replace(",", "").split() if word.replace(".", "").isdigit())
    assert 0 < here < there


def test_a_wish_that_is_not_met_says_what_keeps_it():
    pool = view([node("a", kinds=("llamacpp",)), node("b", connected=False)], [card_entry("8b")], [wish("8b", 2)])
    draft = drafted(pool)
    found = standing(draft, pool.deployments[0])
    assert (found.ready_count, found.starting_count) == (0, 0)
    assert found.shortfall == "nodes: 1 no_engine, 1 offline"
    met = view([node("a")], [TINY], [wish("tiny", 1)])
    assert standing(drafted(met), met.deployments[0]).shortfall == ""


def served(each, entry, count):
    """A pool of one node that serves the model, and is wished to serve it more often."""
    pool = view([each], [entry], [wish(entry.model_id, count)])
    made = plan(pool)
    said = tuple(status(replica_id, entry.model_id) for replica_id in made.replicas)
    return replace(pool, standing=made.replicas, nodes={each.node_id: replace(each, engines=said)})


def test_a_second_replica_that_has_no_place_where_the_first_one_runs_is_explained():
    for each, entry, words in (
        (node("a"), TINY, "1 serves, and a machine without cards runs it once"),
        (node("a", cards=1), card_entry("8b"), "1 serves and has no card free for another"),
    ):
        pool = served(each, entry, 2)
        found = standing(drafted(pool), pool.deployments[0])
        assert (found.ready_count, found.shortfall) == (1, f"nodes: {words}")


def test_no_rate_is_named_where_the_fit_predicts_none():
    assert verdicts(served(node("a"), TINY, 1), "tiny")["a"].reason.endswith("; nothing is predicted of its speed")
    assert "tokens/s predicted" in verdicts(served(node("a", cards=1), card_entry("8b"), 1), "8b")["a"].reason
    free = verdicts(replace(served(node("a"), TINY, 1), nodes={**served(node("a"), TINY, 1).nodes, NodeId("b"): node("b")}), "tiny")["b"]
    assert free.reason == "it has room; nothing is predicted of its speed"


def test_an_engine_that_was_stepped_down_is_shown_with_what_it_really_serves():
    before = view([node("a", cards=1)], [card_entry("8b")], [wish("8b")])
    made = plan(before)
    (replica,) = made.replicas.values()
    said = replace(status(replica.replica_id, "8b", context_length_tokens=2048), slot_count=2)
    after = replace(before, standing=made.replicas, nodes={NodeId("a"): replace(before.nodes[NodeId("a")], engines=(said,))})
    (verdict,) = explain(drafted(after), ModelId("8b"), {})
    assert "2 slots of 2048 tokens (planned: 8 of 4096)" in verdict.reason


def test_a_model_that_lost_its_files_or_its_wish_is_explained_all_the_same():
    offer = replace(TINY, file=None, repository="hf:org/tiny")
    found = verdicts(view([node("a")], [offer], [wish("tiny", 1)]), "tiny")
    assert (found["a"].verdict, found["a"].reason) == (
        Verdict.NO_FIT,
        "its files are not pinned: run `potluck models add hf:org/tiny@REVISION --as tiny`",
    )
    found = verdicts(view([node("a")], [TINY], []), "tiny")
    assert (found["a"].verdict, found["a"].reason) == (Verdict.OUTSCORED, "no replica is wished")
