"""The rules of CONTRIBUTING that a linter does not know: sizes, names, opening docstrings, and what may not stand in the tree."""

from __future__ import annotations

import ast
import re
import stat
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$")
PACKAGES = ("client/", "coordinator/", "node_agent/", "protos/")

FILE_LINES_MAX = 500
FILE_LINES_WANTED = 400
FUNCTION_LINES_MAX = 70
FUNCTION_LINES_WANTED = 50

LONG_FILES: dict[str, int] = {
    "tests/integration/test_authorisation_matrix.py": 488,
}
"""Files over 400 lines, with the length they may have: an entry may shrink or go, and none may come."""
LONG_FUNCTIONS: dict[str, int] = {}
"""Functions over 50 lines, as "file:name", with the length they may have: an entry may shrink or go, and none may come."""

VAGUE_WORDS = {"common", "helper", "helpers", "manager", "managers", "misc", "util", "utils"}
VAGUE_BUT_GIVEN = {"protos/potluck_protocol/v1/common.proto"}

FORBIDDEN_TEXT = {
    "a package host, which is whoever installs to choose": re.compile(
        r"\b(?:pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|crates\.io|proxy\.golang\.org)\b"
    ),
    "a path of one machine": re.compile(r"(?<![\w.~/-])/(?:home|root|Users|work|opt/pypi)/[\w.-]+"),
}


@cache
def tracked() -> tuple[str, ...]:
    """What a checkout holds, and what is about to be added to it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout
    return tuple(sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file()))


def python_files() -> tuple[str, ...]:
    return tuple(name for name in tracked() if name.endswith(".py") and not GENERATED.search(name))


def product_files() -> tuple[str, ...]:
    return tuple(name for name in python_files() if name.startswith(PACKAGES))


@cache
def syntax(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(), filename=name)


def line_count(name: str) -> int:
    return len((ROOT / name).read_text().splitlines())


def function_lengths(name: str) -> dict[str, int]:
    """From the `def` to the last line, without the docstring: explaining more must never cost a split."""
    lengths = {}
    for node in ast.walk(syntax(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
            docstring_lines = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            lengths[f"{name}:{node.name}"] = (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines
    return lengths


def broken_ratchet(measured: dict[str, int], known: dict[str, int], wanted: int) -> list[str]:
    """What grew past what is wanted or past its own entry, and entries that nothing needs any more."""
    grown = [
        f"{name}: {size} lines, {known.get(name, wanted)} allowed" for name, size in measured.items() if size > known.get(name, wanted)
    ]
    idle = [f"{name}: drop its entry" for name in known if measured.get(name, 0) <= wanted]
    return grown + idle


def test_a_ratchet_only_tightens() -> None:
    known = {"a": 450, "b": 450, "c": 450, "gone": 450}

    assert broken_ratchet({"a": 450, "b": 451, "c": 400, "d": 401, "e": 400}, known, 400) == [
        "b: 451 lines, 450 allowed",
        "d: 401 lines, 400 allowed",
        "c: drop its entry",
        "gone: drop its entry",
    ]


def test_no_file_is_too_long() -> None:
    measured = {name: line_count(name) for name in python_files()}

    assert len(measured) > 50
    assert not {name: size for name, size in measured.items() if size > FILE_LINES_MAX}
    assert not broken_ratchet(measured, LONG_FILES, FILE_LINES_WANTED)


def test_no_function_is_too_long() -> None:
    measured = {where: size for name in python_files() for where, size in function_lengths(name).items()}

    assert len(measured) > 200
    assert not {where: size for where, size in measured.items() if size > FUNCTION_LINES_MAX}
    assert not broken_ratchet(measured, LONG_FUNCTIONS, FUNCTION_LINES_WANTED)


def test_every_module_opens_by_saying_what_it_is_for() -> None:
    silent = [name for name in product_files() if (ROOT / name).read_text().strip() and not ast.get_docstring(syntax(name))]

    assert not silent


def test_names_say_something() -> None:
    vague = [
        name
        for name in tracked()
        if name not in VAGUE_BUT_GIVEN and not GENERATED.search(name) and VAGUE_WORDS & set(re.split(r"[/._-]", name))
    ]
    classes = [
        f"{name}:{node.name}"
        for name in product_files()
        for node in ast.walk(syntax(name))
        if isinstance(node, ast.ClassDef) and re.search(r"(Manager|Helper|Utils?)$", node.name)
    ]

    assert not vague
    assert not classes


@pytest.mark.parametrize("what", sorted(FORBIDDEN_TEXT))
def test_the_tree_does_not_name(what: str) -> None:
    pattern = FORBIDDEN_TEXT[what]
    found = []
    for name in tracked():
        if Path(name) == Path(__file__).relative_to(ROOT):
            continue
        try:
            text = (ROOT / name).read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{name}:{number}: {match[0]}" for number, line in enumerate(text.splitlines(), 1) if (match := pattern.search(line))]

    assert not found


def test_ray_is_imported_in_one_place() -> None:
    importing = {
        name
        for name in product_files()
        for node in ast.walk(syntax(name))
        if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "ray" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "ray")
    }

    assert importing == {"coordinator/potluck_coordinator/ray_runtime.py"}


def test_only_one_module_of_the_coordinator_reads_the_environment() -> None:
    """`settings` on behalf of `command`; `warden` and `ray_runtime` only write to it."""
    allowed = {"settings.py", "warden.py", "ray_runtime.py"}
    reading = {
        Path(name).name
        for name in product_files()
        if name.startswith("coordinator/") and re.search(r"\bos\.(?:environ|getenv)\b", (ROOT / name).read_text())
    }

    assert reading <= allowed
    for name in ("warden.py", "ray_runtime.py"):
        text = (ROOT / "coordinator/potluck_coordinator" / name).read_text()
        assert not re.search(r"os\.getenv|os\.environ(?:\[[^]]+\](?! = )|\.get\()", text), name


def test_decisions_are_numbered_dated_and_say_why() -> None:
    records = sorted((ROOT / "docs/decisions").glob("*.md"))

    assert records
    for number, record in enumerate(records, 1):
        text = record.read_text()
        assert re.fullmatch(rf"{number:04}-[a-z0-9-]+\.md", record.name), record.name
        assert re.match(r"# .+\n\n\d{4}-\d{2}-\d{2}\n", text), f"{record.name} opens with a title and a date"
        for heading in ("## Context", "## Decision", "## Cost"):
            assert f"\n{heading}\n" in text, f"{record.name} has no {heading}"


def test_make_has_the_targets_that_are_promised() -> None:
    helped = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    named = re.findall(r"^ +make (\S+) +\S", helped, re.MULTILINE)

    assert named == ["help", "demo", "test", "test-engines", "check", "bench", "bench-peers", "protos", "clean"]


def test_the_ci_entry_runs_what_people_run() -> None:
    entry = ROOT / ".ci/run"

    assert entry.stat().st_mode & stat.S_IXUSR
    lines = entry.read_text().splitlines()
    assert "make check" in lines
    assert "make test" in lines
    assert "make test" in (ROOT / "README.md").read_text()


def test_constraints_pin_every_dependency_to_one_version() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    roles = project["optional-dependencies"]
    wanted = {
        re.match(r"[A-Za-z0-9-]+", requirement)[0].lower()  # type: ignore[index]
        for requirement in [*project["dependencies"], *roles["coordinator"], *roles["node"], *roles["dev"]]
    } - {"potluck"}

    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.]+", pin)] == []
    assert wanted <= {pin.split("==")[0] for pin in pins}
