"""Text that may be pasted in public: what tells who, where or with which key is taken out.

Decides what is taken out, and by which word it is replaced. In doubt it goes: a word with dots is a host, unless it is a version or one of
the node's own files. It must not know where the text comes from: names that no pattern finds (of the machine, its user, its pool) are
handed in, and so are folders with blanks in their names, of which a pattern would find the beginning only.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any, Final

NAME_CHARACTERS_MIN: Final = 3
"""A shorter name is part of too many words to be taken out wherever it stands; in paths and addresses it goes with the whole."""

WORD_CHARACTERS_MAX: Final = 4_096
"""A longer word is longer than any path and goes as a whole; so the patterns' time grows with the text, and not with its square."""

_OWN_FILES: Final = r"node\.(?:toml|json|key|crt)(?![\w-]|\.\w)"
_KEPT_PATHS: Final = rf"(?:dev/shm|\d{{1,3}}|{_OWN_FILES})"
"""What follows a slash and may stay: what is called by it everywhere, a network's size, a share, and the node's own files."""
_WORD: Final = r"[^\s\"'`<>|]"
"""Of a path or a URL: what stands between blanks, quotes and brackets."""
_PART: Final = r"[^\s\"'`<>|/]"
"""The same without the slashes of a path."""
_LONG_WORD: Final = re.compile(rf"(?<!\S)\S{{{WORD_CHARACTERS_MAX + 1},}}+")
# Where a run of characters can begin a match, its first one does; what follows is never given back. Otherwise each would be tried anew.
_PATTERNS: Final = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?s)-----BEGIN [A-Z ]+-----.*?(?:-----END [A-Z ]+-----|\Z)", "<key>"),
        (r"\bpotluck1\.[\w.-]+", "<invite>"),
        (r"\b(?:sk|pk|hf|ghp|gho|github_pat|glpat|xox[abp])[-_][\w-]{6,}", "<token>"),
        (r"\beyJ[\w-]+\.[\w-]+\.[\w-]*", "<token>"),
        (r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{6,}", r"\1 <token>"),
        (r"(?i)\b((?:pass(?:word|wd)?|secret|token|api[_-]?key)[\"']?\s*[=:]\s*[\"']?)[^\s,;\"']+", r"\1<token>"),
        (r"(?i)(--(?:password|secret|token|api-key|key)[ =])\S+", r"\1<token>"),
        (rf"[a-zA-Z][a-zA-Z0-9+.-]{{0,30}}+://{_WORD}++", "<url>"),
        # Before what may stand within a path.
        (rf"(?<!{_WORD})[^\s\"'`<>|\\]*+\\{_WORD}*+", "<path>"),
        # One word after a blank goes too, if it is the path's next part.
        (
            rf"(?<![\w./])(?:~{_PART}{{0,255}}+|\.{{1,2}})?/(?!{_KEPT_PATHS}(?![^\s,;:)])){_WORD}++(?: {_PART}++/{_WORD}*+)*+",
            "<path>",
        ),
        (rf"(?<!{_PART}){_PART}++/{_PART}*+/{_WORD}*+", "<path>"),
        (r"(?<![\w.+-])[\w.+-]++@[\w-]++(?:[.+@]++[\w-]++)*+", "<e-mail>"),
        (r"(?i)(?:\b(?:GPU-|MIG-))?(?<![0-9a-f])[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?![0-9a-f])", "<uuid>"),
        (r"(?i)\b(?:GPU|MIG)-[0-9a-f]{4,}[0-9a-f-]*", "<uuid>"),
        (r"(?i)\b(serial(?:[ _-]?number)?\s*+(?:[=:#]\s*+)?)(?=\w*\d)[\w-]+", r"\1<serial>"),
        (r"(?i)(?<![0-9a-f:-])[0-9a-f]{2}(?:(?:-[0-9a-f]{2}){5,}|(?::[0-9a-f]{2}){5,})(?![0-9a-f])", "<mac>"),
        (r"(?i)(?<![\w.])[0-9a-f]{4}\.[0-9a-f]{4}\.[0-9a-f]{4}(?![\w.])|\benx[0-9a-f]{12}\b", "<mac>"),
    )
)
_PLACES: Final = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\b(?=[a-z2-7]*\d)(?=[a-z2-7]*[a-z])[a-z2-7]{26,}\b", "<id>"),
        (r"\b(?=[0-9a-fA-F]*\d)[0-9a-fA-F]{32,}\b|(?<![\w.])\d{12,}(?![\w.])", "<id>"),
        (r"(?<![\w-])(?=[\w-]*\d)(?=[\w-]*[a-z])(?=[\w-]*[A-Z])[\w-]{20,}", "<token>"),
        (r"(?<![\w.-])[^\W\d_][\w-]*(?:\.[\w-]+)*\.?(?=:\d{2,5}(?!\d))", "<host>"),
        (rf"(?<![\w.-])(?!{_OWN_FILES})[^\W\d_][\w-]*(?:\.[\w-]+)*\.[^\W\d_][\w-]+(?!\.?[\w-])(?:/{_WORD}*)?", "<host>"),
        (rf"(?<![\w.-])(?!{_OWN_FILES})(?:[\w-]+\.)+[^\W\d_]{{2,}}(?!\.?[\w-])(?:/{_WORD}*)?", "<host>"),
    )
)
_IPV4: Final = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?!\d)(?:%[\w.-]+)?(?:/\d{1,3})?")
"""Numbers above 255, too: nothing else looks like that. With the rest of a network's name, which would be half a path."""
_IPV6: Final = re.compile(r"(?<![\w:.])\[?((?:[0-9a-fA-F]{0,4}:){2,}[0-9a-fA-F:.]*)(%[\w.-]+)?\]?(?:/\d{1,3})?")
_IPV6_COLONS_MIN: Final = 3
"""From so many on, hexadecimal numbers between colons are an address, whole or not; times and bus ids have two."""


