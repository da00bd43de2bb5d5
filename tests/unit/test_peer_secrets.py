"""Nodes that are to measure each other share a secret that is theirs alone."""

from __future__ import annotations

from potluck_coordinator.directory.groups import PeerSecrets
from tests.support.grouping import measured, node


def test_a_pair_shares_one_secret_and_no_two_pairs_share_any():
    nodes = measured(node(1), node(2), node(3))
    peers = PeerSecrets().peers([("n1", "n2"), ("n1", "n3"), ("n2", "n3")], nodes)
    assert [(peer.node_id, peer.address, peer.port, peer.dial) for peer in peers["n2"]] == [
        ("n1", "10.0.0.1", 29601, False),
        ("n3", "10.0.0.3", 29601, True),
    ]
    by_pair = {frozenset((own, peer.node_id)): peer.secret for own, named in peers.items() for peer in named}
    assert [peer.secret for peer in peers["n1"]] == [by_pair[frozenset(("n1", other))] for other in ("n2", "n3")]
    assert len(set(by_pair.values())) == 3
    assert all(len(secret) == 32 for secret in by_pair.values())


def test_another_directory_makes_other_secrets():
    nodes = measured(node(1), node(2))
    assert PeerSecrets().peers([("n1", "n2")], nodes) != PeerSecrets().peers([("n1", "n2")], nodes)


def test_a_secret_is_in_no_words_about_a_peer():
    (peer,) = PeerSecrets().peers([("n1", "n2")], measured(node(1), node(2)))["n1"]
    assert peer.secret.hex() not in repr(peer)
    assert str(peer.secret) not in repr(peer)
