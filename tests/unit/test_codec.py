"""What a node may say of itself, and how much of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from potluck_coordinator.gateway.replica_view import ATTEMPTS_PER_NODE_MAX
from potluck_protocol import codec, engine_codec, hardware_codec
from potluck_protocol.bounds import TEXT_CHARACTERS_MAX
from potluck_protocol.cards import CardTelemetry
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.line import LineMeasurement
from potluck_protocol.rest import RestCause
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import (
    Accelerator,
    AccountId,
    DesiredEngine,
    DesiredState,
    Endpoint,
    EngineShape,
    EngineState,
    EngineStatus,
    GoodbyeReason,
    GroupOffer,
    GroupPlace,
    Heartbeat,
    Hello,
    Inventory,
    ModelFile,
    ModelId,
    NodeId,
    NodeState,
    Peer,
    PeerMeasurement,
    PinnedFile,
    ReplicaId,
    SessionId,
)

LONGEST = "x" * TEXT_CHARACTERS_MAX
TOO_LONG = LONGEST + "x"
ENGINE_COUNTS = (
    *("slot_count", "running_count", "waiting_count", "context_length_tokens", "kv_capacity_tokens", "kv_used_tokens"),
    *("fetched_bytes", "fetch_total_bytes", "memory_bytes", "weight_bytes", "prefix_queried_tokens", "prefix_hit_tokens"),
)


def engine(**changes: Any) -> EngineStatus:
    fields: dict[str, Any] = {
        "replica_id": ReplicaId(LONGEST),
        "model_id": ModelId(LONGEST),
        "state": EngineState.READY,
        "engine_kind": LONGEST,
        "engine_version": LONGEST,
        "endpoints": tuple(Endpoint),
    }
    return EngineStatus(**{**fields, **changes})


def inventory(**changes: Any) -> Inventory:
    cards = (Accelerator(LONGEST, LONGEST, 1),) * hardware_codec.ACCELERATORS_MAX
    return Inventory(**{"operating_system": LONGEST, "accelerators": cards, **changes})


def hello(**changes: Any) -> Hello:
    fields: dict[str, Any] = {
        "protocol_version": 1,
        "node_id": NodeId(LONGEST),
        "session_id": SessionId(LONGEST),
        "agent_version": LONGEST,
        "inventory": inventory(),
        "state": NodeState.SERVING,
        "in_flight": (LONGEST,) * codec.IN_FLIGHT_MAX,
        "engines": (engine(),) * engine_codec.ENGINES_MAX,
        "cards": (CardTelemetry(LONGEST, memory_foreign_bytes=5),) * hardware_codec.ACCELERATORS_MAX,
        "rest_causes": tuple(RestCause),
    }
    return Hello(**{**fields, **changes})


def test_as_much_as_a_node_can_have_is_taken() -> None:
    assert codec.hello_value(codec.hello_message(hello())) == hello()
    cards = (CardTelemetry("a", 70, 300_000, 350_000, 1 << 34, 0, 99, ("power_cap",)), CardTelemetry("b", lost=True))
    peers = (PeerMeasurement(NodeId("c"), 200, 10**8, "slow"),)
    heartbeat = Heartbeat(1, NodeState.SERVING, hello().engines, 2, cards, peers, LineMeasurement(7, 8, None, 9), 3, tuple(RestCause))
    assert codec.heartbeat_value(codec.heartbeat_message(heartbeat)) == heartbeat


def test_a_cause_of_rest_that_is_not_known_here_is_passed_over_and_none_counts_twice() -> None:
    heat, hours = node_pb2.REST_CAUSE_HEAT, node_pb2.REST_CAUSE_HOURS
    message = node_pb2.Heartbeat(state=node_pb2.NODE_STATE_PAUSED, rest_causes=[heat, 4711, hours, heat, 0])
    assert codec.heartbeat_value(message).rest_causes == (RestCause.HOURS, RestCause.HEAT)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: TOO_LONG} for name in ("node_id", "session_id", "agent_version")),
        {"in_flight": (TOO_LONG,)},
        {"in_flight": ("a",) * (codec.IN_FLIGHT_MAX + 1)},
        {"engines": (engine(),) * (engine_codec.ENGINES_MAX + 1)},
        {"cards": (CardTelemetry("a"),) * (hardware_codec.ACCELERATORS_MAX + 1)},
        {"cards": (CardTelemetry(TOO_LONG),)},
        *({"engines": (engine(**{name: TOO_LONG}),)} for name in ("replica_id", "model_id", "engine_kind", "engine_version")),
        {"engines": (engine(endpoints=(Endpoint.EMBEDDINGS,) * 4),)},
        *({"engines": (engine(**{name: -1}),)} for name in ENGINE_COUNTS),
        *({"inventory": inventory(**{name: -1})} for name in ("cpu_count", "memory_bytes", "disk_free_bytes", "memory_budget_bytes")),
        {"inventory": inventory(operating_system=TOO_LONG)},
        {"inventory": inventory(accelerators=(Accelerator("a", "b", 1),) * (hardware_codec.ACCELERATORS_MAX + 1))},
        {"inventory": inventory(accelerators=(Accelerator(TOO_LONG, "b", 1),))},
        {"inventory": inventory(accelerators=(Accelerator("a", TOO_LONG, 1),))},
    ],
)
def test_more_is_refused_and_less_than_nothing(changes: dict[str, Any]) -> None:
    with pytest.raises(PotluckError) as refused:
        codec.hello_value(codec.hello_message(hello(**changes)))
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    assert refused.value.param
    assert TOO_LONG not in refused.value.message


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -3.0])
@pytest.mark.parametrize("name", ["prefill_tokens_per_second", "decode_tokens_per_second"])
def test_a_rate_that_is_none_is_not_known(name: str, rate: float) -> None:
    message = engine_codec.engine_status_message(engine(**{name: rate}))
    assert engine_codec.engine_status_value(message) == engine()


HEAT = (
    CardTelemetry("a", throttle_point_celsius=83, thermal_rung=8, throttle_seconds=12.5),
    CardTelemetry("a", power_limit_min_milliwatts=0, power_limit_default_milliwatts=350_000, power_limit_max_milliwatts=385_000),
)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e300])
def test_seconds_that_are_none_count_for_none(seconds: float) -> None:
    message = hardware_codec.card_telemetry_message(CardTelemetry("a", throttle_seconds=seconds))
    assert hardware_codec.card_telemetry_value(message) == CardTelemetry("a")


def test_zero_is_not_unknown() -> None:
    for card in (CardTelemetry("a", temperature_celsius=0, memory_foreign_bytes=0), CardTelemetry("a", newest_xid=79, xid_count=2), *HEAT):
        assert hardware_codec.card_telemetry_value(hardware_codec.card_telemetry_message(card)) == card
    told = engine(prefill_past_tokens=900, decode_past_tokens=1_200, prefix_queried_tokens=7, prefix_hit_tokens=0, weight_bytes=9)
    for status in (engine(kv_used_tokens=0, waiting_count=0, decode_tokens_per_second=0.0), engine(), told):
        assert engine_codec.engine_status_value(engine_codec.engine_status_message(status)) == status


@pytest.mark.parametrize("line", [None, LineMeasurement(5), LineMeasurement(5, 21_000, 10**6, 10**7)])
def test_a_line_keeps_every_figure_and_one_that_no_line_can_have_is_none(line: LineMeasurement | None) -> None:
    known = inventory(line=line)
    message = hardware_codec.inventory_message(known)
    assert hardware_codec.inventory_value(message) == known
    message.line.upload_bytes_per_second = -1
    message.line.download_bytes_per_second = 0
    said = hardware_codec.inventory_value(message).line
    assert said is not None
    assert (said.upload_bytes_per_second, said.download_bytes_per_second) == (None, None)


def test_a_card_and_an_offer_keep_every_fact() -> None:
    card = Accelerator("RTX 3090", "GPU-1", 24 << 30, "8.6", 4, 16, 4, 350_000, 0, ("GPU-2",))
    offer = GroupOffer("lab", "10.0.0.2", 29600, (AccountId("ana"),))
    known = inventory(accelerators=(card,), driver_version="575", cuda_version="12.8", memory_budget_bytes=5, engine_kinds=("vllm",))
    known = replace(known, attached_model_names=("llama3.2:3b",))
    for value in (known, replace(known, group_offer=offer)):
        assert hardware_codec.inventory_value(hardware_codec.inventory_message(value)) == value


def test_a_wish_keeps_every_word() -> None:
    files = (PinnedFile("model.safetensors", "b" * 64, 7), PinnedFile("tokenizer.json", "c" * 64, 8))
    model = ModelFile(ModelId("m"), "hf:org/name@main", "config.json", "a" * 64, 6, "", files)
    shape = EngineShape(("GPU-1", "GPU-2"), 2, "awq", 1 << 30, 1 << 34)
    place = GroupPlace("group", 3, 1, "10.0.0.1", 29600, "10.0.0.2", (10, 20))
    wished = DesiredEngine(ReplicaId("n/m"), model, "vllm", 4, 2048, shape, place)
    desired = DesiredState(9, (wished, replace(wished, group=None)), (Peer(NodeId("n"), "10.0.0.1", 29601, b"secret", dial=True),))
    assert engine_codec.desired_state_value(engine_codec.desired_state_message(desired)) == desired
    assert model.total_bytes == 21


def test_a_wish_of_a_coordinator_that_knows_no_shapes_is_read() -> None:
    old = node_pb2.DesiredState(revision=1, engines=[node_pb2.DesiredEngine(replica_id="n/m", slot_count=1)])
    engine_wish = engine_codec.desired_state_value(old).engines[0]
    assert (engine_wish.shape, engine_wish.group, engine_wish.model.further_files) == (EngineShape(), None, ())


def test_a_node_may_name_every_attempt_that_a_coordinator_gives_it() -> None:
    assert codec.IN_FLIGHT_MAX >= ATTEMPTS_PER_NODE_MAX


def test_a_heartbeat_has_the_same_bounds() -> None:
    for engines in ((engine(),) * (engine_codec.ENGINES_MAX + 1), (engine(engine_version=TOO_LONG),)):
        with pytest.raises(PotluckError) as refused:
            codec.heartbeat_value(codec.heartbeat_message(Heartbeat(1, NodeState.SERVING, engines, 2)))
        assert refused.value.code is ErrorCode.INVALID_REQUEST


def test_of_an_overlong_failure_the_end_is_kept() -> None:
    message = node_pb2.EngineStatus(state=node_pb2.ENGINE_STATE_BACKING_OFF, failure="begin" + "x" * 10_000 + "the end")
    failure = engine_codec.engine_status_value(message).failure
    assert len(failure) == engine_codec.FAILURE_CHARACTERS_MAX
    assert failure.endswith("the end")


def test_a_goodbyes_words_are_bounded_and_harmless_on_a_terminal() -> None:
    message = codec.goodbye_message(GoodbyeReason.REVOKED, "too\x1b[2J hot " + "x" * 10_000)
    _, words = codec.goodbye_value(message)
    assert words.startswith("too [2J hot x")
    assert len(words) == engine_codec.FAILURE_CHARACTERS_MAX
