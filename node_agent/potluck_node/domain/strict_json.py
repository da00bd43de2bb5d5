"""JSON that every parser reads alike, within bounds.

Decides what is refused before any engine's own parser sees it: more bytes or depth than a model needs, other encodings, a name twice in one
object (of which parsers take the first, the last or neither). It must not know what the words mean: `model_folder` does.
"""

from __future__ import annotations

import json
from typing import Any, Final

DEPTH_MAX: Final = 32
NAME_SHOWN_CHARACTERS: Final = 60


class BadModelError(ValueError):
    """A model that matches its pins and is still not loaded; its text is one line for people, without the file's name."""


def parse(content: bytes) -> Any:
    """The value that the bytes are; raises BadModelError."""
    try:
        return json.loads(content.decode(), object_pairs_hook=_distinct)
    except UnicodeDecodeError:
        raise BadModelError("it is not UTF-8") from None
    except RecursionError:
        raise BadModelError(f"its JSON is nested deeper than {DEPTH_MAX} levels") from None
    except BadModelError:
        raise
    except ValueError as error:
        raise BadModelError(f"it is no JSON: {shown(str(error))}") from None


def shown(text: str) -> str:
    """Words of the file as they may stand in a reason: short, and on one line."""
    return repr(text)[1:-1] if len(text) <= NAME_SHOWN_CHARACTERS else repr(text[:NAME_SHOWN_CHARACTERS])[1:-1] + "…"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise BadModelError(f"its JSON names {shown(twice)!r} twice in one object")
    return fields
