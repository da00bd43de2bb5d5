"""How many ways a JSON schema leaves open at one place of an answer, once llama.cpp has made a grammar of it.

Such grammars are too large to be walked, and too much alike to need it: an answer can be read in several ways only where a choice has
branches that begin alike. Decides by counting those on every way through the schema, and what llama.cpp writes out more than once. What is
looked up more than once is kept in `schema_nodes`. It must not know requests.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Final, TypeAlias

from potluck_coordinator.domain.grammar_stacks import STACKS_MAX
from potluck_coordinator.domain.grammar_walk import GrammarBranchesError, Steps
from potluck_coordinator.domain.schema_nodes import Node, Schema, Target, read_node

BRANCHES_MAX: Final = 1024
"""Of one choice, with those of the choices in it, or values of an `enum`. llama.cpp compares each with each."""
OPTIONAL_MAX: Final = 256
"""Properties of one object that an answer may leave out: llama.cpp's work grows with their number's cube, as it does with all objects'."""
COPIES_MAX: Final = 20_000
"""Values, once lists of types are written out: llama.cpp visits what is beneath one for each of its types."""
REPEATS_MAX: Final = 1_000_000
"""Of characters and items, in all: llama.cpp writes a rule for each that may or may not come."""
NODE_STEPS: Final = 6
"""That reading a schema into a node and ordering it takes, beside its properties."""

_TELL_APART: Final = "put the property that tells the branches apart first, with a `const` or `enum`"
_Weighed: TypeAlias = list[tuple[Node, int]]
"""Nodes, and how often each stands there."""


def check_schema_branches(root: Schema, steps: Steps) -> None:
    """Raises GrammarBranchesError."""
    _Branches(root, steps).run()


