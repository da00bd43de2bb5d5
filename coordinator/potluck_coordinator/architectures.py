"""The architectures that are known by name, from `architectures.toml`.

Decides how a name leads to one. It must not know what is done with it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Annotated, Any

import msgspec

from potluck_coordinator.domain.fit.architecture import ModelArchitecture
from potluck_coordinator.domain.fit.quantizations import quantization_named

_Count = Annotated[int, msgspec.Meta(gt=0)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    layer_count: _Count
    hidden_size: _Count
    attention_head_count: _Count
    kv_head_count: _Count
    head_dim: _Count
    intermediate_size: _Count
    vocabulary_size: _Count
    context_length_max_tokens: _Count
    checked: Annotated[str, msgspec.Meta(min_length=1)]
    aliases: tuple[str, ...] = ()
    expert_count: int = 0
    experts_per_token: int = 0
    tie_word_embeddings: bool = False
    sliding_window_tokens: int = 0
    sliding_layer_count: int = 0
    quantization: str = "none"
    weight_bytes: _Count | None = None

    def architecture(self, model_id: str) -> ModelArchitecture:
        """The value behind the file's words."""
        words = {name: getattr(self, name) for name in self.__struct_fields__}
        for name in ("checked", "aliases", "quantization", "weight_bytes"):
            del words[name]
        return ModelArchitecture(
            model_id=model_id, quantization=quantization_named(self.quantization), weight_bytes_of_files=self.weight_bytes, **words
        )


def known_architecture(name: str) -> ModelArchitecture:
    """The architecture of a model id, or of a repository's name on the hub, however it is capitalised.

    Raises:
        ValueError: the name is not known; the message lists those that are.
    """
    models = _models()
    found = models.get(name.lower())
    if found is None:
        raise ValueError(f"no architecture is known as {name}; known are {', '.join(known_model_ids())}")
    return found


@cache
def known_model_ids() -> tuple[str, ...]:
    """The model ids, aliases left out, in the file's order."""
    return tuple(_entries())


@cache
def _models() -> Mapping[str, ModelArchitecture]:
    models: dict[str, ModelArchitecture] = {}
    for model_id, entry in _entries().items():
        architecture = entry.architecture(model_id)
        for name in (model_id, *entry.aliases):
            assert name.lower() not in models, f"architectures.toml names {name} twice"
            models[name.lower()] = architecture
    return models


@cache
def _entries() -> Mapping[str, _Entry]:
    tables: dict[str, dict[str, Any]] = tomllib.loads(files("potluck_coordinator").joinpath("architectures.toml").read_text())
    return {model_id: msgspec.convert(_with_likeness(tables, table), _Entry) for model_id, table in tables.items()}


def _with_likeness(tables: Mapping[str, Mapping[str, Any]], table: Mapping[str, Any]) -> dict[str, Any]:
    """The table's own words over those of the entry that it is like; names and sizes of files are nobody else's."""
    own = {key: value for key, value in table.items() if key != "like"}
    if "like" not in table:
        return own
    base = _with_likeness(tables, tables[table["like"]])
    return {key: value for key, value in base.items() if key not in {"aliases", "weight_bytes"}} | own
