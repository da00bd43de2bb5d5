"""Grammars, schemas and patterns that leave too much open for llama.cpp, and the ordinary ones that do not."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.grammar_rules import GrammarUnreadableError, read_grammar
from potluck_coordinator.domain.grammar_walk import STEPS_MAX, Steps
from potluck_coordinator.gateway import grammar_bounds
from potluck_coordinator.gateway.grammar_bounds import GRAMMAR_CHARACTERS_MAX
from potluck_coordinator.gateway.openai_request import parse_request
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, Endpoint, RequestId

GRAMMARS = Path(__file__).parents[1] / "fixtures" / "grammars"
LINES = "\n".join
SECONDS_MAX = 0.4
"""Of process time; `STEPS_MAX` steps are a tenth of it where nothing else runs."""


def parse(**fields):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return parse_request(Endpoint.CHAT_COMPLETIONS, json.dumps(body).encode(), RequestId("r"), AccountId("a"))


def refusal(**fields) -> PotluckError:
    with pytest.raises(PotluckError) as refused:
        parse(**fields)
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    return refused.value


def formatted(schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


def tool(schema):
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}


def thing(properties, **more):
    return {"type": "object", "properties": properties, "required": list(properties), **more}


def defined(definitions):
    first = next(iter(definitions))
    return {"$defs": definitions, "$ref": f"#/$defs/{first}"}


def ref(name):
    return {"$ref": f"#/$defs/{name}"}


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    grammar_bounds._walked.clear()


@pytest.mark.parametrize("path", sorted(GRAMMARS.rglob("*.gbnf")), ids=lambda path: path.stem)
def test_an_ordinary_grammar_passes(path):
    """Those in `converted` are as llama.cpp writes them for schemas of so many properties, with its blanks of today or of old."""
    parse(grammar=path.read_text())


def test_what_passed_is_not_walked_again():
    walked, again = Steps(), Steps()
    for steps in (walked, again):
        grammar_bounds.check_guides(grammar_bounds.Guides(grammar=(GRAMMARS / "json.gbnf").read_text()), steps)
    assert (walked.left < STEPS_MAX // 2, again.left) == (True, STEPS_MAX)


def test_a_grammar_that_is_too_much_to_walk_is_told_what_else_there_is():
    grammar = LINES(["root ::= r0", *(f'r{n} ::= "a" r{n + 1} | "b" [a-c] r{n + 1}' for n in range(800)), 'r800 ::= "c"'])
    message = refusal(grammar=grammar).message
    assert str(STEPS_MAX) in message
    assert "`response_format`" in message


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "yes" | "no"',
        "root ::= ws* [a-z]+ ws*\nws ::= [ \\t\\n]*",
        'root ::= ([a-z]{1,40} " "){3,20} "."',
        'root ::= "\\u00e9" . [^\\x00-\\x1f\\]] ("-" | [a\\-z])  # a comment\n\n',
        "root ::= [0-9a-f]{8} [0-9a-f]{4} [0-9a-f]{4} [0-9a-f]{4} [0-9a-f]{12}",
        "root ::= <[12]> !<[13]>* <think>",
        "root ::= " + " | ".join(f'"word {number}"' for number in range(200)),
        "%llguidance {}\nstart: /[a-z]+/",
        "",
    ],
)
def test_what_people_write_passes(grammar):
    parse(grammar=grammar)


def chain(level_count):
    levels = [f"r{level} ::= r{level + 1} r{level + 1} | r{level + 1}" for level in range(level_count)]
    return LINES(["root ::= r0", *levels, f'r{level_count} ::= "a" | ""'])


def spread(level_count):
    """One character at each level."""
    levels = [f'r{level} ::= "a" r{level + 1} "x" | "a" r{level + 1} "y"' for level in range(level_count)]
    return LINES(["root ::= r0", *levels, f'r{level_count} ::= "b"'])


BOMBS = {
    **{f"chain of {count}": chain(count) for count in (4, 8, 12, 22, 200)},
    **{f"spread over {count} characters": spread(count) for count in (9, 22)},
    "two ways back to itself": 'root ::= "a" root "b" | "a" root "c"',
    "two ways back by another rule": 'root ::= "(" x\nx ::= root "b" | y\ny ::= root "c" | "z"',
    "begins with itself behind nothing": 'root ::= a\na ::= b a "x" | "y"\nb ::= c\nc ::= ""',
    "begins with itself": 'root ::= root "a" | "b"',
    "may all be left out": "root ::= " + "[a-z]? " * 60,
    "loops beside each other": "root ::= " + "[a-z]* " * 6,
    "counted loops beside each other": "root ::= [a-z]{0,1000} [a-z]{0,1000}",
    "counted loops in each other": "root ::= x{900}\nx ::= y{0,900}\ny ::= [a-z]",
    "a dot is either": 'root ::= ([a-z.]+ ".")+',
    "many words": "root ::= " + " | ".join(f'"word {number}"' for number in range(1500)),
    "at least more than at most": 'root ::= "a"{5,2}',
    "written out": 'root ::= "' + "a" * 1000 + '"{1999}',
    "nested": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000,
    "an end that is none": 'root ::= "a" root "b" | "a" root "c" # \0\nroot ::= "a"',
    "a range that goes down": "root ::= [z-a]",
    "unreadable": 'root ::= "a" ((',
    "no root": 'start ::= "a"',
    "no such rule": "root ::= nothing",
    "a rule for each": LINES(["root ::= r0", *(f'r{n} ::= "a" r{n + 1} | "b" r{n + 1}?' for n in range(1200)), 'r1200 ::= "c"']),
}


@pytest.mark.parametrize("grammar", BOMBS.values(), ids=BOMBS)
def test_a_grammar_that_branches_without_end_is_refused(grammar):
    assert refusal(grammar=grammar[:GRAMMAR_CHARACTERS_MAX]).param == "grammar"


def typed(level_count):
    schema = {"type": "integer"}
    for _ in range(level_count):
        schema = {"type": ["array", "array"], "items": schema}
    return schema


def optional(count):
    return {"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(count)}}


SCHEMA_BOMBS = {
    "types of types": typed(12),
    "many types of types": typed(28),
    "optional": optional(300),
    "optional in several": thing({f"o{number}": optional(200) for number in range(5)}),
    "itself alone": {"$defs": {"a": ref("a")}, "allOf": [ref("a")]},
    "each other alone": {"$defs": {"a": ref("b"), "b": ref("a")}, "allOf": [ref("a")]},
    "alike and in itself": defined({"n": {"anyOf": [thing({"c": ref("n")}), thing({"c": ref("n"), "d": {"type": "integer"}})]}}),
    "alike but for a text that is any": defined(
        {"n": {"anyOf": [thing({"t": {"const": "x"}, "c": ref("n")}), thing({"t": {"type": "string"}, "c": ref("n")})]}}
    ),
    "alike lists": defined({"n": {"oneOf": [{"type": "array", "items": ref("n")}, {"items": ref("n"), "minItems": 1}]}}),
    "alike in each other": defined({f"d{n}": {"anyOf": [thing({"a": ref(f"d{n + 1}")})] * 2} for n in range(12)} | {"d12": {}}),
    "at one place": defined({f"d{n}": {"anyOf": [ref(f"d{n + 1}")] * 2} for n in range(12)} | {"d12": {}}),
    "an enum": {"enum": list(range(1500))},
    "shorter than short": thing({"a": {"type": "string", "minLength": 5, "maxLength": 2}}),
    "fewer than few": {"type": "array", "items": {}, "minItems": 5, "maxItems": 2},
    "characters": thing({f"s{number}": {"type": "string", "maxLength": 2000} for number in range(600)}),
    "a pattern": {"type": "string", "pattern": "^" + "(a|)" * 18 + "$"},
    "loops in a pattern": {"type": "string", "pattern": "^" + "[a-z]*" * 8 + "$"},
    "repeats in a pattern": {"type": "string", "pattern": "^((([a-z]{0,100})[a-z]{0,100}){0,100}){0,4}$"},
    "a pattern upside down": {"type": "string", "pattern": "^a{5,2}$"},
    "a nested pattern": {"type": "string", "pattern": "^" + "(" * 900 + "a" + ")" * 900 + "$"},
}


@pytest.mark.parametrize("schema", SCHEMA_BOMBS.values(), ids=SCHEMA_BOMBS)
@pytest.mark.parametrize(
    ("place", "param"), [(formatted, "response_format.json_schema.schema"), (tool, "tools[0].function.parameters")], ids=["format", "tool"]
)
def test_a_schema_that_branches_without_end_is_refused_wherever_it_stands(schema, place, param):
    assert refusal(**place(schema)).param == param


def kinds(*names):
    return thing({"kind": {"enum": list(names)}, "child": ref("n")})


SCHEMAS = {
    "nothing": {},
    "steps": thing({"steps": {"type": "array", "items": thing({"why": {"type": "string"}, "what": {"type": "string"}})}}),
    "told apart by a text": defined({"n": {"anyOf": [kinds("a"), kinds("b", "c"), {"type": "null"}]}}),
    "told apart by a name": defined({"n": {"oneOf": [thing({"and": {"type": "array", "items": ref("n")}}), thing({"not": ref("n")})]}}),
    "a tree": defined({"n": thing({"tag": {"type": "string"}, "children": {"type": "array", "items": ref("n")}})}),
    "large": thing({f"f{n}": thing({"a": {"type": ["string", "null"]}, "b": {"type": "array", "items": {}}}) for n in range(300)}),
    "optional": optional(200),
    "nullable": thing({f"f{n}": {"anyOf": [thing({"a": {"type": "object"}}), {"type": "null"}]} for n in range(40)}),
    "a pattern": {"type": "string", "pattern": r"^[a-z0-9._-]+@[a-z0-9-]+(\.[a-z0-9-]+)*$"},
    "an identifier": {"type": "string", "pattern": "^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$"},
    "a range that goes down": {"type": "string", "pattern": "^[z-a]$"},
    "another that goes down": {"type": "string", "pattern": "^[9-0a]$"},
    "loose pattern": {"type": "string", "pattern": "(a|b)*c"},
    "look about": {"type": "string", "pattern": "^(?=a).*$"},
    "joined": {"$defs": {"b": thing({"y": {"type": "integer"}})}, "allOf": [ref("b"), thing({"x": {"type": "string"}})]},
    "a reference that is no text": {"allOf": [{"$ref": 2, "properties": {"x": {"items": {}}}, "anyOf": [thing({"y": {}})]}]},
    "nowhere": {"$ref": "#/$defs/nothing/0/a"},
}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_an_ordinary_schema_passes(schema):
    parse(**formatted(schema))
    parse(**tool(schema))


def test_all_patterns_of_all_tools_share_one_walk():
    """Each is well within it."""
    schemas = [{"pattern": "^" + f"([a-z]{{1,{40 + number}}}[.])?([a-z0-9]+-)*" * 3 + f"{number}$"} for number in range(120)]
    parse(**tool(schemas[0]))
    many = [tool(schema)["tools"][0] for schema in schemas]
    assert str(STEPS_MAX) in refusal(tools=many).message


def scalars(count, **more):
    return thing({f"p{number:03}": {"type": "string"} for number in range(count)} | more)


HOSTILE = {
    "one object from many places": {"$defs": {"a": scalars(1600)}, "anyOf": [ref("a")] * 120},
    "told apart late": {"anyOf": [scalars(181, kind={"const": number}, value={"type": "object"}) for number in range(9)]},
    "joined choices": {"$defs": {"m": {"anyOf": [{"type": "object"}] * 400}}, "anyOf": [{"allOf": [ref("m")] * 40}] * 30},
    "joined references": {
        "$defs": {"b": thing({"x": {}}), "m": {"anyOf": [ref("b")] * 200}},
        "properties": {f"q{number}": {"allOf": [ref("m")]} for number in range(200)},
    },
    "a chain of references": {
        "$defs": {**{f"d{n}": ref(f"d{n + 1}") for n in range(900)}, "d900": {"type": "string"}},
        "anyOf": [thing({"a": ref("d1")})] * 100,
    },
    "alike and long": {"anyOf": [scalars(700), scalars(700)]},
    "nothing alike, nothing required": {
        "anyOf": [{"type": "object", "properties": {f"p{n}{i}": {"type": "object"} for i in range(6)}} for n in range(250)]
    },
    "a long pointer": {"$ref": "#" + "/a" * 30_000},
    "itself in many places": {"properties": {f"p{n}": {"anyOf": [ref("x"), {"$ref": "#"}]} for n in range(250)}},
}


@pytest.mark.timed
@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_whatever_a_schema_holds_all_schemas_of_a_request_are_looked_through_in_so_many_steps(schema):
    """Each fits in alone or is refused; the same one again and again is refused in the end, after no more steps than one may take."""
    raw = msgspec.Raw(json.dumps(schema, separators=(",", ":")).encode())
    assert len(bytes(raw)) <= grammar_bounds.SCHEMA_BYTES_MAX
    steps = Steps()

    def check_often():
        for _ in range(200):
            grammar_bounds.check_schema(raw, "json_schema", steps)

    began = time.process_time()
    with pytest.raises(PotluckError):
        check_often()
    assert time.process_time() - began < SECONDS_MAX


@pytest.mark.parametrize("place", [formatted, tool], ids=["format", "tool"])
def test_two_long_branches_that_are_alike_are_looked_at_to_their_end(place):
    parse(**place({"anyOf": [scalars(600), scalars(600)]}))


def test_only_the_schema_of_a_format_is_one():
    schema = HOSTILE["told apart late"]
    form = formatted({"type": "object"})
    form["response_format"]["json_schema"] |= {f"member{number}": schema for number in range(4)}
    parse(**form)


def test_sizes_are_summed_before_anything_is_looked_at():
    schema = {"description": "x" * 60_000, "pattern": "^" + "(a|)" * 18 + "$"}
    assert refusal(tools=[tool(schema)["tools"][0] for _ in range(5)]).param == "tools"
    assert refusal(json_schema={"description": "x" * 60_000}, guided_json=schema).param == "guided_json"


@pytest.mark.timed
@pytest.mark.parametrize("text", ["{" + " " * 32_000, "{1," + " " * 32_000, "a{" + " " * 32_000 + "x"])
def test_blanks_in_braces_are_passed_over_once(text):
    began = time.process_time()
    with suppress(PotluckError):
        parse(grammar=f"root ::= {text}"[:GRAMMAR_CHARACTERS_MAX], guided_grammar=text)
    assert time.process_time() - began < SECONDS_MAX


def test_ordinary_patterns_of_many_tools_pass():
    date, mail = "^[0-9]{4}-(0[1-9]|1[0-2])-([0-2][0-9]|3[01])$", "^[a-z0-9._%+-]+@[a-z0-9-]+([.][a-z0-9-]+)+[.]t"
    schemas = [thing({"day": {"pattern": date}, "mail": {"pattern": f"{mail}{number}$"}}) for number in range(60)]
    parse(tools=[tool(schema)["tools"][0] for schema in schemas])


def test_a_union_that_begins_alike_is_told_to_begin_with_what_tells_it_apart():
    filters = {"type": "array", "items": ref("f")}
    branches = [thing({"filters": filters, "op": {"const": op}}) for op in ("and", "or")]
    assert "put the property that tells the branches apart first" in refusal(**formatted(defined({"f": {"anyOf": branches}}))).message
    first = [thing({"op": {"const": op}, "filters": filters}) for op in ("and", "or")]
    parse(**formatted(defined({"f": {"anyOf": first}})))


NAMES = st.sampled_from(["root", "a", "b", "c"])
ITEMS = st.sampled_from(['"a"', '"ab"', "[a-c]", "[^b]", ".", '""', "[]"]) | NAMES
SEQUENCES = st.recursive(
    st.lists(ITEMS, max_size=4).map(" ".join),
    lambda inner: st.builds(
        lambda left, right, sign: f"({left} | {right}){sign}", inner, inner, st.sampled_from(["", "*", "?", "+", "{2,9}", "{0,900}", "{3}"])
    ),
    max_leaves=8,
)
GRAMMAR = st.builds(
    lambda root, a, b, c: f"root ::= {root}\na ::= {a}\nb ::= {b}\nc ::= {c}\n", SEQUENCES, SEQUENCES, SEQUENCES, SEQUENCES
) | st.text(st.sampled_from('ab"[]()|*+?{}:=,019-\\^. \n#'), max_size=60).map(lambda text: f"root ::= {text}")


@pytest.mark.timed
@given(GRAMMAR)
def test_any_grammar_is_passed_on_or_refused_by_name_and_soon(grammar):
    began = time.process_time()
    try:
        parse(grammar=grammar)
    except PotluckError as error:
        assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, "grammar")  # noqa: PT017 - either outcome is fine
    assert time.process_time() - began < SECONDS_MAX


KEYWORDS = [
    "items",
    "anyOf",
    "oneOf",
    "allOf",
    "properties",
    "required",
    "$ref",
    "$defs",
    "type",
    "enum",
    "pattern",
    "minItems",
    "maxItems",
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.sampled_from(["array", "object", "#/$defs/x", "#", "#/anyOf/0", "^(a|)*$", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYWORDS, "x"]), inner, max_size=4),
    max_leaves=30,
)


@pytest.mark.timed
@given(st.dictionaries(st.sampled_from(KEYWORDS), VALUES, max_size=6))
def test_any_schema_is_passed_on_or_refused_by_name_and_soon(schema):
    began = time.process_time()
    try:
        parse(json_schema=schema)
    except PotluckError as error:
        assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, "json_schema")  # noqa: PT017 - either outcome is fine
    assert time.process_time() - began < SECONDS_MAX


@pytest.mark.timed
@pytest.mark.parametrize(
    "grammar",
    [
        LINES(["root ::= r0", *(f'r{n} ::= "a" r{n + 1} | "b" [a-c]* r{n + 1}?' for n in range(800)), 'r800 ::= "c"']),
        "root ::= " + " ".join(f'("{chr(97 + n % 26)}" [a-z]* | [{chr(97 + n % 26)}-z])?' for n in range(900)),
        "root ::= [" + "".join(chr(0x4E00 + n) for n in range(20_000)) + "]*",
        "root ::= x{1999}\nx ::= " + " | ".join(f"y{n}" for n in range(250)) + LINES(["", *(f'y{n} ::= "{n}"*' for n in range(250))]),
        "root ::= (" + "a" * 20_000 + ")",
        "#" * 30_000,
        LINES(f'r{n} ::= "a"' for n in range(2400)),
    ],
    ids=["rules", "left out", "characters", "loops", "name", "comment", "lines"],
)
def test_the_largest_of_them_take_no_longer(grammar):
    assert len(grammar) <= GRAMMAR_CHARACTERS_MAX
    taken = []
    for _ in range(3):
        began = time.process_time()
        with suppress(PotluckError):
            parse(grammar=grammar)
        taken.append(time.process_time() - began)
    assert min(taken) < SECONDS_MAX, "also on a machine that others use"


def test_the_words_quote_nothing():
    with pytest.raises(GrammarUnreadableError) as unreadable:
        read_grammar('root ::= "secret" ((')
    assert "secret" not in str(unreadable.value)