class _Branches:
    def __init__(self, root: Schema, steps: Steps) -> None:
        self.root = root
        self.steps = steps
        self.targets = Target(root, steps)
        self.nodes: dict[int, Node] = {}

    def run(self) -> None:
        self._collect()
        order = TopologicalSorter({number: list(map(id, node.same_place)) for number, node in self.nodes.items()})
        try:
            for number in order.static_order():
                node = self.nodes[number]
                node.openings = self._openings(node)
                if node.is_reference and node.same_place:  # what it leads to comes before it in this order
                    node.resolved = self.nodes[id(node.same_place[0])].resolved
        except CycleError:
            raise GrammarBranchesError("a schema refers to itself and to nothing else") from None
        self._check_optional()
        self._check_products()

    def _collect(self) -> None:
        pending: list[tuple[Schema, int]] = [(self.root, 1)]
        copy_count, repeat_count = 0, 0.0
        while pending:
            schema, times = pending.pop()
            if id(schema) in self.nodes:
                self.steps.take(1)
                continue
            node = read_node(schema, self.targets, times)
            self.steps.take(NODE_STEPS + len(node.properties) + len(node.required) + len(node.same_place))
            self.nodes[id(schema)] = node
            copy_count += times
            repeat_count += times * node.repeats
            if repeat_count > REPEATS_MAX:
                raise GrammarBranchesError(f"more than {REPEATS_MAX} characters and items once its repeats are written out")
            if copy_count > COPIES_MAX:
                raise GrammarBranchesError(f"more than {COPIES_MAX} values once its lists of types are written out")
            below = 1 if node.is_reference else times * node.type_count
            pending += [(inner, below) for inner in (*node.same_place, *node.inside())]

    def _openings(self, node: Node) -> int:
        """Ways in which an answer may begin with it."""
        count = node.value_count
        if node.is_reference or node.is_choice:
            count = sum(self.nodes[id(inner)].openings for inner in node.same_place)
        count *= node.type_count
        if count > BRANCHES_MAX:
            raise GrammarBranchesError(f"more than {BRANCHES_MAX} ways to begin one value")
        return count

    def _check_optional(self) -> None:
        work = 0
        for node in self.nodes.values():
            count = len(node.properties) - len(node.required)
            if node.is_joined:
                for member in node.same_place:
                    parts = (member, *self.nodes[id(member)].any_of)
                    self.steps.take(len(parts))
                    count += sum(len(self._resolved(part).properties) for part in parts)
            work += node.copies * count**3
            if count > OPTIONAL_MAX or work > OPTIONAL_MAX**3:
                raise GrammarBranchesError(f"more than {OPTIONAL_MAX} properties to leave out, or nearly as many in several objects")

    def _resolved(self, schema: Schema) -> Node:
        """What it stands for, through references."""
        return self.nodes[id(schema)].resolved

    def _check_products(self) -> None:
        """Branches that begin alike multiply on the way down; on a way that comes back to itself, they do without end."""
        root = self._resolved(self.root)
        products = {id(root): 1}
        below: dict[int, list[tuple[Node, int]]] = {}
        to_do = [root]
        while to_do:
            node = to_do.pop()
            if id(node) not in below:
                below[id(node)] = self._below(node)
            self.steps.take(1 + len(below[id(node)]))
            for inner, alike_count in below[id(node)]:
                product = products[id(node)] * alike_count
                if product > STACKS_MAX:
                    raise GrammarBranchesError(f"branches that begin alike, in each other, too often; {_TELL_APART}")
                if product > products.get(id(inner), 0):
                    products[id(inner)] = product
                    to_do.append(inner)

    def _below(self, node: Node) -> list[tuple[Node, int]]:
        """The schemas inside, and how many stand there at once for llama.cpp."""
        leaves = self._leaves(node)
        objects = [(leaf, leaf.object_count * count) for leaf, count in leaves if leaf.object_count]
        arrays = [(leaf, leaf.array_count * count) for leaf, count in leaves if leaf.array_count]
        of_objects, of_arrays = max(1, self._alike(objects)), max(1, sum(count for _, count in arrays))
        inside: dict[int, tuple[Node, int]] = {}
        for leaves_of_kind, count, schemas_of in ((arrays, of_arrays, self._items), (objects, of_objects, self._members)):
            for leaf, _ in leaves_of_kind:
                for schema in schemas_of(leaf):
                    inner = self._resolved(schema)
                    inside[id(inner)] = (inner, max(count, inside.get(id(inner), (inner, 0))[1]))
        return list(inside.values())

    def _items(self, leaf: Node) -> Sequence[Schema]:
        self.steps.take(1 + len(leaf.items))
        return leaf.items

    def _members(self, leaf: Node) -> Iterator[Schema]:
        parts = {id(part): part for part in (leaf, *map(self._resolved, leaf.same_place))}
        choices = [self._resolved(choice) for part in list(parts.values())[1:] for choice in part.any_of]
        self.steps.take(1 + len(leaf.same_place) + len(choices))
        parts |= {id(choice): choice for choice in choices}
        for part in parts.values():
            self.steps.take(1 + len(part.properties))
            yield from part.properties.values()
            yield from part.additional

    def _leaves(self, node: Node) -> _Weighed:
        """What it may stand for, through references and choices."""
        counts: Counter[int] = Counter()
        pending = [node]
        while pending:
            self.steps.take(1)
            node = pending.pop()
            if node.is_reference or node.is_choice:
                pending += map(self._resolved, node.same_place)
            else:
                counts[id(node.schema)] += 1
        return [(self.nodes[number], count) for number, count in counts.items()]

    def _alike(self, objects: _Weighed) -> int:
        """The most of them that one beginning may belong to when it comes to a value that is an object or list itself."""
        most = 0
        groups = [(objects, 0)]
        while groups:
            group, depth = groups.pop()
            self.steps.take(1 + len(group))
            total = sum(count for _, count in group)
            if total < 2 or total <= most:
                most = max(most, total)
                continue
            most = max(most, 1)
            by_name: dict[str | None, _Weighed] = defaultdict(list)
            for node, count in group:
                by_name[node.required[depth] if depth < len(node.required) else None].append((node, count))
            loose = by_name.pop(None, [])
            for name, named in by_name.items():
                values = [self._resolved(node.properties[name]) for node, _ in named] if name is not None else []
                if all(value.is_scalar for value in values):
                    groups += [(same, depth + 1) for same in self._by_value(named, values)]
                else:
                    most = max(most, sum(count for _, count in named))
            most = max(most, *(self._alike_loosely(node, group) for node, _ in loose)) if loose else most
        return most

    def _alike_loosely(self, node: Node, others: _Weighed) -> int:
        """One that may end here or go on with what may be left out: alike is who has such a name, too."""
        names = self._nesting(node)
        self.steps.take(1 + len(others))
        alike_count = 0
        for other, count in others:
            other_names = self._nesting(other)
            if names is not None and other_names is not None:
                self.steps.take(1 + min(len(names), len(other_names)) // 8)
                if names.isdisjoint(other_names):
                    continue
            alike_count += count
        return max(1, alike_count)

    def _nesting(self, node: Node) -> set[str] | None:
        """Its properties that are objects or lists themselves; None where any may be."""
        if not node.properties or any(node.additional):
            return None
        if node.nesting is None:
            self.steps.take(1 + len(node.properties))
            node.nesting = {name for name, value in node.properties.items() if not self._resolved(value).is_scalar}
        return node.nesting

    def _by_value(self, nodes: _Weighed, values: list[Node]) -> list[_Weighed]:
        """Those that may have the same text there; whatever is not held to certain texts may have any."""
        any_text: _Weighed = []
        by_text: dict[str, _Weighed] = defaultdict(list)
        for weighed, value in zip(nodes, values, strict=True):
            if value.texts is None:
                any_text.append(weighed)
                continue
            self.steps.take(1 + len(value.texts))
            for text in value.texts:
                by_text[text].append(weighed)
        self.steps.take(len(by_text) * (1 + len(any_text)))
        return [any_text, *(group + any_text for group in by_text.values())]
