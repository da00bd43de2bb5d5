"""What a request may ask an engine to hold its answer to: schemas, grammars, patterns, choices and tools, within bounds.

An engine compiles these before it answers, in a time that grows faster than they do, and some never come to an end. Decides how large, how
deep and repetitive they may be, and how many ways they may leave open, by counting and by walking llama.cpp's grammars as it does; the
walks are the domain's. It must not know models.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated, Any, Final, TypeAlias

import msgspec
from msgspec import Meta, Raw, Struct

from potluck_coordinator.domain.grammar_readings import check_readings
from potluck_coordinator.domain.grammar_rules import ROOT, GrammarSizeError, GrammarUnreadableError, read_grammar
from potluck_coordinator.domain.grammar_stacks import check_stacks
from potluck_coordinator.domain.grammar_walk import GrammarBranchesError, Steps, Walker, check_left_ends
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

WALKED_GRAMMARS_MAX: Final = 64
"""That passed, and are remembered."""

_REPEATS: Final = frozenset({"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"})
_REPEAT: Final = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")

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


def check_guides(guides: Guides) -> None:
    """Raises INVALID_REQUEST for what is over the bounds, with `param` naming it."""
    structured = guides.structured_outputs or StructuredOutputs()
    for param, schema in (
        ("json_schema", guides.json_schema),
        ("guided_json", guides.guided_json),
        ("structured_outputs.json", structured.json),
        ("structured_outputs.structural_tag", structured.structural_tag),
    ):
        check_schema(schema, param)
    patterns = (("guided_regex", guides.guided_regex), ("regex", guides.regex), ("structured_outputs.regex", structured.regex))
    grammars = (("grammar", guides.grammar), ("guided_grammar", guides.guided_grammar), ("ebnf", guides.ebnf))
    for param, text in (*patterns, *grammars, ("structured_outputs.grammar", structured.grammar)):
        if text is not None:
            _check_repeats(text, param, is_walked=param == "grammar")
    if guides.grammar and not guides.grammar.startswith(_OTHER_GRAMMARS):
        try:
            _walk_whole(guides.grammar)
        except (GrammarUnreadableError, GrammarBranchesError) as error:
            raise _refused("grammar", str(error)) from None


def check_schema(raw: Raw, param: str, steps: Steps | None = None) -> None:
    """The same of a JSON schema, or of JSON that holds some; one that is written as a text is looked into, and none passes.

    `steps` are what several schemas of one request may take together.
    """
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
    patterns = _check_tree(value, param)
    try:
        if isinstance(value, dict):
            check_schema_branches(value)
        _check_patterns(patterns, steps or Steps())
    except (GrammarSizeError, GrammarBranchesError) as error:
        raise _refused(param, str(error)) from None


def _check_patterns(patterns: set[str], steps: Steps) -> None:
    for grammar in filter(None, map(pattern_grammar, sorted(patterns))):
        try:
            _walk(grammar, steps)
        except GrammarSizeError:
            raise
        except GrammarUnreadableError:  # nor does llama.cpp take it, and other engines' patterns are none of its grammars
            continue


@lru_cache(maxsize=WALKED_GRAMMARS_MAX)
def _walk_whole(grammar: str) -> None:
    """A request's own, which has all the steps: an application sends the same one again and again."""
    _walk(grammar, Steps())


def _walk(grammar: str, steps: Steps) -> None:
    rules, loops = read_grammar(grammar), read_grammar(grammar, has_loops=True)
    walker, root = Walker(rules, steps), rules.numbers[ROOT]
    check_left_ends(walker)
    check_readings(Walker(loops, steps), loops.numbers[ROOT])
    check_stacks(walker, root, rules.copies)


def _check_tree(value: Any, param: str) -> set[str]:
    """The patterns in it."""
    patterns: set[str] = set()
    node_count = 0
    level = [value]
    for _ in range(SCHEMA_DEPTH_MAX):
        node_count += len(level)
        if node_count > SCHEMA_NODES_MAX:
            raise _refused(param, f"more than {SCHEMA_NODES_MAX} values in it")
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
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
