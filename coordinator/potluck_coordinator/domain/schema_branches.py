"""How many ways a JSON schema leaves open at one place of an answer, once llama.cpp has made a grammar of it.

Such grammars are too large to be walked, and too much alike to need it: an answer can be read in several ways only where a choice has
branches that begin alike. Decides by counting those on every way through the schema, and what llama.cpp writes out more than once. It must
not know requests.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Any, Final, TypeAlias

from potluck_coordinator.domain.grammar_stacks import STACKS_MAX
from potluck_coordinator.domain.grammar_walk import GrammarBranchesError

BRANCHES_MAX: Final = 1024
"""Of one choice, with those of the choices in it, or values of an `enum`. llama.cpp compares each with each."""
OPTIONAL_MAX: Final = 256
"""Properties of one object that an answer may leave out: llama.cpp's work grows with their number's cube, as it does with all objects'."""
COPIES_MAX: Final = 20_000
"""Values, once lists of types are written out: llama.cpp visits what is beneath one for each of its types."""
REPEATS_MAX: Final = 1_000_000
"""Of characters and items, in all: llama.cpp writes a rule for each that may or may not come."""
COMPARISONS_MAX: Final = 30_000

Schema: TypeAlias = dict[str, Any]
_SCALARS: Final = frozenset({"string", "integer", "number", "boolean", "null"})
_CHOICES: Final = ("oneOf", "anyOf")
_REPEATS: Final = ("minItems", "maxItems", "minLength", "maxLength")
_ANYTHING: Final[Schema] = {}


def check_schema_branches(root: Schema) -> None:
    """Raises GrammarBranchesError."""
    _Branches(root).run()