def redacted(text: str, names: Mapping[str, str]) -> str:
    """The text without secrets and places.

    Args:
        text: what is to be shown.
        names: what else is to go, each with the word that replaces it: folders as they are written, and names, which are matched as whole
            words whatever their case.
    """
    # Folders first: a path with a blank in it is only half a path to the patterns.
    text = _without_names(text, {name: word for name, word in names.items() if "/" in name})
    text = _LONG_WORD.sub("<long word>", text)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    text = _IPV4.sub("<ip>", _IPV6.sub(_without_address, text))
    for pattern, replacement in _PLACES:
        text = pattern.sub(replacement, text)
    return _without_names(text, {name: word for name, word in names.items() if "/" not in name})


def redacted_facts(facts: Any, names: Mapping[str, str]) -> Any:
    """The same of every text in lists and mappings, whose keys are ours. Numbers stay."""
    if isinstance(facts, str):
        return redacted(facts, names)
    if isinstance(facts, Mapping):
        return {key: redacted_facts(value, names) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [redacted_facts(value, names) for value in facts]
    return facts


def _without_names(text: str, names: Mapping[str, str]) -> str:
    for name in sorted(names, key=len, reverse=True):
        if len(name) >= NAME_CHARACTERS_MIN:
            text = re.sub(rf"(?<![\w<]){re.escape(name)}(?![\w>])", names[name], text, flags=re.IGNORECASE)
    return text


def _without_address(found: re.Match[str]) -> str:
    address = found[1]
    # A full stop or a colon after an address belongs to the sentence.
    for end in (len(address), len(address.rstrip(".")), len(address.rstrip(".:"))):
        try:
            ipaddress.IPv6Address(address[:end])
        except ValueError:
            continue
        return "<ip>" + (address[end:] if not found[2] else "")
    # One with its port, or cut off, goes; a bus id or a time, which only look like one, stay.
    return "<ip>" if address.count(":") >= _IPV6_COLONS_MIN else found[0]
