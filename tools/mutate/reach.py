"""Which tests run each line of the subjects, and how long each of them takes."""

from __future__ import annotations

import ast
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import coverage
import pytest

PLAIN = ("-q", "-s", "--assert=plain", "-p", "no:cacheprovider")
OF_IMPORTS = "tests/rules/test_registry.py"  # holds what the imports of all rules leave behind


@dataclass
class Reach:
    """`seconds` of each test that passes; `lines` of each file, with the tests that run them."""

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[int, list[str]]] = field(default_factory=dict)

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))

    def tests(self, file: str, code: str, line: int) -> list[str]:
        """The tests that a fault on the line can fail, those that say most per second first."""
        rows, tree = self.lines.get(file, {}), ast.parse(code)
        near = {line} if rows.get(line) and not imported(tree, line) else neighbours(tree, line)
        found = {name for at in near for name in rows.get(at, ())}
        if imported(tree, line):
            found |= {name for name in self.seconds if name.startswith(OF_IMPORTS)}
        return self.ordered(found)

    def ordered(self, names: set[str]) -> list[str]:
        """The quickest case of each test function, then the second quickest of each, and so on."""
        cases = defaultdict[str, list[str]](list)
        for name in sorted(names, key=lambda n: (self.seconds[n], n)):
            cases[name.split("[")[0]].append(name)
        place = {name: (i, self.seconds[name], name) for of in cases.values() for i, name in enumerate(of)}
        return sorted(names, key=place.__getitem__)


def read(file: Path) -> Reach:
    kept = json.loads(file.read_text())
    return Reach(kept["seconds"], {f: {int(n): t for n, t in rows.items()} for f, rows in kept["lines"].items()})


def neighbours(tree: ast.Module, line: int) -> set[int]:
    """The lines whose tests see a fault on this one: those of its statement.

    What runs when the module is imported belongs to no test: then the lines of the functions that it decorates or
    names, and those that use the names it binds; the whole module where that is nothing.
    """
    path = enclosing(tree, line)
    if not path:
        return {line}
    found = own_lines(path[-1])
    if not imported(tree, line):
        return found
    names = bound(path[-1])
    used = {
        at
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for at in range(function.lineno, (function.end_lineno or 0) + 1)
        if function.name in names or names & set(names_in(function))
    }
    return found | (used or set(range(1, (tree.body[-1].end_lineno or 0) + 1)))


def imported(tree: ast.Module, line: int) -> bool:
    """Whether the line runs when the module is imported: one outside all functions, a signature or a decorator."""
    path = enclosing(tree, line)
    return not any(isinstance(n, ast.FunctionDef) and line not in own_lines(n) for n in path)


def enclosing(tree: ast.Module, line: int) -> list[ast.stmt]:
    """The statements around a line, the innermost last."""
    around = (n for n in ast.walk(tree) if isinstance(n, ast.stmt) and first_line(n) <= line <= (n.end_lineno or 0))
    return sorted(around, key=lambda n: n.lineno)


def first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])


def own_lines(node: ast.stmt) -> set[int]:
    """Those of a statement without the statements in it."""
    body = getattr(node, "body", None)
    return set(range(first_line(node), body[0].lineno if body else (node.end_lineno or 0) + 1))


def bound(statement: ast.stmt) -> set[str]:
    """The names through which a statement of the module is used."""
    match statement:
        case ast.FunctionDef() | ast.ClassDef():
            return {statement.name}
        case ast.Assign(targets=targets):
            return {name for target in targets for name in names_in(target)}
        case ast.AnnAssign(target=target):
            return set(names_in(target))
    return set(names_in(statement))


def names_in(node: ast.AST) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name | ast.Attribute):
            yield inner.id if isinstance(inner, ast.Name) else inner.attr


class Watch:
    """Names the running test to coverage, and times it."""

    def __init__(self, measured: coverage.Coverage) -> None:
        self.measured = measured
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.measured.switch_context(item.nodeid)
        began, tracer = time.perf_counter(), sys.gettrace()
        try:
            return (yield)
        finally:
            sys.settrace(tracer)  # a test that leaves another hides what all later ones run
            self.seconds[item.nodeid] = time.perf_counter() - began
            self.measured.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.failed.add(report.nodeid)


def measure(root: Path, subjects: Sequence[str], tests: Sequence[str]) -> Reach:
    """Runs the tests in this process, which must not have imported the subjects yet."""
    measured = coverage.Coverage(data_file=None, source=[str(root / s) for s in subjects], config_file=False)
    watch = Watch(measured)
    measured.start()
    try:
        pytest.main([*PLAIN, *tests], plugins=[watch])
    finally:
        measured.stop()
    seconds = {name: took for name, took in watch.seconds.items() if name not in watch.failed}
    found, data = Reach(seconds), measured.get_data()
    for file in data.measured_files():
        found.lines[str(Path(file).relative_to(root))] = {
            line: [name for name in names if name in seconds] for line, names in data.contexts_by_lineno(file).items()
        }
    return found
