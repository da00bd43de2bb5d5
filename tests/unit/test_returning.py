"""Which nodes get their welcome without another plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.directory.returning import Returning
from potluck_coordinator.domain.node_view import NodeView
from potluck_protocol.rest import RestCause
from potluck_protocol.values import (
    Accelerator,
    AccountId,
    DesiredState,
    EngineState,
    GroupPlace,
    Inventory,
    NodeId,
    NodeState,
    Peer,
)
from tests.support.request_queue import status_of, wish

NODE = NodeId("a")
CARD = Accelerator("NVIDIA GeForce RTX 3090", "gpu-1", 24 << 30, "8.6", 16, 16, 4, 350_000)
STATUS = status_of(NODE)
INVENTORY = Inventory(accelerators=(CARD,), disk_free_bytes=7)
VIEW = NodeView(NODE, AccountId("owner"), INVENTORY, True, NodeState.SERVING, (STATUS,), {}, epoch=3, disk_free_bytes=7)
AWAY = replace(VIEW, connected=False, engines=(), state=NodeState.DRAINING)


@pytest.fixture
def returning():
    returning = Returning()
    returning.planned({NODE: VIEW}, {NODE: wish(NODE)})
    return returning


@pytest.mark.parametrize(
    ("changes", "as_planned"),
    [
        ({}, True),
        ({"epoch": 4}, True),
        ({"disk_free_bytes": 5, "inventory": replace(INVENTORY, disk_free_bytes=5)}, True),
        ({"card_foreign_bytes": {"gpu-1": 1}}, True),
        ({"engines": (replace(STATUS, running_count=1, kv_used_tokens=9),)}, True),
        ({"engines": (replace(STATUS, state=EngineState.STARTING),)}, False),
        ({"engines": ()}, False),
        ({"state": NodeState.PAUSED, "rest_causes": (RestCause.OWNER,)}, False),
        ({"inventory": replace(INVENTORY, accelerators=())}, False),
        ({"inventory": replace(INVENTORY, attached_model_names=("m",))}, False),
        ({"owner_account_id": AccountId("another")}, False),
        ({"node_id": NodeId("b")}, False),
    ],
)
def test_a_node_that_is_as_it_was_needs_no_plan(returning, changes, as_planned):
    assert returning.is_as_planned(replace(VIEW, **changes), wish(NODE)) is as_planned


def test_a_node_of_which_something_else_was_wished_meanwhile_needs_one(returning):
    for wished in (wish(NODE, revision=2), DesiredState(), None):
        assert not returning.is_as_planned(VIEW, wished)


def test_plans_that_are_made_while_it_is_away_count_if_they_change_nothing_for_it(returning):
    returning.planned({NODE: AWAY}, {NODE: wish(NODE)})
    assert returning.is_as_planned(VIEW, wish(NODE))
    returning.planned({NODE: AWAY}, {NODE: wish(NODE, revision=2)})
    assert not returning.is_as_planned(VIEW, wish(NODE, revision=2))


def test_who_is_not_of_the_pool_any_more_is_forgotten(returning):
    returning.planned({}, {})
    assert not returning.is_as_planned(VIEW, wish(NODE))


@pytest.mark.parametrize(
    "wished",
    [
        wish(NODE, group=GroupPlace("g", 1, 0, "10.0.0.1", 1, "10.0.0.1", (1, 1))),
        replace(wish(NODE), peers=(Peer(NodeId("b"), "10.0.0.2", 1, b"", dial=True),)),
    ],
)
def test_members_of_groups_always_need_one(wished):
    returning = Returning()
    returning.planned({NODE: VIEW}, {NODE: wished})
    assert not returning.is_as_planned(VIEW, wished)
