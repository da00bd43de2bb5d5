"""What a request may ask an engine to hold its answer to: schemas, grammars, patterns, choices and tools, within bounds.

An engine compiles these before it answers, in a time that grows faster than they do, and some never come to an end. Decides how large, how
deep and repetitive they may be, and how many ways they may leave open, by counting and by walking llama.cpp's grammars as it does; the
walks are the domain's. It must not know models.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final, TypeAlias

import msgspec
from msgspec import Meta, Raw, Struct

from potluck_coordinator.domain.grammar_check import check_grammar
from potluck_coordinator.domain.grammar_rules import GrammarSizeError, GrammarUnreadableError
from potluck_coordinator.domain.grammar_walk import GrammarBranchesError, Steps
from potluck_coordinator.domain.pattern_grammar import pattern_grammar
from potluck_coordinator.domain.schema_branches import check_schema_branches
from potluck_protocol.errors import ErrorCode, PotluckError

SCHEMA_BYTES_MAX: Final = 64 * 1024
SCHEMA_DEPTH_MAX: Final = 32
"""Of JSON; OpenAI lets schemas nest ten deep, and each of those levels is two or three of JSON."""
SCHEMA_NODES_MAX: Final = 10_000
"""Values in it; OpenAI's bound is 5,000 properties."""
REPEAT_MAX: Final = 2000
"""Of what a schema or pattern may ask for again: engines write some of it out as often. llama.cpp's own bound."""
GRAMMAR_CHARACTERS_MAX: Final = 32 * 1024
PATTERN_CHARACTERS_MAX: Final = 2048
CHOICE_COUNT_MAX: Final = 1024
CHOICE_CHARACTERS_MAX: Final = 1024
TOOL_COUNT_MAX: Final = 128
"""OpenAI's own."""
TOOLS_BYTES_MAX: Final = 256 * 1024
"""Of the descriptions and schemas of all of them together: they also stand in the prompt."""

WALKED_GRAMMARS_MAX: Final = 1024
"""And patterns, that passed and are remembered."""
VALUES_BY_STEP: Final = 8
PATTERN_CHARACTERS_BY_STEP: Final = 4

_REPEATS: Final = frozenset({"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"})
_REPEAT: Final = re.compile(r"\{\s*+(\d*+)\s*+(?:,\s*+(\d*+)\s*+)?+\}")
"""Gives nothing back once it has taken it: else many spaces would be tried in every way to share them out."""

_OTHER_GRAMMARS: Final = "%llguidance"
"""How a grammar begins that llama.cpp hands on to a library which has bounds of its own."""

ABSENT: Final = Raw()
"""What is not in a body, of a value that is looked into by itself."""
Grammar: TypeAlias = Annotated[str, Meta(max_length=GRAMMAR_CHARACTERS_MAX)]
Pattern: TypeAlias = Annotated[str, Meta(max_length=PATTERN_CHARACTERS_MAX)]
Choices: TypeAlias = Annotated[list[Annotated[str, Meta(max_length=CHOICE_CHARACTERS_MAX)]], Meta(max_length=CHOICE_COUNT_MAX)]


class StructuredOutputs(Struct):
    """vLLM's `structured_outputs`."""

    json: Raw = ABSENT
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Grammar | None = None
    structural_tag: Raw = ABSENT


class Guides(Struct, kw_only=True):
    """The fields by which engines beside OpenAI's own take such demands; to be inherited."""

    grammar: Grammar | None = None
    """llama.cpp's, as the next one."""
    json_schema: Raw = ABSENT
    guided_json: Raw = ABSENT
    """vLLM's of old, as the next three."""
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Grammar | None = None
    structured_outputs: StructuredOutputs | None = None
    regex: Pattern | None = None
    """SGLang's, as the next one."""
    ebnf: Grammar | None = None


def check_guides(guides: Guides, steps: Steps) -> None:
    """Raises INVALID_REQUEST for what is over the bounds, with `param` naming it. `steps` are all that the request's checks may take."""
    structured = guides.structured_outputs or StructuredOutputs()
    schemas = (
        ("json_schema", guides.json_schema),
        ("guided_json", guides.guided_json),
        ("structured_outputs.json", structured.json),
        ("structured_outputs.structural_tag", structured.structural_tag),
    )
    size_bytes = 0
    for param, schema in schemas:
        size_bytes += len(bytes(schema))
        if size_bytes > SCHEMA_BYTES_MAX:
            raise _refused(param, f"{size_bytes} bytes of schemas; up to {SCHEMA_BYTES_MAX} are taken")
    for param, schema in schemas:
        check_schema(schema, param, steps)
    patterns = (("guided_regex", guides.guided_regex), ("regex", guides.regex), ("structured_outputs.regex", structured.regex))
    grammars = (("grammar", guides.grammar), ("guided_grammar", guides.guided_grammar), ("ebnf", guides.ebnf))
    for param, text in (*patterns, *grammars, ("structured_outputs.grammar", structured.grammar)):
        if text is not None:
            _check_repeats(text, param, is_walked=param == "grammar")
    if guides.grammar and not guides.grammar.startswith(_OTHER_GRAMMARS):
        with _refusing("grammar"):
            _walk(guides.grammar, steps)


