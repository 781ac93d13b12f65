"""Seeded faults: where they fall, what does not count, and which the suite catches."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest

from tools import mutate

CODE = """
from __future__ import annotations

def larger(a: int | None, b: int = 1) -> bool | None:
    return a > b
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    monkeypatch.setattr(mutate, "STAGES", {"passes": ("tests/passes", "tests")})
    for name, code in {
        "passes/__init__.py": "",
        "passes/larger.py": CODE,
        "tests/passes/test_one.py": """
            from passes.larger import larger

            def test_larger():
                assert larger(2, 1)
        """,
        "tests/test_all.py": """
            from passes.larger import larger

            def test_equal_is_not_larger():
                assert not larger(1, 1)
        """,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(code))
    return tmp_path


def test_every_fault_is_a_program_that_means_something_else(tree: Path) -> None:
    file = tree / "passes/larger.py"
    faults = mutate.draw([file], 50, seed=0)
    assert {f.line for _, f in faults} == {4, 5}  # the default and the comparison
    for text, fault in faults:
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(CODE)), fault


def test_a_changed_annotation_or_sample_case_means_nothing() -> None:
    assert mutate.meaning("def f(a: int | None) -> int: pass") == mutate.meaning("def f(a: int & None) -> str: pass")
    assert mutate.meaning("@rule('a', cases=[1])\ndef f(): pass") == mutate.meaning(
        "@rule('a', cases=[2])\ndef f(): pass"
    )
    assert mutate.meaning("f(a=1)") != mutate.meaning("f(a=2)")


@pytest.mark.parametrize(
    ("comparison", "stage"), [("<", "tests/passes"), (">=", "tests"), (">", None)], ids=["near", "far", "none"]
)
def test_the_first_stage_that_fails_catches_a_fault(tree: Path, comparison: str, stage: str | None) -> None:
    fault = mutate.Fault("passes/larger.py", 5, "", "")
    text = CODE.replace("a > b", f"a {comparison} b")
    assert mutate.judge(text, fault, tree, jobs=0).caught_by == stage
    assert (tree / fault.file).read_text() == CODE
