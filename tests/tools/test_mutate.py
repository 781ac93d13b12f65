"""Seeded faults: where they fall, what does not count, which tests are asked of them and what those say."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tools.mutate import __main__ as program
from tools.mutate import judge, reach, seeds

CODE = """
from __future__ import annotations

LEAST = 0

def larger(a: int | None, b: int = 1) -> bool | None:
    while a < LEAST:
        pass
    return (a > b)

@staticmethod
def unused():
    return 3
"""
FILES = {
    "pytest.ini": "[pytest]\nfilterwarnings = error",
    "passes/__init__.py": "",
    "passes/larger.py": CODE,
    "tests/passes/test_one.py": """
        import sys

        import pytest
        from passes.larger import larger

        @pytest.mark.parametrize("a", [2, 3])
        def test_larger(a):
            assert larger(a, 1)

        def test_of_something_else():
            sys.settrace(None)

        def test_that_fails():
            assert larger(0, 1)
    """,
    "tests/test_all.py": """
        from passes.larger import larger

        def test_equal_is_not_larger():
            assert not larger(1, 1)
    """,
}
LARGER = [f"tests/passes/test_one.py::test_larger[{a}]" for a in (2, 3)]
EQUAL = "tests/test_all.py::test_equal_is_not_larger"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, code in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(code))
    return tmp_path


Judge = Callable[..., list[seeds.Fault]]


@pytest.fixture
def judged(tree: Path) -> Judge:
    """What the tests of the tree say of changes, each `(before, after, line)`."""

    def say(*changes: tuple[str, str, int], names: tuple[str, ...] = (*LARGER, EQUAL), budget: float = 100.0) -> Any:
        found: list[seeds.Fault] = []

        def ask(items: judge.Items) -> None:
            for before, after, line in changes:
                text, fault = CODE.replace(before, after), seeds.Fault("passes/larger.py", line, "", "")
                found.append(judge.judge(tree, text, fault, names, items, budget))

        def work() -> str:
            judge.forget(tree)
            pytest.main([*reach.PLAIN, "tests"], plugins=[judge.Collected(ask)])
            return json.dumps([asdict(f) for f in found])

        return [seeds.Fault(**f) for f in json.loads(judge.forked(tree, work, 100))]

    return say


def test_every_fault_is_a_program_that_means_something_else(tree: Path) -> None:
    faults = seeds.draw(tree, [tree / "passes/larger.py"], 50, seed=0)
    assert {f.line for _, f in faults} == {4, 6, 7, 9, 11, 13}  # numbers, defaults, comparisons, the decorator
    for text, fault in faults:
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(CODE)), fault


def test_a_changed_annotation_or_sample_case_means_nothing() -> None:
    assert seeds.meaning("def f(a: int | None) -> int: pass") == seeds.meaning("def f(a: int & None) -> str: pass")
    assert seeds.meaning("@rule('a', cases=[1])\ndef f(): pass") == seeds.meaning(
        "@rule('a', cases=[2])\ndef f(): pass"
    )
    made = "SHAPES = [case({})]\ndef cases() -> list[Case]: return {}"
    assert seeds.meaning(made.format(1, 1)) == seeds.meaning(made.format(2, 2))
    assert seeds.meaning("f(a=1)") != seeds.meaning("f(a=2)")


def test_a_fault_is_caught_by_the_first_test_that_fails(judged: Judge, tree: Path) -> None:
    found = judged(
        ("a > b", "a < b", 9),
        ("a > b", "a >= b", 9),
        ("a > b", "b < a", 9),
        ("LEAST = 0", "LEAST = 1 / 0", 4),
        ("b: int = 1", "b: int = 2", 6),
    )
    assert [f.caught_by for f in found] == [LARGER[0], EQUAL, None, "tests/passes/test_one.py", None]
    assert not any(f.left for f in found)
    assert (tree / "passes/larger.py").read_text() == CODE


def test_a_test_that_never_ends_has_failed(judged: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "HANGS", 2)
    assert [f.caught_by for f in judged(("a < LEAST", "a > LEAST", 7), budget=1)] == ["ended with -24"]  # SIGXCPU


def test_what_the_budget_leaves_is_counted(judged: Judge) -> None:
    (spent,) = judged(("a > b", "a >= b", 9), budget=0)
    assert (spent.caught_by, spent.left) == (None, 2)
    assert judged(("a > b", "a < b", 9), names=()) == [seeds.Fault("passes/larger.py", 9, "", "")]


def test_tests_are_found_by_the_lines_that_they_run(tree: Path) -> None:
    kept = tree / "reach.json"
    code = (
        "import hypothesis, pathlib, sys; from tools.mutate import reach; sys.path.insert(0, '.');"
        "reach.measure(pathlib.Path.cwd(), ('passes',), ('tests',)).write(pathlib.Path('reach.json'))"
    )  # the command has imported hypothesis too
    run = [sys.executable, "-c", code]
    subprocess.run(run, cwd=tree, env={**os.environ, "PYTHONPATH": str(program.ROOT)}, check=True)
    found = reach.read(kept)
    assert found.seconds.keys() == {*LARGER, EQUAL, "tests/passes/test_one.py::test_of_something_else"}  # those green
    for line in (4, 6, 7, 9):  # a constant and a signature are of those that run the function
        assert set(found.tests("passes/larger.py", CODE, line)) == {*LARGER, EQUAL}, line
    assert not found.tests("passes/larger.py", CODE, 13)


def test_a_child_that_raises_says_why(tree: Path) -> None:
    assert "ZeroDivisionError" in judge.forked(tree, lambda: str(1 / 0), 100)


def test_one_case_of_each_test_comes_first() -> None:
    found = reach.Reach(seconds={"a[1]": 1, "a[2]": 2, "b": 3, "c[1]": 0.5, "c[2]": 9})
    assert found.ordered(set(found.seconds)) == ["c[1]", "a[1]", "b", "a[2]", "c[2]"]


def test_faults_left_by_the_budget_are_judged_by_the_other_tests(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[Any, float]] = []

    def judged(_: Path, text: str, fault: seeds.Fault, names: list[str], items: judge.Items, budget: float) -> Any:
        said.append((names, budget))
        return replace(fault, left=len(names) - 1) if budget == 5 else replace(fault, caught_by=names[-1])

    monkeypatch.setattr(program, "judge", judged)
    tests = reach.Reach(dict.fromkeys([*LARGER, EQUAL], 1.0), {"passes/larger.py": {9: [*LARGER, EQUAL]}})
    ask = partial(program.asked, tree, [(CODE, seeds.Fault("passes/larger.py", 9, "", ""))], tests, {})
    first, second, third = tests.ordered({*LARGER, EQUAL})
    (found,) = ask(log=tree / "faults.jsonl", budget=5)
    assert said == [([first, second, third], 5), ([second, third], program.HOURS)]
    assert (found.caught_by, found.left) == (third, 0)
    assert ask(log=tree / "faults.jsonl", budget=5) == [found]  # read from the log
    assert len(said) == 2
