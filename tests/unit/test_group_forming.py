"""Who may be in a shard group, and which nodes form one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.domain.grouping import forming
from potluck_coordinator.domain.grouping.forming import form, layers_by_stage, possible_members
from potluck_coordinator.domain.grouping.membership import trust_refusal
from potluck_coordinator.domain.grouping.words import NodeRoom
from potluck_protocol.private_network import address_refusal
from potluck_protocol.values import Inventory, NodeId, NodeState, PeerMeasurement
from tests.support.grouping import measured, need, node, rooms, with_link


def chosen(formation):
    return [stage.node_id for stage in formation.stages]


@pytest.mark.parametrize("address", ["10.0.0.1", "172.31.255.1", "192.168.1.7", "100.64.0.9", "fd12:3456::1"])
def test_addresses_of_private_networks_are_taken(address):
    assert address_refusal(address) == ""


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("203.0.113.5", "public"),
        ("8.8.8.8", "public"),
        ("172.32.0.1", "public"),
        ("2001:db8::1", "public"),
        ("::ffff:10.0.0.1", "public"),
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("169.254.3.4", "link-local"),
        ("fe80::1", "link-local"),
        ("0.0.0.0", "not the address of one machine"),
        ("224.0.0.1", "not the address of one machine"),
        ("fd12:3456::1%eth0", "names a zone"),
        ("fd12:3456::1%; reboot", "names a zone"),
        ("potluck.example", "not an IP address"),
        ("", "not an IP address"),
    ],
)
def test_every_other_address_is_refused_with_its_reason(address, word):
    assert word in address_refusal(address)


def test_two_nodes_of_one_owner_form_a_group_that_holds_the_model():
    views = measured(node(1), node(2))
    formation = form(need(), views, rooms(views))
    assert chosen(formation) == ["n1", "n2"]
    assert [stage.layer_count for stage in formation.stages] == [5, 5]
    assert [stage.weight_bytes for stage in formation.stages] == [55, 55]
    assert (formation.reason, formation.rejections) == ("", {})


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (node(2, connected=False), "is not connected"),
        (node(2, state=NodeState.PAUSED), "is paused"),
        (node(2, offer=None), "offers it to no group"),
        (node(2, offer={"site": ""}), "names no site"),
        (node(2, offer={"site": "attic"}), "is at another site"),
        (node(2, offer={"address": "203.0.113.5"}), "203.0.113.5 is public: a group's own traffic is neither encrypted nor authenticated"),
        (node(2, offer={"address": "127.0.0.1"}), "is loopback"),
        (node(2, offer={"address": "fd00::2"}), "the other one of IPv6"),
        (node(2, offer={"address": "10.0.0.1"}), "the same address"),
        (node(2, offer={"port": 65_535}), "leaves no port"),
        (node(2, inventory=Inventory(group_offer=node(2).inventory.group_offer)), "no engine of the kind vllm"),
        (node(2, owner="bob"), "does not trust the owner of node n1"),
        (node(2, owner="bob", trusts=("ann",)), "the owner of node n1 does not trust its owner"),
    ],
)
def test_a_node_that_may_not_be_in_it_is_told_why(second, words):
    views = measured(node(1), second)
    formation = form(need(), views, rooms(views))
    assert formation.stages == ()
    assert words in formation.rejections[NodeId("n2")]


def test_a_public_address_is_refused_to_one_owner_too():
    views = measured(node(1, offer={"address": "203.0.113.4"}), node(2, offer={"address": "203.0.113.5"}))
    formation = form(need(), views, rooms(views))
    assert formation.stages == ()
    assert all("is public" in reason for reason in formation.rejections.values())


def test_two_owners_who_trust_each_other_share_a_group_and_a_third_is_never_taken_in():
    views = measured(node(1, "ann", ("bob",)), node(2, "bob", ("ann",)), node(3, "eve", ("ann", "bob")))
    roomy = rooms(views, n3=NodeRoom(10_000, weight_bytes_per_second=1e12))
    formation = form(need(), views, roomy)
    assert sorted(chosen(formation)) == ["n1", "n2"]
    assert formation.rejections == {"n3": "the owner of node n1 does not trust its owner (group_trusts)"}


def test_trust_is_asked_of_every_pair_not_of_neighbours():
    views = measured(node(1, "ann", ("bob", "cyd")), node(2, "bob", ("ann",)), node(3, "cyd", ("ann",)))
    assert form(need(), views, rooms(views, 70)).stages == ()


@pytest.mark.parametrize(
    ("link", "words"),
    [
        (None, "is not measured yet"),
        (PeerMeasurement(NodeId("n2"), failure="no answer within 3 s"), "do not reach each other: no answer within 3 s"),
        (PeerMeasurement(NodeId("n2"), 5_001, 10**9), "a round trip to node n1 takes 5.0 ms"),
        (PeerMeasurement(NodeId("n2"), 300, 12_000_000), "carries 12.0 MB/s, less than 12.5 MB/s"),
        (PeerMeasurement(NodeId("n2")), "carries 0.0 MB/s"),
    ],
)
def test_a_link_that_is_bad_or_unknown_keeps_two_apart(link, words):
    views = with_link(measured(node(1), node(2)), "n1", "n2", link)
    formation = form(need(), views, rooms(views))
    assert formation.stages == ()
    assert words in formation.rejections[NodeId("n2")]


def test_the_worse_of_two_words_about_a_link_counts():
    views = measured(node(1), node(2))
    bad = PeerMeasurement(NodeId("n1"), 90_000, 10**9)
    views[NodeId("n2")] = replace(views[NodeId("n2")], peer_measurements={NodeId("n1"): bad})
    assert form(need(), views, rooms(views)).stages == ()


def test_what_keeps_two_apart_is_told_with_who_says_so():
    views = measured(node(1), node(2))
    closed = PeerMeasurement(NodeId("n2"), failure="10.0.0.2 cannot be reached: Connection refused")
    cause = PeerMeasurement(NodeId("n1"), failure="10.0.0.2 port 29601 cannot be opened: Address already in use")
    for number, word in (("n1", closed), ("n2", cause)):
        views[NodeId(number)] = replace(views[NodeId(number)], peer_measurements={word.node_id: word})
    rejection = form(need(), views, rooms(views)).rejections[NodeId("n1")]
    assert rejection.endswith(
        "it and node n2 do not reach each other: 10.0.0.2 cannot be reached: Connection refused (says node n1); "
        "10.0.0.2 port 29601 cannot be opened: Address already in use (says node n2)"
    )


def test_the_fewest_stages_win_even_over_a_better_connected_larger_set():
    views = measured(node(1), node(2), node(3), node(4))
    views = with_link(views, "n1", "n2", PeerMeasurement(NodeId(""), 4_000, 10**9))
    small = NodeRoom(60)
    assert sorted(chosen(form(need(), views, rooms(views, n3=small, n4=small)))) == ["n1", "n2"]


def test_of_equally_many_the_faster_and_nearer_ones_are_chosen_and_the_rest_is_told():
    views = measured(node(1), node(2), node(3))
    fast = rooms(views, n2=NodeRoom(90, weight_bytes_per_second=1e11), n3=NodeRoom(90, weight_bytes_per_second=1e11))
    formation = form(need(), views, fast)
    assert sorted(chosen(formation)) == ["n2", "n3"]
    assert "not needed" in formation.rejections[NodeId("n1")]
    near = with_link(views, "n1", "n3", PeerMeasurement(NodeId(""), 20, 10**9))
    assert sorted(chosen(form(need(), near, rooms(near)))) == ["n1", "n3"]


def test_the_best_connected_node_leads_and_the_nearest_comes_next():
    views = measured(node(1), node(2), node(3))
    views = with_link(views, "n1", "n3", PeerMeasurement(NodeId(""), 20, 10**9))
    views = with_link(views, "n2", "n3", PeerMeasurement(NodeId(""), 30, 10**9))
    assert chosen(form(need(), views, rooms(views, 65))) == ["n3", "n1", "n2"]


def test_another_node_leads_where_the_best_connected_one_cannot_hold_the_first_stage():
    views = measured(node(1), node(2))
    demanding = need(first_stage_bytes=40)
    formation = form(demanding, views, rooms(views, n1=NodeRoom(50), n2=NodeRoom(150)))
    assert chosen(formation) == ["n2", "n1"]


def test_engines_without_cards_keep_the_tables_of_the_ends_twice_and_nobody_is_paid_for_that():
    views = measured(node(1), node(2))
    packing = need(table_copy_bytes=12)
    # Beside 20 for the engine an end with half of the layers takes 5 + 12 + 5 x 11.
    assert [stage.layer_count for stage in form(packing, views, rooms(views, 92)).stages] == [5, 5]
    assert [stage.weight_bytes for stage in form(packing, views, rooms(views, 92)).stages] == [55, 55]
    short = form(packing, views, rooms(views, 91))
    assert short.stages == ()
    assert possible_members(packing, views, rooms(views, 92)) == list(views.values())
    assert possible_members(packing, views, rooms(views, 91)) == []
    cards = {node_id: NodeRoom(81, (f"card-{node_id}",)) for node_id in views}
    assert [stage.layer_count for stage in form(packing, views, cards).stages] == [5, 5]


def test_layers_follow_speed_as_far_as_memory_goes():
    views = measured(node(1), node(2))
    faster = NodeRoom(500, weight_bytes_per_second=4e10)
    assert [stage.layer_count for stage in form(need(), views, rooms(views, 500, n1=faster)).stages] == [8, 2]
    cramped = NodeRoom(60, weight_bytes_per_second=4e10)
    assert [stage.layer_count for stage in form(need(), views, rooms(views, 500, n1=cramped)).stages] == [3, 7]


def test_stages_of_one_group_take_equally_many_cards():
    views = measured(node(1), node(2), node(3))
    cards = {name: NodeRoom(90, tuple(f"{name}-{index}" for index in range(count))) for name, count in (("n1", 2), ("n2", 4), ("n3", 1))}
    formation = form(need(tensor_parallel_sizes=(1, 2)), views, rooms(views, **cards))
    assert chosen(formation) == ["n1", "n2"]
    assert [stage.card_uuids for stage in formation.stages] == [("n1-0", "n1-1"), ("n2-0", "n2-1")]
    single = form(need(), views, rooms(views, **cards))
    assert [len(stage.card_uuids) for stage in single.stages] == [1, 1]


def test_a_machine_without_cards_is_in_no_group_with_one_that_has_some():
    views = measured(node(1), node(2))
    assert form(need(), views, rooms(views, n1=NodeRoom(90, ("card",)))).stages == ()


def test_where_memory_is_short_the_reason_has_both_figures():
    views = measured(node(1), node(2))
    small = need(layer_bytes=1 << 30, layer_kv_bytes=0)
    formation = form(small, views, rooms(views, 3 << 30))
    assert formation.stages == ()
    assert (
        formation.reason == "the nodes that may be together have 6.00 GiB for weights and cache, and big needs 10.00 GiB, in whole layers"
    )
    assert set(formation.rejections.values()) == {formation.reason}


def test_a_node_without_room_for_one_layer_is_told_so():
    views = measured(node(1), node(2))
    formation = form(need(), views, rooms(views, n2=NodeRoom(30)) | {})
    assert "does not hold one layer" in formation.rejections[NodeId("n2")]
    assert form(need(), views, {NodeId("n1"): NodeRoom(90)}).rejections[NodeId("n2")] == "nothing of it is free"


@pytest.mark.parametrize(
    ("layer_count", "most", "speeds", "expected"),
    [
        (10, (10, 10), (1.0, 1.0), (5, 5)),
        (10, (10, 10), (3.0, 1.0), (8, 2)),
        (10, (6, 10), (3.0, 1.0), (6, 4)),
        (3, (2, 2, 2), (9.0, 1.0, 1.0), (1, 1, 1)),
        (4, (2, 1), (1.0, 1.0), None),
        (2, (5, 0), (1.0, 1.0), None),
        (1, (5, 5), (1.0, 1.0), None),
    ],
)
def test_layers_are_spread(layer_count, most, speeds, expected):
    assert layers_by_stage(layer_count, most, speeds) == expected


def test_a_site_that_a_whole_pool_names_costs_each_node_a_few_looks_and_not_one_for_each_other_node(monkeypatch):
    asked = []
    monkeypatch.setattr(forming, "trust_refusal", lambda first, second: asked.append(first) or trust_refusal(first, second))
    strangers = [node(number, f"owner{number}") for number in range(1, 201)]
    views = {view.node_id: view for view in strangers}
    formation = form(need(), views, rooms(views))
    assert formation.reason == "no two of the nodes that could be in a group may be in one together"
    assert formation.rejections["n7"] == "its owner does not trust the owner of node n1 (group_trusts)"
    assert len(asked) < 3 * len(views)
