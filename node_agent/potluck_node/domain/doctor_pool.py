"""Checks of the node as one of a pool's: what it keeps of itself, its coordinator, its ports, its clock.

Decides what an agent needs, and what of it may be reached from outside. What was not looked at is told as such.
"""

from __future__ import annotations

from typing import Final

from potluck_node.domain.findings import Examination, Finding, Level, OwnerWord, listed
from potluck_node.domain.hardware import Reach
from potluck_protocol.private_network import address_refusal

CLOCK_WARN_SECONDS: Final = 30
CLOCK_FAIL_SECONDS: Final = 300
"""A node's certificate is valid from five minutes before it was made: a clock further behind refuses it."""


def check_node(examination: Examination) -> tuple[Finding, ...]:
    """Whether the agent still knows who it is; said only where it does not."""
    agent = examination.agent
    return (Finding(Level.FAIL, "node", agent.damage, agent.damage_fix),) if agent.damage else ()


def check_coordinator(examination: Examination) -> tuple[Finding, ...]:
    """Whether the coordinator's three ports are reached."""
    network = examination.network
    if network is None:
        if examination.agent.damage:
            return ()
        return (Finding(Level.OK, "network", "not joined to a pool yet, so there is no coordinator to reach", "potluck node join"),)
    bad = tuple(_unreached(reach) for reach in network.reaches if reach.round_trip_ms is None)
    if bad:
        return bad
    trips = [reach.round_trip_ms for reach in network.reaches if reach.service == "link" and reach.round_trip_ms is not None]
    distance = f", {trips[0]:.1f} ms away" if trips else ""
    return (Finding(Level.OK, "network", f"the coordinator's {listed(r.service for r in network.reaches)} ports are reached{distance}"),)


def check_ports(examination: Examination) -> tuple[Finding, ...]:
    """That nothing of the agent can be reached from outside, but by a group's other machines where the owner lets them."""
    owner, listening = examination.owner, None if examination.network is None else examination.network.listening
    if owner.group_failure:
        fix = "set group_site and group_address in node.toml, an address of a private network, or take both out"
        return (Finding(Level.FAIL, "ports", f"no agent starts with these settings: {owner.group_failure.rstrip('.')}", fix),)
    if listening:
        return (_open_ports(listening, owner),)
    if listening is None and examination.agent.running:
        return (Finding(Level.WARN, "ports", "the system does not tell on what the agent listens", "sudo ss -tlnp"),)
    looked = (
        "none of the agent's processes listens beyond this machine now"
        if listening is not None
        else "not looked at: no agent runs here now"
    )
    return (Finding(Level.OK, "ports", f"{looked}; {_allowed_words(owner)}"),)


def check_clock(examination: Examination) -> tuple[Finding, ...]:
    """Whether this machine and the coordinator agree about the time."""
    network = examination.network
    if network is None:
        what = "not compared: there is no coordinator to compare it with yet"
        return () if examination.agent.damage else (Finding(Level.OK, "clock", what, "timedatectl"),)
    skew_seconds = network.clock_skew_seconds
    if skew_seconds is None:
        return (
            Finding(Level.WARN, "clock", "not compared: the coordinator's was not seen", "timedatectl tells whether it is kept in time"),
        )
    what = f"{abs(skew_seconds):.0f} s {'behind' if skew_seconds < 0 else 'ahead of'} the coordinator's"
    if abs(skew_seconds) < CLOCK_WARN_SECONDS:
        return (Finding(Level.OK, "clock", what),)
    level = Level.FAIL if abs(skew_seconds) >= CLOCK_FAIL_SECONDS else Level.WARN
    return (Finding(level, "clock", what, "sudo timedatectl set-ntp true"),)


def _unreached(reach: Reach) -> Finding:
    level = Level.FAIL if reach.service == "link" else Level.WARN
    what = f"the coordinator's {reach.service} port {reach.target} is not reached: {reach.failure}"
    return Finding(level, "network", what, "ask the operator whether it runs; your firewall must let TCP out to that port")


def _open_ports(listening: tuple[str, ...], owner: OwnerWord) -> Finding:
    what = f"the agent's processes listen beyond this machine, on {listed(listening)}"
    if not owner.group_allowed:
        # A flag of the running agent's is in no settings.
        fix = "if `potluck node run` was given no --group-site, stop it and report this: without one a node opens no port"
        return Finding(Level.WARN, "ports", what, fix)
    if any(address_refusal(_host(address)) for address in listening):
        return Finding(Level.WARN, "ports", what, "let your firewall keep all but your group's network away from these ports")
    return Finding(Level.OK, "ports", f"{what}, for the group that group_site allows")


def _allowed_words(owner: OwnerWord) -> str:
    if not owner.group_allowed:
        return "without group_site it opens none"
    ports = listed(str(port) for port in owner.group_ports)
    return f"group_site lets other machines of its site reach it at {owner.group_address}, ports {ports} and those of a group's engine"


def _host(address: str) -> str:
    """Of "192.168.1.2:29600" or "[fd00::2]:29600", without the interface's name."""
    return address.rpartition(":")[0].strip("[]").partition("%")[0]
