"""What an owner may offer to groups: an address of this machine, on a private network, and nothing by half."""

from __future__ import annotations

import pytest

from potluck_node import group_offer as offering
from potluck_node.group_offer import group_offer, own_private_address
from potluck_node.settings import Settings
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import GroupOffer

INTERFACES = {
    "lo": ["127.0.0.1", "::1"],
    "eth0": ["fd00::2", "203.0.113.4", "192.168.1.20"],
    "eth1": ["fe80::1%eth1", "fd00::9"],
    "wan": ["203.0.113.9", "2001:db8::9"],
    "idle": [],
}


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(offering, "own_addresses", lambda: INTERFACES)


@pytest.mark.parametrize(
    ("named", "address"), [("eth0", "192.168.1.20"), ("eth1", "fd00::9"), ("192.168.1.20", "192.168.1.20"), ("fd00:0::2", "fd00:0::2")]
)
def test_an_interface_or_an_address_of_it_is_named(named, address):
    assert own_private_address(named, INTERFACES) == address


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("wan", "the interface wan has no address of a private network (203.0.113.9 is public"),
        ("lo", "127.0.0.1 is loopback"),
        ("idle", "it has no address"),
        ("203.0.113.4", "203.0.113.4 is public"),
        ("127.0.0.1", "is loopback"),
        ("169.254.1.1", "is link-local"),
        ("10.0.0.1", "10.0.0.1 is not an address of this machine; see `ip address`"),
        ("eth7", "eth7 is neither an IP address nor one of the interfaces eth0, eth1, idle, lo, wan"),
    ],
)
def test_what_others_could_reach_or_nobody_could_is_refused_by_name(named, words):
    with pytest.raises(PotluckError) as raised:
        own_private_address(named, INTERFACES)
    assert raised.value.code is ErrorCode.INVALID_REQUEST
    assert raised.value.message.startswith("group_address: ")
    assert words in raised.value.message


def test_an_offer_has_the_owners_words():
    settings = Settings(group_site="lab", group_address="eth0", group_trusts="acc-1, acc-2")
    assert group_offer(settings) == GroupOffer("lab", "192.168.1.20", 29600, ("acc-1", "acc-2"))


def test_nothing_is_offered_unless_it_is_said():
    assert group_offer(Settings()) is None


@pytest.mark.parametrize(("given", "missing"), [({"group_site": "lab"}, "group_address"), ({"group_address": "eth0"}, "group_site")])
def test_half_an_offer_is_a_mistake(given, missing):
    with pytest.raises(PotluckError, match=f"set {missing}, too"):
        group_offer(Settings(**given))


def test_this_machines_own_addresses_are_known(monkeypatch):
    monkeypatch.undo()
    assert "127.0.0.1" in [address for addresses in offering.own_addresses().values() for address in addresses]
