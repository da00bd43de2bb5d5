"""What the probes found, as frozen values.

Decides the words for a machine's hardware and the few facts that follow from others: which pairs of cards are truly joined, and how much of
a card others hold. It must not know the driver's library, nor what is good or bad: `domain.doctor` judges.

None stands for a fact that its probe could not get, and is never 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ThrottleReason(StrEnum):
    """Why a card's clocks are below what it was asked for. A power cap alone is how a capped card works, not an alarm."""

    POWER_CAP = "power_cap"
    SOFTWARE_THERMAL = "software_thermal"
    HARDWARE_THERMAL = "hardware_thermal"
    HARDWARE_SLOWDOWN = "hardware_slowdown"
    POWER_BRAKE = "power_brake"
    SYNC_BOOST = "sync_boost"


class DriverAbsence(StrEnum):
    """Why the driver's library cannot be used."""

    LIBRARY_NOT_FOUND = "library_not_found"
    DRIVER_NOT_LOADED = "driver_not_loaded"
    NO_PERMISSION = "no_permission"
    VERSION_MISMATCH = "version_mismatch"
    OTHER = "other"


class PeerStatus(StrEnum):
    """The driver's answer to whether two cards may reach each other's memory."""

    OK = "ok"
    CHIPSET_NOT_SUPPORTED = "chipset_not_supported"
    CARD_NOT_SUPPORTED = "card_not_supported"
    TOPOLOGY_NOT_SUPPORTED = "topology_not_supported"
    DISABLED = "disabled"
    NOT_SUPPORTED = "not_supported"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class CardIdentity:
    """What does not change while the driver is loaded."""

    name: str | None = None
    uuid: str | None = None
    bus_id: str | None = None
    """As the kernel writes it: "0000:01:00.0"."""
    compute_capability: str | None = None
    """Such as "8.6"."""
    memory_bytes: int | None = None
    bar1_bytes: int | None = None
    """The window through which others see the card's memory: 256 MiB without Resizable BAR."""
    shutdown_celsius: int | None = None
    slowdown_celsius: int | None = None
    operating_max_celsius: int | None = None
    target_celsius: int | None = None
    """What the fans and clocks are steered towards."""
    power_limit_default_milliwatts: int | None = None
    power_limit_min_milliwatts: int | None = None
    power_limit_max_milliwatts: int | None = None
    clock_sm_max_mhz: int | None = None
    clock_memory_max_mhz: int | None = None
    pcie_generation_max: int | None = None
    """Of the card in this board: an older board lowers it."""
    pcie_width_max: int | None = None


@dataclass(frozen=True, slots=True)
class CardReading:
    """What changes from second to second."""

    temperature_celsius: int | None = None
    thermal_margin_celsius: int | None = None
    """How far it is from slowing down by itself; a 3090 does not tell it, and later cards no threshold."""
    power_milliwatts: int | None = None
    power_limit_milliwatts: int | None = None
    """The one in force."""
    energy_millijoules: int | None = None
    """Since the driver was loaded; only differences mean anything."""
    clock_sm_mhz: int | None = None
    clock_memory_mhz: int | None = None
    throttle_reasons: tuple[ThrottleReason, ...] | None = None
    utilization_percent: int | None = None
    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None
    pcie_generation: int | None = None
    """Drops while the card is idle: it says something only beside `utilization_percent`."""
    pcie_width: int | None = None
    """Does not drop while the card is idle."""
    pcie_replay_count: int | None = None


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a card sits, by the kernel."""

    numa_node: int | None = None
    """None also where the machine has only one."""
    card_width_max: int | None = None
    """Lanes that the card itself has."""
    slot_width_max: int | None = None
    """Lanes that the port above it has."""


@dataclass(frozen=True, slots=True)
class NvLink:
    """One of a card's NVLink ports."""

    active: bool
    remote_bus_id: str | None = None


@dataclass(frozen=True, slots=True)
class CardProcess:
    """A process that holds some of a card's memory."""

    pid: int
    kind: str
    """ "compute" or "graphics"."""
    memory_bytes: int | None
    own: bool
    """Whether it belongs to this node's agent."""
    name: str = ""
    """For the owner's eyes only; empty where it is hidden or unknown."""


@dataclass(frozen=True, slots=True)
class Card:
    """One card. Of a lost one only what was known before is left."""

    index: int
    identity: CardIdentity = CardIdentity()
    reading: CardReading = CardReading()
    slot: Slot = Slot()
    nvlinks: tuple[NvLink, ...] = ()
    processes: tuple[CardProcess, ...] | None = None
    engine_here: bool = False
    """Whether an engine of this node, starting or running, was given this card."""
    engine_serves: bool = False
    """Whether it is ready, and so holds memory of the card; one that starts may not have come so far."""
    lost: bool = False
    """The driver no longer reaches it."""