def check_schema(raw: Raw, param: str, steps: Steps) -> None:
    """The same of a JSON schema, or of JSON that holds some; one that is written as a text is looked into, and none passes."""
    if not bytes(raw):
        return
    if len(bytes(raw)) > SCHEMA_BYTES_MAX:
        raise _refused(param, f"{len(bytes(raw))} bytes; up to {SCHEMA_BYTES_MAX} are taken")
    try:
        value = msgspec.json.decode(raw)
        if isinstance(value, str):
            value = msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError):
        # As a text it may be something else; the engine says what it thinks of that. Text alone compiles to nothing large.
        return
    with _refusing(param):
        patterns = _check_tree(value, param, steps)
        if isinstance(value, dict):
            check_schema_branches(value, steps)
        _check_patterns(patterns, steps)


@contextmanager
def _refusing(param: str) -> Iterator[None]:
    """Whatever the checks find is the request's fault, also where they find no end to it."""
    try:
        yield
    except (GrammarUnreadableError, GrammarBranchesError) as error:
        raise _refused(param, str(error)) from None
    except RecursionError:
        raise _refused(param, "nested too deep to be looked through") from None


def _check_patterns(patterns: set[str], steps: Steps) -> None:
    for pattern in sorted(patterns):
        steps.take(1 + len(pattern) // PATTERN_CHARACTERS_BY_STEP)
        grammar = pattern_grammar(pattern)
        if grammar is None:
            continue
        try:
            _walk(grammar, steps)
        except GrammarSizeError:
            raise
        except GrammarUnreadableError:  # nor does llama.cpp take it, and other engines' patterns are none of its grammars
            continue


def _walk(grammar: str, steps: Steps) -> None:
    if grammar not in _walked:
        check_grammar(grammar, steps)
        _walked.add(grammar)


class _Walked:
    """Texts that passed, by their hashes: an application sends the same ones again and again."""

    def __init__(self) -> None:
        self._digests: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, text: str) -> bool:
        digest = self._digest(text)
        if digest not in self._digests:
            return False
        self._digests.move_to_end(digest)
        return True

    def add(self, text: str) -> None:
        self._digests[self._digest(text)] = None
        if len(self._digests) > WALKED_GRAMMARS_MAX:
            self._digests.popitem(last=False)

    def clear(self) -> None:
        self._digests.clear()

    def _digest(self, text: str) -> bytes:
        return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


_walked: Final = _Walked()


def _check_tree(value: Any, param: str, steps: Steps) -> set[str]:
    """The patterns in it."""
    patterns: set[str] = set()
    node_count = 0
    level = [value]
    for _ in range(SCHEMA_DEPTH_MAX):
        node_count += len(level)
        if node_count > SCHEMA_NODES_MAX:
            raise _refused(param, f"more than {SCHEMA_NODES_MAX} values in it")
        steps.take(len(level) // VALUES_BY_STEP)
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                steps.take(1)
                patterns |= _check_node(node, param)
                below += node.values()
            elif isinstance(node, list):
                below += node
        if not below:
            return patterns
        level = below
    raise _refused(param, f"nested more than {SCHEMA_DEPTH_MAX} deep")


def _check_node(node: dict[str, Any], param: str) -> set[str]:
    for name in _REPEATS & node.keys():
        times = node[name]
        if isinstance(times, int | float) and times > REPEAT_MAX:
            raise _refused(param, f"`{name}` of {times}; up to {REPEAT_MAX} are taken")
    pattern = node.get("pattern")
    if isinstance(pattern, str):
        if len(pattern) > PATTERN_CHARACTERS_MAX:
            raise _refused(param, f"a pattern of {len(pattern)} characters; up to {PATTERN_CHARACTERS_MAX} are taken")
        _check_repeats(pattern, param)
        return {pattern}
    return set()


def _check_repeats(text: str, param: str, *, is_walked: bool = False) -> None:
    """Also the repeats of repeats: written out, they multiply. Who walks a text sees which of them are in each other at all."""
    product = 1
    for found in _REPEAT.finditer(text):
        times = max((int(number[:9]) for number in found.groups() if number), default=1)
        product *= max(1, times)
        if times > REPEAT_MAX or (product > REPEAT_MAX**2 and not is_walked):
            raise _refused(param, f"repeats as {found[0][:40]}; up to {REPEAT_MAX} times, and {REPEAT_MAX**2} in all, are taken")


def _refused(param: str, words: str) -> PotluckError:
    return PotluckError(ErrorCode.INVALID_REQUEST, f"`{param}` is too much for an engine: {words}.", param=param)
