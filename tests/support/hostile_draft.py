"""A sound model on its way to be a hostile one: what lies in its folder, and what the catalogue pins."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potluck_protocol.values import PinnedFile
from tests.support.tiny_model_folder import pin

CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
GGUF = "tiny.gguf"


@dataclass
class Draft:
    """A sound model, until a maker is done with it."""

    random: random.Random
    folder: Path
    files: dict[str, bytes]
    pins: dict[str, PinnedFile] = field(default_factory=dict)
    """By the name of the file; what is missing is pinned as it is."""
    more_pins: list[PinnedFile] = field(default_factory=list)
    source: str = ""

    def any_of(self, *names: str) -> str:
        return self.random.choice(names or tuple(self.files))

    def all_pins(self) -> list[PinnedFile]:
        as_they_are = {name: pin(name, content) for name, content in self.files.items()}
        return [*(as_they_are | self.pins).values(), *self.more_pins]

    def pin_before(self, name: str) -> None:
        """The catalogue is honest: it pins the file as it is now."""
        self.pins[name] = pin(name, self.files[name])

    def edit_json(self, name: str, edit: Callable[[Any], None]) -> None:
        value = json.loads(self.files[name])
        edit(value)
        self.files[name] = json.dumps(value).encode()


Maker = Callable[[Draft], str]
"""Makes the draft hostile, and returns a regular expression for the whole text of its refusal."""
