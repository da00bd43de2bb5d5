"""What a node has and how its cards do: values to messages and back.

Decides how many cards and how much text one node may name. It must not know what becomes of a value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from potluck_protocol.bounds import count, items, printable, text
from potluck_protocol.cards import CardTelemetry
from potluck_protocol.line import LineMeasurement
from potluck_protocol.v1 import node_pb2
from potluck_protocol.values import Accelerator, AccountId, GroupOffer, Inventory, NodeId, PeerMeasurement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.message import Message

ACCELERATORS_MAX: Final = 64
ENGINE_KINDS_MAX: Final = 16
ATTACHED_MODELS_MAX: Final = 256
TRUSTED_ACCOUNTS_MAX: Final = 64
PEERS_MAX: Final = 64
THROTTLE_REASONS_MAX: Final = 16
THROTTLE_SECONDS_MAX: Final = 1e9
PEER_FAILURE_CHARACTERS_MAX: Final = 200


def set_field(message: Message, name: str) -> Any:
    """The value of an `optional` field, None where it was not set."""
    return getattr(message, name) if message.HasField(name) else None


def inventory_message(inventory: Inventory) -> node_pb2.Inventory:
    return node_pb2.Inventory(
        operating_system=inventory.operating_system,
        cpu_count=inventory.cpu_count,
        memory_bytes=inventory.memory_bytes,
        disk_free_bytes=inventory.disk_free_bytes,
        accelerators=[_accelerator_message(card) for card in inventory.accelerators],
        driver_version=inventory.driver_version,
        cuda_version=inventory.cuda_version,
        memory_budget_bytes=inventory.memory_budget_bytes,
        engine_kinds=inventory.engine_kinds,
        group_offer=None if inventory.group_offer is None else _group_offer_message(inventory.group_offer),
        attached_model_names=inventory.attached_model_names,
        line=line_measurement_message(inventory.line),
    )


def inventory_value(message: node_pb2.Inventory) -> Inventory:
    """What a node has; raises PotluckError(INVALID_REQUEST) for more than a node can have."""
    return Inventory(
        operating_system=text(message.operating_system, "inventory.operating_system"),
        cpu_count=count(message.cpu_count, "inventory.cpu_count"),
        memory_bytes=count(message.memory_bytes, "inventory.memory_bytes"),
        disk_free_bytes=count(message.disk_free_bytes, "inventory.disk_free_bytes"),
        accelerators=tuple(_accelerator_value(card) for card in items(message.accelerators, ACCELERATORS_MAX, "inventory.accelerators")),
        driver_version=text(message.driver_version, "inventory.driver_version"),
        cuda_version=text(message.cuda_version, "inventory.cuda_version"),
        memory_budget_bytes=count(message.memory_budget_bytes, "inventory.memory_budget_bytes"),
        engine_kinds=tuple(
            text(kind, "inventory.engine_kinds") for kind in items(message.engine_kinds, ENGINE_KINDS_MAX, "inventory.engine_kinds")
        ),
        group_offer=_group_offer_value(message.group_offer) if message.HasField("group_offer") else None,
        attached_model_names=tuple(
            text(name, "inventory.attached_model_names")
            for name in items(message.attached_model_names, ATTACHED_MODELS_MAX, "inventory.attached_model_names")
        ),
        line=line_measurement_value(message),
    )


def card_telemetry_message(card: CardTelemetry) -> node_pb2.CardTelemetry:
    return node_pb2.CardTelemetry(
        uuid=card.uuid,
        temperature_celsius=card.temperature_celsius,
        power_milliwatts=card.power_milliwatts,
        power_limit_milliwatts=card.power_limit_milliwatts,
        memory_used_bytes=card.memory_used_bytes,
        memory_foreign_bytes=card.memory_foreign_bytes,
        utilization_percent=card.utilization_percent,
        throttle_reasons=card.throttle_reasons,
        lost=card.lost,
        newest_xid=card.newest_xid,
        xid_count=card.xid_count,
        throttle_point_celsius=card.throttle_point_celsius,
        thermal_rung=card.thermal_rung,
        throttle_seconds=card.throttle_seconds,
        power_limit_min_milliwatts=card.power_limit_min_milliwatts,
        power_limit_default_milliwatts=card.power_limit_default_milliwatts,
        power_limit_max_milliwatts=card.power_limit_max_milliwatts,
    )


def card_telemetries_value(messages: Sequence[node_pb2.CardTelemetry]) -> tuple[CardTelemetry, ...]:
    """All cards of one node now; raises PotluckError(INVALID_REQUEST)."""
    return tuple(card_telemetry_value(card) for card in items(messages, ACCELERATORS_MAX, "cards"))


def card_telemetry_value(message: node_pb2.CardTelemetry) -> CardTelemetry:
    """One card now; raises PotluckError(INVALID_REQUEST)."""
    reasons = items(message.throttle_reasons, THROTTLE_REASONS_MAX, "cards.throttle_reasons")
    return CardTelemetry(
        uuid=text(message.uuid, "cards.uuid"),
        temperature_celsius=set_field(message, "temperature_celsius"),
        power_milliwatts=set_field(message, "power_milliwatts"),
        power_limit_milliwatts=set_field(message, "power_limit_milliwatts"),
        memory_used_bytes=set_field(message, "memory_used_bytes"),
        memory_foreign_bytes=set_field(message, "memory_foreign_bytes"),
        utilization_percent=set_field(message, "utilization_percent"),
        throttle_reasons=tuple(text(reason, "cards.throttle_reasons") for reason in reasons),
        lost=message.lost,
        newest_xid=set_field(message, "newest_xid"),
        xid_count=message.xid_count,
        throttle_point_celsius=set_field(message, "throttle_point_celsius"),
        thermal_rung=message.thermal_rung,
        # Not a number, or endless, is no duration.
        throttle_seconds=message.throttle_seconds if 0 <= message.throttle_seconds < THROTTLE_SECONDS_MAX else 0.0,
        power_limit_min_milliwatts=set_field(message, "power_limit_min_milliwatts"),
        power_limit_default_milliwatts=set_field(message, "power_limit_default_milliwatts"),
        power_limit_max_milliwatts=set_field(message, "power_limit_max_milliwatts"),
    )


def peer_measurement_message(measurement: PeerMeasurement) -> node_pb2.PeerMeasurement:
    return node_pb2.PeerMeasurement(
        node_id=measurement.node_id,
        round_trip_microseconds=measurement.round_trip_microseconds,
        bandwidth_bytes_per_second=measurement.bandwidth_bytes_per_second,
        failure=measurement.failure,
    )


def peer_measurement_value(message: node_pb2.PeerMeasurement) -> PeerMeasurement:
    """What a node measured towards a peer; raises PotluckError(INVALID_REQUEST)."""
    return PeerMeasurement(
        node_id=NodeId(text(message.node_id, "peer_measurements.node_id")),
        round_trip_microseconds=message.round_trip_microseconds,
        bandwidth_bytes_per_second=message.bandwidth_bytes_per_second,
        failure=printable(message.failure[:PEER_FAILURE_CHARACTERS_MAX]),
    )


def line_measurement_message(line: LineMeasurement | None) -> node_pb2.LineMeasurement | None:
    if line is None:
        return None
    return node_pb2.LineMeasurement(
        measured_at_unix_ms=line.measured_at_unix_ms,
        round_trip_microseconds=line.round_trip_microseconds,
        upload_bytes_per_second=line.upload_bytes_per_second,
        download_bytes_per_second=line.download_bytes_per_second,
    )


def line_measurement_value(holder: node_pb2.Inventory | node_pb2.Heartbeat) -> LineMeasurement | None:
    """What a node measured towards its coordinator, if it did; a figure that no line can have, 0 or less, is none."""
    if not holder.HasField("line"):
        return None
    line = holder.line
    return LineMeasurement(
        measured_at_unix_ms=line.measured_at_unix_ms,
        round_trip_microseconds=line.round_trip_microseconds if line.round_trip_microseconds > 0 else None,
        upload_bytes_per_second=line.upload_bytes_per_second if line.upload_bytes_per_second > 0 else None,
        download_bytes_per_second=line.download_bytes_per_second if line.download_bytes_per_second > 0 else None,
    )


def _accelerator_message(card: Accelerator) -> node_pb2.Accelerator:
    return node_pb2.Accelerator(
        name=card.name,
        uuid=card.uuid,
        memory_bytes=card.memory_bytes,
        compute_capability=card.compute_capability,
        pcie_width=card.pcie_width,
        pcie_width_max=card.pcie_width_max,
        pcie_generation_max=card.pcie_generation_max,
        power_limit_milliwatts=card.power_limit_milliwatts,
        numa_node=card.numa_node,
        nvlink_peer_uuids=card.nvlink_peer_uuids,
        pcie_peer_uuids=card.pcie_peer_uuids,
    )


def _accelerator_value(message: node_pb2.Accelerator) -> Accelerator:
    bridged = items(message.nvlink_peer_uuids, ACCELERATORS_MAX, "accelerators.nvlink_peer_uuids")
    reached = items(message.pcie_peer_uuids, ACCELERATORS_MAX, "accelerators.pcie_peer_uuids")
    return Accelerator(
        name=text(message.name, "accelerators.name"),
        uuid=text(message.uuid, "accelerators.uuid"),
        memory_bytes=message.memory_bytes,
        compute_capability=text(message.compute_capability, "accelerators.compute_capability"),
        pcie_width=set_field(message, "pcie_width"),
        pcie_width_max=set_field(message, "pcie_width_max"),
        pcie_generation_max=set_field(message, "pcie_generation_max"),
        power_limit_milliwatts=set_field(message, "power_limit_milliwatts"),
        numa_node=set_field(message, "numa_node"),
        nvlink_peer_uuids=tuple(text(uuid, "accelerators.nvlink_peer_uuids") for uuid in bridged),
        pcie_peer_uuids=tuple(text(uuid, "accelerators.pcie_peer_uuids") for uuid in reached),
    )


def _group_offer_message(offer: GroupOffer) -> node_pb2.GroupOffer:
    return node_pb2.GroupOffer(site=offer.site, address=offer.address, port=offer.port, trusted_account_ids=offer.trusted_account_ids)


def _group_offer_value(message: node_pb2.GroupOffer) -> GroupOffer:
    trusted = items(message.trusted_account_ids, TRUSTED_ACCOUNTS_MAX, "group_offer.trusted_account_ids")
    return GroupOffer(
        site=text(message.site, "group_offer.site"),
        address=text(message.address, "group_offer.address"),
        port=message.port,
        trusted_account_ids=tuple(AccountId(text(account_id, "group_offer.trusted_account_ids")) for account_id in trusted),
    )
