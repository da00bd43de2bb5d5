"""Counts the weights that a stage of a group has really loaded; vLLM imports it into each of its workers (`--worker-extension-cls`).

Decides what counts: the bytes of the worker's parameters as they were read from the files, before vLLM packs them for its kernels. Each
worker writes its count into the folder that `foreign_server` names, which adds them up. Where this vLLM has no such loader, or a count
cannot be made or written, nothing is counted, and nothing else changes: no engine ends of a count. It must not know what the count is for;
only vLLM and torch are there beside the standard library.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any, Final

FOLDER_VARIABLE: Final = "POTLUCK_STAGE_WEIGHTS"
_LOADER: Final = ("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader")


class Nothing:
    """What vLLM mixes into its worker's class. It wants some class, and this one adds nothing to it."""


def count_what_is_loaded(loader_class: Any, folder: Path) -> None:
    """From now on, whatever a loader of this class loads is counted into the folder, in a file of this process's."""
    load_weights = loader_class.load_weights

    def load_and_count(self: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        loaded = load_weights(self, model, *arguments, **options)
        try:
            _count(model, folder)
        except Exception as error:  # noqa: BLE001 - whatever a disk or another vLLM's model may say; the model is loaded
            print(f"the weights were not counted: {error}", file=sys.stderr)  # noqa: T201 - the engine's own log
        return loaded

    loader_class.load_weights = load_and_count


def _count(model: Any, folder: Path) -> None:
    # Whole, or not there.
    draft = folder / f"{os.getpid()}.draft"
    draft.write_text(str(parameter_bytes(model)))
    draft.rename(folder / str(os.getpid()))


def parameter_bytes(model: Any) -> int:
    """Of all parameters of a torch module, those that it uses twice once; layers of other stages have none."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _main() -> None:
    folder = os.environ.get(FOLDER_VARIABLE, "")
    try:
        loader_class = getattr(importlib.import_module(_LOADER[0]), _LOADER[1])
    except (ImportError, AttributeError):
        return
    if folder:
        count_what_is_loaded(loader_class, Path(folder))


_main()
