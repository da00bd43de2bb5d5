"""What the operator offers: models with their pinned files, prices and limits, and the wish to have them served.

Decides nothing; these are the words that planning, pricing and the edges share.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from potluck_coordinator.domain.fit.architecture import ModelArchitecture
from potluck_protocol.values import Endpoint, ModelFile, ModelId

ATTACH_PREFIX: Final = "attach:"
"""Of the source of a model that owners' own engines serve already, under the name after it; it has no files."""
ATTACH_KIND: Final = "attach"
"""The engine kind of such a model, and of no other."""


class ServiceTier(StrEnum):
    """What is promised of a deployment, in OpenAI's `service_tier` words."""

    FLEX = "flex"
    """Best effort: it makes room for the other tier, never the other way round."""
    DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One model of the catalogue. Prices are whole micro-credits a token."""

    model_id: ModelId
    file: ModelFile | None
    """None while nobody has pinned the files: such an entry is an offer, which cannot be deployed."""
    engine_kinds: tuple[str, ...]
    """The engines that can serve it, the preferred one first."""
    context_length_tokens: int
    """Of one slot: prompt and answer together."""
    slot_count: int
    """Requests that one replica answers at a time, where its memory holds so many; a node may have room for fewer."""
    prompt_price_micro_credits: int
    completion_price_micro_credits: int
    licence: str
    endpoints: tuple[Endpoint, ...]
    created_at_unix_seconds: int
    architecture: ModelArchitecture | None = None
    """None: not known; what it needs is then judged by the size of its files."""
    quantization: str = ""
    """ "awq", "gptq", …; empty: none, or as a GGUF file has it."""
    repository: str = ""
    """Of an entry without files: where `potluck models add` finds them, as "hf:ORG/NAME"."""
    unchecked: str = ""
    """Which facts of the entry nobody has compared with the repository, in words; empty: all were."""

    @property
    def attached_name(self) -> str:
        """What owners' own engines call the model; empty for one that nodes fetch and start."""
        source = self.file.source if self.file is not None else ""
        return source.removeprefix(ATTACH_PREFIX) if source.startswith(ATTACH_PREFIX) else ""


FORMATS: Final = {"llamacpp": ".gguf", "vllm": ".safetensors", "sglang": ".safetensors"}
"""How the files end that an engine reads weights from; of any other engine nothing is known."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """The wish "this model, this many replicas, this tier"; None asks for one on every node that may serve."""

    model_id: ModelId
    replica_count: int | None = None
    tier: ServiceTier = ServiceTier.DEFAULT


def not_pinned(entry: CatalogueEntry) -> str:
    """Why an entry without files cannot be deployed, and the command that pins it."""
    return f"its files are not pinned: run `potluck models add {entry.repository}@REVISION --as {entry.model_id}`"


def engine_refusal(entry: CatalogueEntry) -> str:
    """Why one of the entry's engines would never start with its files, and the option that is right; empty where nothing is wrong."""
    names = [file.file_name for file in entry.file.files] if entry.file is not None and not entry.attached_name else []
    has = {ending for ending in FORMATS.values() if any(name.endswith(ending) for name in names)}
    wrong = [kind for kind in entry.engine_kinds if names and FORMATS.get(kind, "") not in {"", *has}]
    if not wrong:
        return ""
    if not has:
        return f"{wrong[0]} reads {FORMATS[wrong[0]].removeprefix('.')} files, and it has none"
    right = " ".join(f"--engine {kind}" for kind, ending in FORMATS.items() if ending in has)
    wanted, found = FORMATS[wrong[0]].removeprefix("."), " and ".join(sorted(ending.removeprefix(".") for ending in has))
    return f"{wrong[0]} reads {wanted} files, and it has {found}; add it anew with {right}"