@dataclass(frozen=True, slots=True)
class CardPair:
    """Two cards, by index, and what the driver grants between them."""

    first: int
    second: int
    nvlink: PeerStatus | None = None
    read: PeerStatus | None = None


@dataclass(frozen=True, slots=True)
class XidEvent:
    """A fault that the driver wrote down."""

    xid: int
    bus_id: str | None = None


@dataclass(frozen=True, slots=True)
class Driver:
    """The NVIDIA driver, or why there is none."""

    version: str | None = None
    cuda_version: str | None = None
    """The newest that it can run, such as "13.2"."""
    absence: DriverAbsence | None = None
    absence_text: str = ""
    """What the library or the driver said."""
    bus_card_count: int | None = None
    """NVIDIA display devices on the PCI bus, driver or not."""


@dataclass(frozen=True, slots=True)
class Host:
    """The machine around the cards."""

    operating_system: str | None = None
    cpu_name: str | None = None
    cpu_count: int | None = None
    memory_bytes: int | None = None
    """What this process and those that it starts may use."""
    memory_installed_bytes: int | None = None
    """Of the whole machine, or of the virtual one; more, where a control group limits what may be used."""
    memory_available_bytes: int | None = None
    disk_free_bytes: int | None = None
    """Where models are kept."""
    shared_memory_bytes: int | None = None
    """Of /dev/shm, through which the processes of one engine talk; containers often have 64 MiB."""
    numa_nodes_allowed: tuple[int, ...] | None = None
    """Those that have a processor which this process may use."""


@dataclass(frozen=True, slots=True)
class Reach:
    """One try to reach the coordinator."""

    service: str
    """ "link", "grpc" or "http"."""
    target: str
    round_trip_ms: float | None = None
    """Of a TCP connection's start; None where it failed."""
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Network:
    """The way to the coordinator, of a node that has joined."""

    reaches: tuple[Reach, ...] = ()
    clock_skew_seconds: float | None = None
    """This machine's clock less the coordinator's, as good as two seconds."""
    upload_bytes_per_second: int | None = None
    """Towards the coordinator."""
    download_bytes_per_second: int | None = None
    rate_age_seconds: float | None = None
    """How long ago the rates were measured; None where there are none."""
    rate_failure: str = ""
    """Why a rate is missing, or was not measured anew."""
    listening: tuple[str, ...] | None = None
    """Addresses beyond loopback on which the agent's own processes listen; None where no agent runs or its sockets are hidden."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """Everything that was found at one look."""

    host: Host = Host()
    driver: Driver = Driver()
    cards: tuple[Card, ...] = ()
    pairs: tuple[CardPair, ...] = ()
    xids: tuple[XidEvent, ...] | None = None
    """Since the machine was started; None where the kernel's log may not be read."""


def joined_pairs(pairs: tuple[CardPair, ...]) -> tuple[tuple[int, int], ...]:
    """The pairs that NVLink truly joins. An active link is no proof, since it is a fact of one card: only the peer status of both is."""
    return tuple(
        (pair.first, pair.second) for pair in pairs if pair.nvlink is PeerStatus.OK and (pair.read is PeerStatus.OK or pair.read is None)
    )


def pcie_peer_pairs(pairs: tuple[CardPair, ...]) -> tuple[tuple[int, int], ...]:
    """The pairs that reach each other's memory without NVLink. Stock drivers of GeForce cards grant it to none."""
    joined = set(joined_pairs(pairs))
    return tuple((pair.first, pair.second) for pair in pairs if pair.read is PeerStatus.OK and (pair.first, pair.second) not in joined)


def foreign_bytes(used_bytes: int | None, processes: tuple[CardProcess, ...] | None, *, engine_here: bool) -> int | None:
    """What of a card's memory is held by others than this node's engines; None where the driver tells too little.

    All that is used less what our own processes hold: processes of other containers use memory and are in nobody's list. In a container
    the driver may list none of ours either, or by numbers that are not the container's; then nobody can tell whose the memory is.

    Args:
        used_bytes: of the card, by everyone.
        processes: those that the driver lists; None where it lists none of any kind.
        engine_here: whether an engine of this node was given the card.
    """
    own = [process.memory_bytes for process in processes or () if process.own]
    own_bytes = held_bytes(processes or ())
    if used_bytes is None or own_bytes is None or (engine_here and not own):
        return None
    return max(0, used_bytes - own_bytes)


def held_bytes(processes: tuple[CardProcess, ...] | None) -> int | None:
    """What our own processes hold of a card's memory; None where the driver does not say."""
    held = [process.memory_bytes for process in processes or () if process.own]
    known = [size_bytes for size_bytes in held if size_bytes is not None]
    return None if processes is None or len(known) < len(held) else sum(known)
