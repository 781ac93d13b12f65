"""Faults: one changed token each, made by cosmic-ray's operators at places drawn with a seed.

Annotations, and the sample cases of a rule with what makes them, cannot be at fault, and are left out.
"""

from __future__ import annotations

import ast
import difflib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray import plugins
from cosmic_ray.ast import Visitor, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator

Place = tuple[int, int]


@dataclass(frozen=True)
class Fault:
    """One changed token: the file, the line and the text before and after; then the test that saw it.

    `left` tests that run the line have not been asked.
    """

    file: str
    line: int
    operator: str
    diff: str
    caught_by: str | None = None
    left: int = 0

    @property
    def key(self) -> tuple[str, int, str]:
        return self.file, self.line, self.diff


class Places(Visitor):  # type: ignore[misc]
    """Where one operator applies in a file, in the order in which cosmic-ray counts the occurrences."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.found: list[Place] = []

    def visit(self, node: object) -> object:
        self.found += [start for start, _ in self.operator.mutation_positions(node)]
        return node


class Bare(ast.NodeTransformer):
    """The program without its annotations and the rules' sample cases."""

    def visit_keyword(self, node: ast.keyword) -> ast.AST | None:
        self.generic_visit(node)
        return None if node.arg in ("cases", "frozen") else node  # frozen: against assignments, which nothing makes

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        return ast.Constant(None) if isinstance(node.func, ast.Name) and node.func.id == "case" else node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        return ast.Assign([node.target], node.value or ast.Constant(None), lineno=0)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if node.returns is not None and "Case" in ast.unparse(node.returns):
            node.body = [ast.Pass()]
        self.generic_visit(node)
        node.returns = None
        return node


def meaning(code: str) -> str:
    return ast.dump(Bare().visit(ast.parse(code)))


def operators() -> Iterator[tuple[str, Operator]]:
    for name in plugins.operator_names():
        # Variable*: ask for a name to replace. Is, IsNot: of interned objects no fault; nor is Eq for Is, of None,
        # nodes and members of enums.
        if "Variable" not in name and not name.endswith(("_Is", "_IsNot", "_Is_Eq", "_IsNot_NotEq")):
            yield name, plugins.get_operator(name)()


def sites(code: str) -> dict[Place, list[tuple[str, int]]]:
    """The places of a file that can be changed, each with the operators that can."""
    tree, found = get_ast(code), dict[Place, list[tuple[str, int]]]()
    for name, operator in operators():
        places = Places(operator)
        places.walk(tree)
        for occurrence, place in enumerate(places.found):
            found.setdefault(place, []).append((name, occurrence))
    return found


def seeded(root: Path, file: Path, name: str, occurrence: int) -> tuple[str, Fault] | None:
    """The changed text of a file; None where the change means nothing."""
    before = file.read_text()
    after = mutate_code(before, plugins.get_operator(name)(), occurrence)
    try:
        if after is None or meaning(after) == meaning(before):
            return None
    except SyntaxError:
        return None
    lines = [*difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")][2:]
    blank = next(i for i, text in enumerate(lines[1:]) if text[1:].strip())
    line = int(lines[0].split()[1][1:].split(",")[0]) + blank
    return after, Fault(str(file.relative_to(root)), line, name.removeprefix("core/"), "\n".join(lines[1:]))


def draw(root: Path, files: Sequence[Path], count: int, seed: int) -> list[tuple[str, Fault]]:
    """`count` faults: places drawn evenly over all files, then one of the changes possible there."""
    generator = random.Random(seed)
    places = [(f, ways) for f in files for _, ways in sorted(sites(f.read_text()).items())]
    generator.shuffle(places)
    faults = (seeded(root, file, *generator.choice(ways)) for file, ways in places)
    return [f for f, _ in zip((f for f in faults if f is not None), range(count))]
