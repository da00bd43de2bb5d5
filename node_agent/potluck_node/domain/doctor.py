"""What is wrong with a machine, from what the probes found and its owner said.

Decides which checks there are and the order of their lines: the driver, the engines, the cards one by one, what the cards share, then the
machine and its way to the pool. It must not know how a fact is got, nor how a finding is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from potluck_node.domain import doctor_caps, doctor_cards, doctor_host, doctor_line, doctor_links, doctor_pool, doctor_power
from potluck_node.domain.findings import Check, Examination, Finding

CHECKS: Final[Mapping[str, Check]] = {
    "driver": doctor_host.check_driver,
    "engines": doctor_host.check_engines,
    "cards": doctor_cards.check_presence,
    "pcie": doctor_links.check_pcie,
    "nvlink": doctor_links.check_nvlink,
    "numa": doctor_links.check_numa,
    "heat": doctor_cards.check_heat,
    "clocks": doctor_cards.check_clocks,
    "power": doctor_power.check_power_supply,
    "caps": doctor_caps.check_caps,
    "vram": doctor_cards.check_foreign_memory,
    "faults": doctor_cards.check_faults,
    "memory": doctor_host.check_memory,
    "shared_memory": doctor_host.check_shared_memory,
    "disk": doctor_host.check_disk,
    "node": doctor_pool.check_node,
    "network": doctor_pool.check_coordinator,
    "line": doctor_line.check_line,
    "ports": doctor_pool.check_ports,
    "clock": doctor_pool.check_clock,
}
"""By the name that programs know each by; these names stay."""


def diagnose(examination: Examination) -> tuple[Finding, ...]:
    """Every finding, good ones too."""
    return tuple(replace(finding, check=name) for name, check in CHECKS.items() for finding in check(examination))
