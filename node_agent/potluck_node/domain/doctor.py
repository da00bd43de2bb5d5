"""What is wrong with a machine, from what the probes found and its owner said.

Decides which checks there are and the order of their lines: the driver, the cards one by one, what the cards share, then the machine and
its way to the pool. It must not know how a fact is got, nor how a finding is shown.
"""

from __future__ import annotations

from typing import Final

from potluck_node.domain import doctor_cards, doctor_host, doctor_links
from potluck_node.domain.findings import Check, Examination, Finding

CHECKS: Final[tuple[Check, ...]] = (
    doctor_host.check_driver,
    doctor_cards.check_presence,
    doctor_links.check_pcie,
    doctor_links.check_nvlink,
    doctor_links.check_numa,
    doctor_cards.check_heat,
    doctor_cards.check_clocks,
    doctor_cards.check_power_supply,
    doctor_cards.check_foreign_memory,
    doctor_cards.check_faults,
    doctor_host.check_shared_memory,
    doctor_host.check_disk,
    doctor_host.check_coordinator,
    doctor_host.check_ports,
    doctor_host.check_clock,
)


def diagnose(examination: Examination) -> tuple[Finding, ...]:
    """Every finding, good ones too."""
    return tuple(finding for check in CHECKS for finding in check(examination))
