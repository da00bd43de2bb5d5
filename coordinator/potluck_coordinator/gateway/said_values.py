"""Reads of an answer's JSON what could be text, within bounds, and builds nothing of the rest.

Decides how much of one choice is read. A node sends what it likes, and this runs where all other answers wait for their turn: six
megabytes of `[]` in place of a message took 0.4 s and 120 MiB when they were decoded as they came. What is passed over takes 2 ms a
megabyte and no memory. What of it is text is `domain.delivered_text`'s.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Raw

from potluck_coordinator.domain.delivered_text import DEPTH_MAX, OBJECT_NAMES, TEXT_NAMES

ABSENT: Final = Raw()
READ_BYTES_MAX: Final = 4 * 1024 * 1024
"""Of one choice's message or text: more than an engine writes in a request's ten minutes."""
SMALL_BYTES_MAX: Final = 512
"""Of one choice that is decoded whatever it is, as is almost every piece of a stream: that is twice as fast."""
ITEM_COUNT_MAX: Final = 256
"""Of one list: parts of a text, calls of tools."""
VALUE_COUNT_MAX: Final = 2048
"""Of one choice, lists and objects included."""
OBJECT_BYTES_MAX: Final = 128 * 1024
"""Of one choice: what is decoded whatever it is, which may take 8 ms and 3 MiB. Nearly all engines send arguments as a text instead."""

_QUOTE, _LIST, _OBJECT = b'"[{'

# Both leave out in silence what has no place in them. The second takes a list for an object whose names are its places.
_NAMES: Final = (*TEXT_NAMES, *OBJECT_NAMES)
_Fields: Final = msgspec.defstruct("_Fields", [(name, Raw, ABSENT) for name in _NAMES])
_Items: Final = msgspec.defstruct("_Items", [(f"item_{number}", Raw, ABSENT) for number in range(ITEM_COUNT_MAX)], array_like=True)
_fields_decoder: Final = msgspec.json.Decoder(_Fields)
_items_decoder: Final = msgspec.json.Decoder(_Items)
_text_decoder: Final = msgspec.json.Decoder(str)
_any_decoder: Final = msgspec.json.Decoder()


class SaidValues:
    """One choice's; each is read once."""

    __slots__ = ("_object_bytes_left", "_values_left")

    def __init__(self) -> None:
        self._values_left = VALUE_COUNT_MAX
        self._object_bytes_left = OBJECT_BYTES_MAX

    def value(self, raw: Raw) -> object:
        """Texts, and lists and objects of such, by the names that can hold text; of what is not small None in place of everything else.

        Raises:
            msgspec.DecodeError, UnicodeDecodeError, RecursionError: it is no JSON after all.
        """
        if 0 < len(raw) <= SMALL_BYTES_MAX:
            return _any_decoder.decode(raw)
        return self._value(raw, DEPTH_MAX) if raw and len(raw) <= READ_BYTES_MAX else None

    def _value(self, raw: Raw, depth_max: int) -> object:
        kind = memoryview(raw)[0]
        if kind == _QUOTE:
            return _text_decoder.decode(raw)
        self._values_left -= 1
        if depth_max == 0 or self._values_left < 0:
            return None
        if kind == _LIST:
            items = msgspec.structs.astuple(_items_decoder.decode(raw))
            return [self._value(item, depth_max - 1) for item in items if item is not ABSENT]
        if kind == _OBJECT:
            fields = zip(_NAMES, msgspec.structs.astuple(_fields_decoder.decode(raw)), strict=True)
            return {name: self._field(name, field, depth_max - 1) for name, field in fields if field is not ABSENT}
        return None

    def _field(self, name: str, raw: Raw, depth_max: int) -> object:
        if name not in OBJECT_NAMES or memoryview(raw)[0] == _QUOTE:
            return self._value(raw, depth_max)
        self._object_bytes_left -= len(raw)
        return _any_decoder.decode(raw) if self._object_bytes_left >= 0 else None