class _Branches:
    def __init__(self, root: Schema) -> None:
        self.root = root
        self.nodes: dict[int, Schema] = {}
        self.copies: dict[int, int] = {}
        self.same_place: dict[int, list[Schema]] = {}
        """What stands where a schema does, before anything of it is written."""
        self.openings: dict[int, int] = {}
        self.comparisons_left = COMPARISONS_MAX

    def run(self) -> None:
        self._collect()
        try:
            order = TopologicalSorter({number: list(map(id, nodes)) for number, nodes in self.same_place.items()}).static_order()
            for number in order:
                self.openings[number] = self._openings(number)
        except CycleError:
            raise GrammarBranchesError("a schema refers to itself and to nothing else") from None
        self._check_optional()
        self._check_products()

    def _collect(self) -> None:
        pending: list[tuple[Schema, int]] = [(self.root, 1)]
        copy_count, repeat_count = 0, 0.0
        while pending:
            node, times = pending.pop()
            if id(node) in self.nodes:
                continue
            self.nodes[id(node)] = node
            self.copies[id(node)] = times
            copy_count += times
            for least, most in (_REPEATS[:2], _REPEATS[2:]):
                if _number(node, least) > _number(node, most, least):
                    raise GrammarBranchesError(f"`{least}` above `{most}`")
            repeat_count += times * max(_number(node, name) for name in _REPEATS)
            if repeat_count > REPEATS_MAX:
                raise GrammarBranchesError(f"more than {REPEATS_MAX} characters and items once its repeats are written out")
            if copy_count > COPIES_MAX:
                raise GrammarBranchesError(f"more than {COPIES_MAX} values once its lists of types are written out")
            types = node.get("type")
            below = times * max(1, len(types)) if isinstance(types, list) else times
            same_place = list(self._same_place(node))
            self.same_place[id(node)] = same_place
            pending += [(inner, 1 if "$ref" in node else below) for inner in (*same_place, *_inside(node))]

    def _same_place(self, node: Schema) -> Iterator[Schema]:
        if isinstance(node.get("$ref"), str):
            target = self._target(node["$ref"])
            if target is not None:
                yield target
            return
        for name in (*_CHOICES, "allOf"):
            yield from _schemas(node.get(name))

    def _target(self, pointer: str) -> Schema | None:
        target: Any = self.root
        for part in pointer.partition("#")[2].split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list):
                target = target[int(key)] if key.isdecimal() and len(key) < 6 and int(key) < len(target) else None
            else:
                target = target.get(key) if isinstance(target, dict) else None
        return target if isinstance(target, dict) else None

    def _openings(self, number: int) -> int:
        """Ways in which an answer may begin with it."""
        node = self.nodes[number]
        values = node.get("enum")
        count = len(values) if isinstance(values, list) else 1
        if "$ref" in node or _choice(node):
            count = sum(self.openings[id(inner)] for inner in self.same_place[number])
        types = node.get("type")
        count *= max(1, len(types)) if isinstance(types, list) else 1
        if count > BRANCHES_MAX:
            raise GrammarBranchesError(f"more than {BRANCHES_MAX} ways to begin one value")
        return count

    def _check_optional(self) -> None:
        work = 0
        for number, node in self.nodes.items():
            required = _names(node.get("required"))
            count = sum(name not in required for name in _properties(node))
            for member in self.same_place[number] if "allOf" in node else ():
                count += sum(len(_properties(self._resolved(part))) for part in (member, *_schemas(member.get("anyOf"))))
            work += self.copies[number] * count**3
            if count > OPTIONAL_MAX or work > OPTIONAL_MAX**3:
                raise GrammarBranchesError(f"more than {OPTIONAL_MAX} properties to leave out, or nearly as many in several objects")

    def _resolved(self, node: Schema) -> Schema:
        for _ in range(len(self.nodes)):
            if "$ref" not in node or not self.same_place.get(id(node)):
                break
            node = self.same_place[id(node)][0]
        return node

    def _check_products(self) -> None:
        """Branches that begin alike multiply on the way down; on a way that comes back to itself, they do without end."""
        products = {id(self.root): 1}
        below: dict[int, list[tuple[Schema, int]]] = {}
        to_do = [self.root]
        while to_do:
            node = to_do.pop()
            if id(node) not in below:
                below[id(node)] = self._below(node)
            for inner, alike_count in below[id(node)]:
                self._compare()
                product = products[id(node)] * alike_count
                if product > STACKS_MAX:
                    raise GrammarBranchesError("branches that begin alike, in each other, too often")
                if product > products.get(id(inner), 0):
                    products[id(inner)] = product
                    to_do.append(inner)

    def _below(self, node: Schema) -> list[tuple[Schema, int]]:
        """The schemas inside, and how many stand there at once for llama.cpp."""
        leaves = list(self._leaves(node))
        objects = [leaf for leaf, kind in leaves if kind == "object"]
        arrays = [leaf for leaf, kind in leaves if kind == "array"]
        of_objects, of_arrays = self._alike(objects, 0), len(arrays)
        inside = [(inner, max(1, of_arrays)) for leaf in _once(arrays) for inner in _items(leaf)]
        for leaf in _once(objects):
            parts = [leaf, *(self._resolved(part) for part in self.same_place.get(id(leaf), []))]
            parts += [self._resolved(choice) for part in parts[1:] for choice in _schemas(part.get("anyOf"))]
            inside += [(inner, max(1, of_objects)) for part in parts for inner in (*_properties(part).values(), *_additional(part))]
        return [(inner, count) for inner, count in inside if isinstance(inner, dict)]

    def _leaves(self, node: Schema) -> Iterator[tuple[Schema, str]]:
        """What it may stand for, through references and choices."""
        pending = [node]
        while pending:
            self._compare()
            node = pending.pop()
            if "$ref" in node or _choice(node):
                pending += self.same_place[id(node)]
            else:
                yield from ((node, kind) for kind in _kinds(node))

    def _alike(self, objects: list[Schema], depth: int) -> int:
        """The most of them that one beginning may belong to when it comes to a value that is an object or list itself."""
        self._compare(len(objects))
        if len(objects) < 2:
            return len(objects)
        by_name: dict[str | None, list[Schema]] = defaultdict(list)
        for node in objects:
            required = _required(node)
            by_name[required[depth] if depth < len(required) else None].append(node)
        loose = by_name.pop(None, [])
        most = 1
        for name, group in by_name.items():
            values = [self._resolved(_properties(node)[name]) for node in group] if name is not None else []
            if not all(map(_is_scalar, values)):
                most = max(most, len(group))
            else:
                most = max(most, *(self._alike(same, depth + 1) for same in _by_value(group, values)))
        return max(most, *(self._alike_loosely(node, objects) for node in loose)) if loose else most

    def _alike_loosely(self, node: Schema, others: list[Schema]) -> int:
        """One that may end here or go on with what may be left out: alike is who has such a name, too."""
        self._compare(len(others))
        names = self._nesting(node)
        return max(1, sum(names is None or other_names is None or bool(names & other_names) for other_names in map(self._nesting, others)))

    def _nesting(self, node: Schema) -> set[str] | None:
        if not _properties(node) or any(_additional(node)):
            return None
        self._compare(len(_properties(node)))
        return {name for name, value in _properties(node).items() if not _is_scalar(self._resolved(value))}

    def _compare(self, count: int = 1) -> None:
        self.comparisons_left -= count
        if self.comparisons_left < 0:
            raise GrammarBranchesError("too many branches to compare with each other")


