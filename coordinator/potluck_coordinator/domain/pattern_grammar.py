"""Patterns of JSON schemas, written as grammars the way llama.cpp does it.

Decides what llama.cpp would make of a pattern, as far as that can branch. It must not know requests.
"""

from __future__ import annotations

from typing import Final

_SIGNS: Final = frozenset("|()*+?")
_ESCAPED: Final = frozenset('^$.[]()|{}*+?\\"-/')
_ESCAPES_OF_GRAMMARS: Final = frozenset("trnxuU")


def pattern_grammar(pattern: str) -> str | None:
    """None for what llama.cpp refuses: what is not held to both ends, looks about, or names classes by a letter."""
    if not (pattern.startswith("^") and pattern.endswith("$")):
        return None
    parts: list[str] = []
    place, end = 1, len(pattern) - 1
    while place < end:
        sign = pattern[place]
        if sign == "\\":
            escaped = pattern[place + 1 : place + 2]
            if escaped in _ESCAPES_OF_GRAMMARS:
                length = {"x": 4, "u": 6, "U": 10}.get(escaped, 2)
                parts.append(f'"{pattern[place : place + length]}"')
                place += length
                continue
            if escaped not in _ESCAPED:
                return None
            parts.append(_literal(escaped))
            place += 2
        elif sign == "[":
            after = _set_end(pattern, place, end)
            parts.append(pattern[place:after])
            place = after
        elif sign == "(" and pattern[place + 1 : place + 2] == "?":
            if pattern[place + 2 : place + 3] != ":":
                return None
            parts.append("(")
            place += 3
        elif sign == "{":
            after = pattern.find("}", place) + 1 or end
            parts.append("{0" + pattern[place + 1 : after] if pattern[place + 1 : place + 2] == "," else pattern[place:after])
            place = after
        else:
            parts.append(sign if sign in _SIGNS else "." if sign == "." else _literal(sign))
            place += 1
    return f"root ::= ( {' '.join(parts)} )"


def _literal(sign: str) -> str:
    return f'"\\{sign}"' if sign in '"\\' else f'"{sign}"'


def _set_end(pattern: str, place: int, end: int) -> int:
    place += 1
    while place < end and pattern[place] != "]":
        place += 2 if pattern[place] == "\\" else 1
    return min(place + 1, end)
