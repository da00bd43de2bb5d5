"""The built-in model with a vocabulary so many times as large: it says the same, and takes real memory for words that nobody says.

So a model that answers at the pace of a small one is too big for a machine that is limited to a few GiB. Of its table of embeddings the
first stage of a group needs all, and of its head the last one. On disk the added rows, all of them zero, are holes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.safetensors_model import ROOT, built_in_folder, read_header

TIMES_THE_WORDS = 28
"""As many take two tables of 1.5 GiB."""
WEIGHTS = "model.safetensors"
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def large_folder(times: int = TIMES_THE_WORDS) -> Path:
    """The model's folder, with so many times the words. It is made once for this code and the model, in the checkout's cache."""
    source = built_in_folder()
    made_of = hashlib.sha256(Path(__file__).read_bytes() + source.name.encode()).hexdigest()[:16]
    target = ROOT / ".cache" / "models" / f"smollm2-135m-instruct-{times}-times-the-words-{made_of}"
    if not target.is_dir():
        making = Path(tempfile.mkdtemp(prefix="making-", dir=target.parent))
        for file in source.iterdir():
            if file.name not in (WEIGHTS, "config.json"):
                shutil.copy(file, making / file.name)
        config = json.loads((source / "config.json").read_text())
        changed = {"vocab_size": config["vocab_size"] * times, "tie_word_embeddings": False}
        (making / "config.json").write_text(json.dumps({**config, **changed}, indent=1))
        _grow(source / WEIGHTS, making / WEIGHTS, times)
        try:
            making.rename(target)
        except OSError:  # another run was first
            shutil.rmtree(making)
    return target


def _grow(source: Path, target: Path, times: int) -> None:
    header, begin = read_header(source)
    metadata = header.pop("__metadata__")
    arrays = {name: np.memmap(source, np.uint16, "r", begin + one["data_offsets"][0], tuple(one["shape"])) for name, one in header.items()}
    # The head was the same table.
    arrays[_HEAD] = arrays[_EMBEDDINGS]
    grown: dict[str, Any] = {"__metadata__": metadata}
    places: dict[str, int] = {}
    end = 0
    for name, array in arrays.items():
        rows, *columns = array.shape
        shape = [rows * times if name in (_EMBEDDINGS, _HEAD) else rows, *columns]
        places[name] = end
        grown[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + int(np.prod(shape)) * 2]}
    encoded = json.dumps(grown).encode()
    # The tensors begin at a multiple of eight.
    encoded += b" " * (-len(encoded) % 8)
    with target.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        first = file.tell()
        for name, array in arrays.items():
            file.seek(first + places[name])
            file.write(array.tobytes())
        file.truncate(first + end)
