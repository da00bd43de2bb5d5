"""Model folders that mean harm, each one step away from a sound one, with the words that must refuse it.

A case is what a catalogue pins and what lies on the disk. Either the catalogue is honest and the folder is not what it says, or the
catalogue's author pins the harm itself; then every hash is right. `hostile_cases` gives as many as asked for, of all kinds in turn, and the
same ones for the same seed.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from potluck_protocol.values import ModelFile
from tests.support import hostile_contents, hostile_headers, hostile_places
from tests.support.hostile_draft import GGUF, Draft, Maker
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_model_folder import good_files, model_of, write_files


@dataclass(frozen=True)
class HostileCase:
    """One model that must not be loaded."""

    kind: str
    model: ModelFile
    reason: str
    """A regular expression that the refusal's whole text matches."""


MAKERS: dict[str, Maker] = {
    "extra code": hostile_places.code,
    "auto_map and its like": hostile_contents.code_word,
    "pickle and programs in disguise": hostile_contents.disguise,
    "symbolic link": hostile_places.link,
    "path trick": hostile_places.path_trick,
    "flipped byte": hostile_places.flipped_byte,
    "oversized header": hostile_headers.header_length,
    "wrong size": hostile_places.wrong_size,
    "kernel from elsewhere": hostile_contents.kernel,
    "safetensors header": hostile_headers.safetensors_header,
    "GGUF header": hostile_headers.gguf_header,
    "broken JSON": hostile_contents.bad_json,
    "index of other files": hostile_contents.bad_index,
    "two formats at once": hostile_contents.appended,
    "no plain file": hostile_places.no_file,
    "broken tokenizer": hostile_contents.bad_tokenizer,
    "names that are one file": hostile_places.twins,
    "broken pin": hostile_places.bad_pin,
    "source trick": hostile_places.bad_source,
    "file of another format": hostile_contents.swapped,
    "file as a folder": hostile_places.file_as_folder,
    "link on the way": hostile_places.linked_folder,
    "overlong name": hostile_places.long_name,
    "files of an attached engine": hostile_places.files_of_an_attached_engine,
    "too large": hostile_contents.too_large,
}
COSTLY = frozenset({"too large"})
"""64 MB each: one in a hundred cases is enough."""


def good_model(folder: Path) -> ModelFile:
    """The control: what every case was before it was changed."""
    draft = _draft(random.Random(0), folder)
    write_files(folder, draft.files)
    return model_of(f"path:{folder}", draft.all_pins())


def hostile_cases(folder: Path, count: int, seed: int) -> Iterator[HostileCase]:
    """So many cases, one after the other; the folder of each is removed when the next is asked for."""
    chosen = random.Random(seed)
    kinds = _in_turn(count)
    for number, kind in enumerate(kinds):
        draft = _draft(random.Random(chosen.random()), folder / f"{number:03}")
        reason = MAKERS[kind](draft)
        write_files(draft.folder, draft.files)
        yield HostileCase(kind, model_of(draft.source or f"path:{draft.folder}", draft.all_pins()), reason)
        for path in (draft.folder, draft.folder.with_name(draft.folder.name + "-elsewhere")):
            shutil.rmtree(path, ignore_errors=True)


def _in_turn(count: int) -> list[str]:
    kinds: list[str] = []
    while len(kinds) < count:
        kinds += [kind for kind in MAKERS if kind not in COSTLY or len(kinds) % 100 < len(MAKERS)]
    return kinds[:count]


def _draft(chosen: random.Random, folder: Path) -> Draft:
    return Draft(chosen, folder, {**good_files(), GGUF: _tiny_gguf(folder.parent)})


def _tiny_gguf(folder: Path) -> bytes:
    path = folder / "made-once" / GGUF
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tiny_gguf(path)
    return path.read_bytes()
