"""Seeds faults in the rules and passes, one at a time, and tells which of them the suite catches.

A fault is one change of one token (a comparison, a number, `and` for `or`, a loop that never runs, a rule's decorator
gone). The tests that run its line are asked, the quickest of each kind first, until one fails; a test that hangs has
failed. Those that a budget leaves out are asked at the end, of the faults that nothing has caught. The folder keeps a
copy of the tree, the map from lines to tests (made once, by one run of the suite under coverage) and the faults judged
so far: a run that was stopped goes on from there. Delete it to begin anew.

    python -m tools.mutate --count 100 --seed 0 --folder build/mutate
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
import pytest
import torch
from hypothesis import Phase, settings
from rich.console import Console
from rich.table import Table

from tools.mutate.judge import Collected, Items, forked, judge
from tools.mutate.reach import PLAIN, Reach, measure, read
from tools.mutate.seeds import Fault, draw

ROOT = Path(__file__).parents[2]
SUBJECTS = ("roo_rewrite/rules", "passes")
NOT_PRODUCT = {"law.py"}  # the oracle of the rules' tests
SUITE = (
    *("tests/passes", "tests/laws", "tests/ops", "tests/rules", "tests/hazards", "tests/fixtures", "tests/report"),
    *(f"tests/tools/test_{name}.py" for name in ("fuzz", "check_rules", "bound")),
    *(f"tests/compat/test_{name}.py" for name in ("flops_left", "jagged_inputs", "jagged_inside")),
)  # and the tests next to those folders; the others run the passes only by the way, and slowly
SOUGHT = 0.95
HOURS = 2 * 3600.0


def copied(into: Path) -> Path:
    """The tree as git knows it, with what is changed and not committed."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, into / name)
    return into


def suite(tree: Path) -> list[str]:
    beside = (str(f.relative_to(tree)) for f in sorted(tree.glob("tests/test_*.py")))
    return [*(s for s in SUITE if (tree / s).exists()), *beside]


def mapped(tree: Path, kept: Path) -> Reach:
    """The map in the file, which is made where it is not there."""
    if not kept.exists():

        def made() -> str:
            measure(tree, SUBJECTS, suite(tree)).write(kept)
            return "made"

        if (answer := forked(tree, made, HOURS)) != "made":
            raise click.ClickException(f"the suite of {tree} could not be run under coverage: {answer}")
    return read(kept)


def asked(
    tree: Path, faults: Sequence[tuple[str, Fault]], tests: Reach, items: Items, log: Path, budget: float
) -> list[Fault]:
    """The faults judged, first each within the budget, then those that nothing has caught by all tests left."""
    known = [Fault(**json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []
    judged = {f.key: f for f in known}
    for allowed in (budget, HOURS):
        for text, fault in faults:
            found = judged.get(fault.key)
            if found and (not found.left or allowed == budget):
                continue
            names = tests.tests(fault.file, (tree / fault.file).read_text(), fault.line)
            names = names[len(names) - found.left :] if found else names
            judged[fault.key] = judge(tree, text, fault, names, items, allowed)
            with log.open("a") as out:
                print(json.dumps(asdict(judged[fault.key])), file=out)
    return [judged[f.key] for _, f in faults]


def table(faults: Sequence[Fault]) -> Table:
    shown = Table("file", "line", "fault")
    for fault in faults:
        shown.add_row(fault.file, str(fault.line), fault.diff)
    return shown


@click.command()
@click.option("--count", default=100, show_default=True, help="Faults to seed.")
@click.option("--seed", default=0, show_default=True)
@click.option("--subject", multiple=True, default=SUBJECTS, show_default=True, help="Folder or file to change.")
@click.option("--budget", default=120.0, show_default=True, help="Seconds of CPU of a fault's first tests.")
@click.option("--folder", default=ROOT / "build/mutate", type=click.Path(path_type=Path), help="Holds what is kept.")
def main(count: int, seed: int, subject: Sequence[str], budget: float, folder: Path) -> None:
    """Exit status 1 where less than 95% of the faults are caught."""
    folder = folder.resolve()
    tree = folder / "tree" if (folder / "tree").exists() else copied(folder / "tree")
    within = [[tree / s] if s.endswith(".py") else sorted((tree / s).rglob("*.py")) for s in subject]
    faults = draw(tree, [f for found in within for f in found if f.name not in NOT_PRODUCT], count, seed)
    tests, results = mapped(tree, folder / "reach.json"), list[Fault]()
    settings.register_profile("seeded", phases=[Phase.explicit, Phase.generate])  # what fails need not be made small
    settings.load_profile("seeded")
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    torch.export.export(torch.nn.Linear(1, 1), (torch.zeros(1, 1),)).run_decompositions({})  # what it imports, once
    work = Collected(lambda items: results.extend(asked(tree, faults, tests, items, folder / "faults.jsonl", budget)))
    pytest.main([*PLAIN, *suite(tree)], plugins=[work])
    missed = [f for f in results if not f.caught_by]
    Console().print(table(missed))
    click.echo(f"{len(results) - len(missed)} of {len(results)} faults caught")
    sys.exit(len(missed) > (1 - SOUGHT) * len(results))


if __name__ == "__main__":
    main()
