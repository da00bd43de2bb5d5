"""Text that may be pasted in public: what tells who, where or with which key is taken out.

Decides what is taken out, and by which word it is replaced. It must not know where the text comes from: names that no pattern finds (of the
machine, its user, its pool) are handed in.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Final

NAME_CHARACTERS_MIN: Final = 3
"""A shorter name is part of too many words to be taken out wherever it stands; in paths and addresses it goes with the whole."""

_PATTERNS: Final = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\bpotluck1\.[\w.-]+", "<invite>"),
        (r"\b(?:sk|pk|hf|ghp|gho|github_pat|glpat|xox[abp])[-_][\w-]{6,}", "<token>"),
        (r"\beyJ[\w-]+\.[\w-]+\.[\w-]*", "<token>"),
        (r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{6,}", r"\1 <token>"),
        (r"(?s)-----BEGIN [A-Z ]+-----.*?(?:-----END [A-Z ]+-----|\Z)", "<key>"),
        (r"(?i)\b((?:pass(?:word|wd)?|secret|token|api[_-]?key)[\"']?\s*[=:]\s*[\"']?)[^\s,;\"']+", r"\1<token>"),
        (r"\b[a-zA-Z][a-zA-Z0-9+.-]*://[^\s\"'<>|)]+", "<url>"),
        (r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+", "<e-mail>"),
        (r"\b(?:GPU-|MIG-)?[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b", "<uuid>"),
        (r"\b[0-9a-fA-F]{2}(?:[:-][0-9a-fA-F]{2}){5}\b", "<mac>"),
        (r"(?<![\w.])~(?:[\w.-]+)?/[^\s\"'`<>|,;)]*", "<path>"),
        (r"(?<![\w.<~/])/(?!dev/shm\b)(?:[\w.@+-]+/)*[\w.@+-]+/?", "<path>"),
        (r"(?<![\w])[A-Za-z]:\\[^\s\"'<>|]+", "<path>"),
        (r"\b(?=[a-z2-7]*\d)(?=[a-z2-7]*[a-z])[a-z2-7]{26,}\b", "<id>"),
        (r"\b(?=[0-9a-fA-F]*\d)[0-9a-fA-F]{32,}\b", "<id>"),
        (r"\b(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?\.)+[a-zA-Z]{2,}(?=:\d{1,5}\b)", "<host>"),
        (r"\b(?:[a-zA-Z0-9-]+\.)+(?:com|org|net|io|dev|de|fr|uk|eu|ch|at|edu|lan|local|home|internal|arpa)\b", "<host>"),
    )
)
_ADDRESS: Final = re.compile(r"(?<![\w.:])\[?([0-9a-fA-F:]*:[0-9a-fA-F:.]*|\d{1,3}(?:\.\d{1,3}){3})(%\w+)?\]?")


def redacted(text: str, names: Mapping[str, str]) -> str:
    """The text without secrets and places.

    Args:
        text: what is to be shown.
        names: what else is to go, each with the word that replaces it: folders as they are written, and names, which are matched as whole
            words whatever their case.
    """
    # Folders first: a path with a blank in it is only half a path to the patterns.
    text = _without_names(text, {name: word for name, word in names.items() if "/" in name})
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    text = _ADDRESS.sub(_without_address, text)
    return _without_names(text, {name: word for name, word in names.items() if "/" not in name})


def _without_names(text: str, names: Mapping[str, str]) -> str:
    for name in sorted(names, key=len, reverse=True):
        if len(name) >= NAME_CHARACTERS_MIN:
            text = re.sub(rf"(?<![\w<]){re.escape(name)}(?![\w>])", names[name], text, flags=re.IGNORECASE)
    return text


def _without_address(found: re.Match[str]) -> str:
    whole = found[0]
    # A full stop or a colon after an address belongs to the sentence.
    for end in (len(found[1]), len(found[1].rstrip(".")), len(found[1].rstrip(".:"))):
        try:
            ipaddress.ip_address(found[1][:end])
        except ValueError:
            continue
        return "<ip>" + (found[1][end:] if not found[2] else "")
    # A bus id, a time, a version: what only looks like an address stays.
    return whole
