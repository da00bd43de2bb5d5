"""Machines for the doctor's checks, made up of the facts that a test is about."""

from __future__ import annotations

from potluck_node.domain.findings import Examination, Finding, Level, OwnerWord
from potluck_node.domain.hardware import Card, CardIdentity, CardReading, Driver, Hardware, Host, Network, Reach


def machine(
    *cards: Card, pairs=(), network=None, supply_watts=None, engine_kinds=(), built_for=None, xids=(), host=None, driver=None
) -> Examination:
    hardware = Hardware(host or Host(), driver or Driver("595.71.05", "13.2"), cards, pairs, xids)
    owner = OwnerWord(supply_watts, frozenset({*engine_kinds, *(built_for or {})}), engine_cuda_versions=built_for or {})
    return Examination(hardware, network, owner)


def levels(findings: tuple[Finding, ...]) -> list[Level]:
    return [finding.level for finding in findings]


def limited(index: int, limit_watts: int, lowest_watts: int = 100) -> Card:
    identity = CardIdentity(power_limit_min_milliwatts=lowest_watts * 1000)
    return Card(index, identity, CardReading(power_limit_milliwatts=limit_watts * 1000))


def reached(link: float | None, grpc: float | None = 1.0, http: float | None = 1.0) -> Network:
    trips = {"link": link, "grpc": grpc, "http": http}
    return Network(tuple(Reach(name, f"pool:{name}", trip, "" if trip else "Connection refused") for name, trip in trips.items()))
