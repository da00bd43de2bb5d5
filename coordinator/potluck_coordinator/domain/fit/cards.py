"""The cards that the fit knows, and how NVML's names lead to them.

Decides nothing; these are facts of vendors' data sheets (for the RTX 30 series and its workstation cards: the GA102 white paper). It must
not know models or engines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from potluck_coordinator.domain.fit.architecture import GIB

CUDA_VISIBLE_SHARE: Final = 0.982
"""Of a card's nominal memory; the driver keeps the rest. A 24 GiB RTX 3090 shows 23.58 GiB (vLLM issue 10517)."""


class Memory(StrEnum):
    """Kinds of memory that engines drive differently well."""

    GDDR = "gddr"
    HBM = "hbm"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class Family:
    """What cards of one line share."""

    memory: Memory
    fp16_multiply_adds_per_sm_clock: int
    """Dense, in half precision accumulated in half precision: the fastest that the tensor cores go, and so the roofline."""
    fp32_accumulate_share: float
    """Of that rate when accumulating in single precision, as cuBLAS and Marlin do; GeForce cards are held to half."""


GEFORCE: Final = Family(Memory.GDDR, 512, 0.5)
WORKSTATION: Final = Family(Memory.GDDR, 512, 1.0)
AMPERE_DATACENTRE: Final = Family(Memory.HBM, 1024, 1.0)
HOPPER: Final = Family(Memory.HBM, 2048, 1.0)


@dataclass(frozen=True, slots=True)
class CardModel:
    """One model of card."""

    name: str
    """As on the command line: "rtx3090"."""
    family: Family
    memory_gib: float
    bandwidth_gb_per_second: float
    sm_count: int
    boost_ghz: float
    board_power_watts: int
    compute_capability: tuple[int, int]
    nvlink_gb_per_second: float = 0.0
    """Each way, over one bridge or to one neighbour; 0 for a card without."""

    @property
    def memory_bytes(self) -> int:
        """What CUDA shows of it."""
        return int(self.memory_gib * GIB * CUDA_VISIBLE_SHARE)

    @property
    def peak_tflops(self) -> float:
        """The tensor cores' fastest dense half-precision rate: no matrix product passes it."""
        return self.sm_count * self.boost_ghz * 2 * self.family.fp16_multiply_adds_per_sm_clock / 1000

    @property
    def fp32_accumulate_tflops(self) -> float:
        """The rate at which engines multiply half-precision matrices: 71 for an RTX 3090, 312 for an A100."""
        return self.peak_tflops * self.family.fp32_accumulate_share


_MODELS: Final = (
    CardModel("rtx3090", GEFORCE, 24, 936.2, 82, 1.695, 350, (8, 6), 56.25),
    CardModel("rtx3090ti", GEFORCE, 24, 1008, 84, 1.86, 450, (8, 6), 56.25),
    CardModel("rtx3080ti", GEFORCE, 12, 912.4, 80, 1.665, 350, (8, 6)),
    CardModel("rtx3080", GEFORCE, 10, 760.3, 68, 1.71, 320, (8, 6)),
    CardModel("rtx3070", GEFORCE, 8, 448, 46, 1.725, 220, (8, 6)),
    CardModel("rtx3060", GEFORCE, 12, 360, 28, 1.777, 170, (8, 6)),
    CardModel("rtx4090", GEFORCE, 24, 1008, 128, 2.52, 450, (8, 9)),
    CardModel("rtx4080", GEFORCE, 16, 716.8, 76, 2.505, 320, (8, 9)),
    CardModel("rtx4070ti", GEFORCE, 12, 504.2, 60, 2.61, 285, (8, 9)),
    CardModel("rtx5090", GEFORCE, 32, 1792, 170, 2.407, 575, (12, 0)),
    CardModel("rtx2080ti", GEFORCE, 11, 616, 68, 1.545, 250, (7, 5), 50.0),
    CardModel("a6000", WORKSTATION, 48, 768, 84, 1.80, 300, (8, 6), 56.25),
    CardModel("a5000", WORKSTATION, 24, 768, 64, 1.695, 230, (8, 6), 56.25),
    CardModel("a40", WORKSTATION, 48, 696, 84, 1.74, 300, (8, 6), 56.25),
    CardModel("rtx6000ada", WORKSTATION, 48, 960, 142, 2.505, 300, (8, 9)),
    CardModel("rtx5000ada", WORKSTATION, 32, 576, 100, 2.55, 250, (8, 9)),
    CardModel("rtx4000ada", WORKSTATION, 20, 360, 48, 2.175, 130, (8, 9)),
    CardModel("l40s", WORKSTATION, 48, 864, 142, 2.52, 350, (8, 9)),
    CardModel("l4", WORKSTATION, 24, 300, 58, 2.04, 72, (8, 9)),
    CardModel("a100-40", AMPERE_DATACENTRE, 40, 1555, 108, 1.41, 400, (8, 0), 300),
    CardModel("a100-80", AMPERE_DATACENTRE, 80, 2039, 108, 1.41, 400, (8, 0), 300),
    CardModel("a100-80-pcie", AMPERE_DATACENTRE, 80, 1935, 108, 1.41, 300, (8, 0), 300),
    CardModel("h100", HOPPER, 80, 3350, 132, 1.83, 700, (9, 0), 450),
    CardModel("h100-pcie", HOPPER, 80, 2039, 114, 1.62, 350, (9, 0), 300),
    CardModel("h200", HOPPER, 141, 4800, 132, 1.83, 700, (9, 0), 450),
)
CARD_MODELS: Final = {model.name: model for model in _MODELS}

_NOISE: Final = re.compile(r"nvidia|geforce|quadro|rtx|generation|laptop gpu|[\s_-]+")


def card_model(name: str) -> CardModel | None:
    """The card behind NVML's name ("NVIDIA GeForce RTX 3090") or the command line's ("rtx3090"); None where the fit does not know it."""
    lowered = name.lower()
    if lowered in CARD_MODELS:
        return CARD_MODELS[lowered]
    if "laptop" in lowered or "max-q" in lowered:
        return None
    bare = _NOISE.sub("", lowered)
    if bare.startswith(("a100", "h100")):
        return _datacentre_by_name(bare)
    by_bare_name = {_NOISE.sub("", model.name): model for model in _MODELS}
    # "NVIDIA H200" and "NVIDIA L40S" end where the table's names do; "RTX 3080 12GB" is another card than the RTX 3080.
    return by_bare_name.get(bare)


def unlisted_card(name: str, memory_bytes: int, compute_capability: tuple[int, int]) -> CardModel:
    """A card that the fit has no figures for: its memory is known, its speed is guessed low, as an RTX 3060's at most."""
    return CardModel(name or "unknown", GEFORCE, memory_bytes / GIB, 300, 28, 1.5, 150, compute_capability)


def _datacentre_by_name(bare: str) -> CardModel | None:
    """Family, memory and socket in one word: "a100sxm480gb", "a10080gbpcie", "h10080gbhbm3" or "h100pcie"."""
    family, pcie = bare[:4], "pcie" in bare
    if family == "h100":
        return CARD_MODELS["h100-pcie" if pcie else "h100"]
    if "80" in bare.removeprefix("a100"):
        return CARD_MODELS["a100-80-pcie" if pcie else "a100-80"]
    return CARD_MODELS["a100-40"]
