"""One schema within a JSON schema, with what the counting of branches looks up in it again and again.

Decides which of a schema's words count, and reads each once: a schema may be named by a thousand references, and has its properties only
one time. It must not know what is counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from potluck_coordinator.domain.grammar_walk import GrammarBranchesError, Steps

Schema: TypeAlias = dict[str, Any]
SCALARS: Final = frozenset({"string", "integer", "number", "boolean", "null"})
_CHOICES: Final = ("oneOf", "anyOf")
_PLACES: Final = (*_CHOICES, "allOf")
_REPEATS: Final = (("minItems", "maxItems"), ("minLength", "maxLength"))
_ANYTHING: Final[Schema] = {}
_NOTHING: Final[Mapping[str, Schema]] = {}
_PARTS_BY_STEP: Final = 4


@dataclass(slots=True, eq=False)
class Node:
    """What is left at its default here says nothing of itself; most schemas say little."""

    schema: Schema
    copies: int
    """Times that llama.cpp writes it out."""
    is_reference: bool = False
    is_choice: bool = False
    is_joined: bool = False
    same_place: Sequence[Schema] = ()
    """What stands where it does, before anything of it is written."""
    any_of: Sequence[Schema] = ()
    properties: Mapping[str, Schema] = field(default_factory=lambda: _NOTHING)
    required: Sequence[str] = ()
    """In the order in which llama.cpp asks for them."""
    additional: Sequence[Schema] = ()
    items: Sequence[Schema] = ()
    object_count: int = 0
    """Of its types; a list of types may name one several times."""
    array_count: int = 0
    type_count: int = 1
    value_count: int = 1
    """Of its `enum`."""
    texts: set[str] | None = None
    """Of which it must be one; None is any."""
    repeats: float = 0
    is_scalar: bool = False
    openings: int = 1
    nesting: set[str] | None = None
    target: Node | None = None

    @property
    def resolved(self) -> Node:
        return self.target or self

    @resolved.setter
    def resolved(self, node: Node) -> None:
        self.target = node

    def inside(self) -> Sequence[Schema]:
        return [*self.properties.values(), *self.additional, *self.items]


class Target:
    """What pointers lead to."""

    def __init__(self, root: Schema, steps: Steps) -> None:
        self.root = root
        self.steps = steps
        self._found: dict[str, Schema | None] = {}

    def of(self, pointer: str) -> Schema | None:
        if pointer not in self._found:
            self._found[pointer] = self._follow(pointer)
        return self._found[pointer]

    def _follow(self, pointer: str) -> Schema | None:
        parts = pointer.partition("#")[2].split("/")[1:]
        self.steps.take(1 + len(parts) // _PARTS_BY_STEP)
        target: Any = self.root
        for part in parts:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list):
                target = target[int(key)] if key.isdecimal() and len(key) < 6 and int(key) < len(target) else None
            else:
                target = target.get(key) if isinstance(target, dict) else None
            if target is None:
                break
        return target if isinstance(target, dict) else None


def read_node(schema: Schema, targets: Target, copies: int) -> Node:
    """Raises GrammarBranchesError."""
    node = Node(schema, copies, is_reference="$ref" in schema)
    choice = next((_schemas(schema[name]) for name in _CHOICES if name in schema), ())
    node.is_choice, node.is_joined = bool(choice), "allOf" in schema
    _read_places(node, targets)
    if not node.is_reference:  # beside a reference nothing else counts
        _read_properties(node)
    types = schema.get("type")
    node.type_count = max(1, len(types)) if isinstance(types, list) else 1
    values = schema.get("enum")
    node.value_count = len(values) if isinstance(values, list) else 1
    texts = [schema["const"]] if "const" in schema else values
    if isinstance(texts, list):
        targets.steps.take(len(texts))
        node.texts = set(map(json.dumps, texts))
    kinds = _kinds(schema)
    node.object_count, node.array_count = kinds.count("object"), kinds.count("array")
    node.is_scalar = not node.is_reference and not choice and SCALARS.issuperset(kinds)
    node.repeats = _repeats(schema)
    return node


def _read_places(node: Node, targets: Target) -> None:
    pointer = node.schema.get("$ref")
    if isinstance(pointer, str):
        target = targets.of(pointer)
        node.same_place = () if target is None else (target,)
    elif not node.schema.keys().isdisjoint(_PLACES):
        node.same_place = [inner for name in _PLACES for inner in _schemas(node.schema.get(name))]


def _read_properties(node: Node) -> None:
    properties, additional = node.schema.get("properties"), node.schema.get("additionalProperties")
    node.any_of = _schemas(node.schema.get("anyOf"))
    if isinstance(properties, dict):
        node.properties = {name: inner if isinstance(inner, dict) else _ANYTHING for name, inner in properties.items()}
        required = node.schema.get("required")
        names = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
        node.required = [name for name in node.properties if name in names]
    if additional is True or isinstance(additional, dict):
        node.additional = (_ANYTHING if additional is True else additional,)
    items = node.schema.get("items", node.schema.get("prefixItems"))
    node.items = (items,) if isinstance(items, dict) else _schemas(items)


def _repeats(schema: Schema) -> float:
    times = 0.0
    for least, most in _REPEATS:
        at_least = _number(schema, least, 0)
        at_most = _number(schema, most, at_least)
        if at_least > at_most:
            raise GrammarBranchesError(f"`{least}` above `{most}`")
        times = max(times, at_most)
    return times


def _number(schema: Schema, name: str, otherwise: float) -> float:
    value = schema.get(name)
    return value if isinstance(value, int | float) else otherwise


def _schemas(value: Any) -> Sequence[Schema]:
    return [inner for inner in value if isinstance(inner, dict)] if isinstance(value, list) else ()


def _kinds(schema: Schema) -> list[str]:
    types = schema.get("type")
    if "const" in schema or "enum" in schema:
        return []
    if isinstance(types, list):
        return [kind for kind in types if isinstance(kind, str)]
    if isinstance(types, str):
        return [types]
    if "properties" in schema or "allOf" in schema or "additionalProperties" in schema:
        return ["object"]
    if "items" in schema or "prefixItems" in schema:
        return ["array"]
    return [] if "pattern" in schema else ["object", "array"]
