"""Seeds faults in the rules and passes, one at a time, and tells which of them the suite catches.

A fault is one change of one token (a comparison, a number, `and` for `or`, a loop that never runs, a rule's decorator
gone), made by cosmic-ray's operators at places drawn with a seed. The suite, green before, runs on a copy of the tree,
the nearest tests first, until one fails. Annotations and the sample cases of a rule cannot be at fault, and are left
out.

    python -m tools.mutate --count 100 --seed 0 --log faults.jsonl
"""

from __future__ import annotations

import ast
import difflib
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import pytest
from cosmic_ray import plugins
from cosmic_ray.ast import Visitor, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
SUBJECTS = ("roo_rewrite/rules", "passes")
NOT_PRODUCT = {"law.py"}  # the oracle of the rules' tests
SOUGHT = 0.95
# The nearest tests of each subject, then everything.
STAGES = {
    "roo_rewrite": ("tests/rules", "tests/passes", "tests/hazards", "tests"),
    "passes": ("tests/passes", "tests/laws", "tests/hazards", "tests"),
}
SECONDS = 1800  # of one stage; a fault that hangs the suite is caught
Place = tuple[int, int]


@dataclass(frozen=True)
class Fault:
    """One changed token: the file, the line, the text before and after, and the stage that saw it."""

    file: str
    line: int
    operator: str
    diff: str
    caught_by: str | None = None


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
        return None if node.arg == "cases" else node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        return ast.Assign([node.target], node.value or ast.Constant(None), lineno=0)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.returns = None
        return node


def meaning(code: str) -> str:
    return ast.dump(Bare().visit(ast.parse(code)))


def operators() -> Iterator[tuple[str, Operator]]:
    for name in plugins.operator_names():
        # Variable*: ask for a name to replace. Is, IsNot: of interned objects no fault.
        if "Variable" not in name and not name.endswith(("_Is", "_IsNot")):
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


def seeded(file: Path, name: str, occurrence: int) -> tuple[str, Fault] | None:
    """The changed text of a file; None where the change means nothing."""
    before = file.read_text()
    after = mutate_code(before, plugins.get_operator(name)(), occurrence)
    try:
        if after is None or meaning(after) == meaning(before):
            return None
    except SyntaxError:
        return None
    lines = [*difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")][2:]
    line = int(lines[0].split()[1][1:].split(",")[0])
    return after, Fault(str(file.relative_to(ROOT)), line, name.removeprefix("core/"), "\n".join(lines[1:]))


def draw(files: Sequence[Path], count: int, seed: int) -> list[tuple[str, Fault]]:
    """`count` faults: places drawn evenly over all files, then one of the changes possible there."""
    generator = random.Random(seed)
    places = [(f, ways) for f in files for _, ways in sorted(sites(f.read_text()).items())]
    generator.shuffle(places)
    faults = (seeded(file, *generator.choice(ways)) for file, ways in places)
    return [f for f, _ in zip((f for f in faults if f is not None), range(count))]


def caught_by(tree: Path, file: str, jobs: int) -> str | None:
    """The first stage of the suite that fails on the tree as it is."""
    for stage in STAGES[file.split("/")[0]]:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", str(jobs), "-p", "no:cacheprovider", stage]
        try:
            done = subprocess.run(command, cwd=tree, capture_output=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return f"{stage} (time)"
        if done.returncode not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            return stage
    return None


def judge(text: str, fault: Fault, tree: Path, jobs: int) -> Fault:
    target = tree / fault.file
    original = target.read_text()
    target.write_text(text)
    try:
        return Fault(**{**asdict(fault), "caught_by": caught_by(tree, fault.file, jobs)})
    finally:
        target.write_text(original)


def copied(into: Path) -> Path:
    """The tree as git knows it, with what is changed and not committed."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, into / name)
    return into


def table(faults: Sequence[Fault]) -> Table:
    shown = Table("file", "line", "fault", "caught by")
    for fault in faults:
        shown.add_row(fault.file, str(fault.line), fault.diff, fault.caught_by or "nothing")
    return shown


@click.command()
@click.option("--count", default=100, show_default=True, help="Faults to seed.")
@click.option("--seed", default=0, show_default=True)
@click.option("--subject", multiple=True, default=SUBJECTS, show_default=True, help="Folder or file to change.")
@click.option("--jobs", default=2, show_default=True, help="Processes of the suite.")
@click.option(
    "--log", type=click.Path(path_type=Path), help="JSON lines, written as they come; those in it are not run again."
)
def main(count: int, seed: int, subject: Sequence[str], jobs: int, log: Path | None) -> None:
    """Exit status 1 where less than 95% of the faults are caught."""
    within = [[ROOT / s] if s.endswith(".py") else sorted((ROOT / s).rglob("*.py")) for s in subject]
    files = [f for found in within for f in found if f.name not in NOT_PRODUCT]
    known = [Fault(**json.loads(line)) for line in log.read_text().splitlines()] if log and log.exists() else []
    done = {(f.file, f.line, f.diff): f for f in known}
    results: list[Fault] = []
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(Path(folder))
        for text, fault in draw(files, count, seed):
            found = done.get((fault.file, fault.line, fault.diff)) or judge(text, fault, tree, jobs)
            results.append(found)
            if log and (fault.file, fault.line, fault.diff) not in done:
                with log.open("a") as out:
                    print(json.dumps(asdict(found)), file=out)
    missed = [f for f in results if not f.caught_by]
    Console().print(table(missed))
    click.echo(f"{len(results) - len(missed)} of {len(results)} faults caught")
    sys.exit(len(missed) > (1 - SOUGHT) * len(results))


if __name__ == "__main__":
    main()