def _number(node: Schema, name: str, otherwise: str = "") -> float:
    value = node.get(name)
    if isinstance(value, int | float):
        return value
    return _number(node, otherwise) if otherwise else 0


def _choice(node: Schema) -> list[Schema]:
    return next((_schemas(node[name]) for name in _CHOICES if name in node), [])


def _schemas(value: Any) -> list[Schema]:
    return [inner for inner in value if isinstance(inner, dict)] if isinstance(value, list) else []


def _properties(node: Schema) -> dict[str, Schema]:
    value = node.get("properties")
    return {name: inner if isinstance(inner, dict) else _ANYTHING for name, inner in value.items()} if isinstance(value, dict) else {}


def _additional(node: Schema) -> list[Schema]:
    value = node.get("additionalProperties")
    return [value] if isinstance(value, dict) else [_ANYTHING] if value is True else []


def _items(node: Schema) -> list[Schema]:
    value = node.get("items", node.get("prefixItems"))
    return [value] if isinstance(value, dict) else _schemas(value)


def _inside(node: Schema) -> list[Schema]:
    if "$ref" in node:
        return []
    return [*_properties(node).values(), *(inner for inner in _additional(node) if inner), *_items(node)]


def _names(value: Any) -> set[str]:
    return {name for name in value if isinstance(name, str)} if isinstance(value, list) else set()


def _required(node: Schema) -> list[str]:
    """In the order in which llama.cpp asks for them."""
    required = _names(node.get("required"))
    return [name for name in _properties(node) if name in required]


def _kinds(node: Schema) -> list[str]:
    types = node.get("type")
    if "const" in node or "enum" in node:
        return []
    if isinstance(types, list):
        return [kind for kind in types if isinstance(kind, str)]
    if isinstance(types, str):
        return [types]
    if "properties" in node or "allOf" in node or "additionalProperties" in node:
        return ["object"]
    return ["array"] if "items" in node or "prefixItems" in node else [] if "pattern" in node else ["object", "array"]


def _is_scalar(node: Schema) -> bool:
    return "$ref" not in node and not _choice(node) and _SCALARS.issuperset(_kinds(node))


def _by_value(nodes: list[Schema], values: list[Schema]) -> Iterable[list[Schema]]:
    """Those that may have the same text there; whatever is not held to certain texts may have any."""
    any_text: list[Schema] = []
    by_text: dict[str, list[Schema]] = defaultdict(list)
    for node, value in zip(nodes, values, strict=True):
        texts = [value["const"]] if "const" in value else value.get("enum")
        if not isinstance(texts, list):
            any_text.append(node)
            continue
        for text in {json.dumps(text) for text in texts}:
            by_text[text].append(node)
    return [any_text, *(group + any_text for group in by_text.values())]


def _once(nodes: list[Schema]) -> Iterable[Schema]:
    return {id(node): node for node in nodes}.values()
