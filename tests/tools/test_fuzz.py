"""The fuzzer: its graphs run, its faults shrink."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import roo_rewrite.pipeline

_spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).parents[2] / "tools" / "fuzz.py")
assert _spec is not None
fuzz: Any = importlib.util.module_from_spec(_spec)
sys.modules["fuzz"] = fuzz
assert _spec.loader is not None
_spec.loader.exec_module(fuzz)


def test_most_rules_take_part() -> None:
    assert len({op for op, _, _ in fuzz.choices()}) > 300


@pytest.mark.parametrize("shape", ["B 3", "i:B*2 3", "2 B 3", "b:B", "p:3*B 2", "u:B 2 3"])
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_an_operand_has_the_shape_its_case_asks_for(shape: str, rows: int) -> None:
    prefix, dims = fuzz.tokens(shape)
    sizes = [eval(t.replace("B", str(rows))) for t in dims]
    made = fuzz.shaped(torch.randn(rows, fuzz.WIDTH, dtype=torch.float64), shape)
    assert list(made.shape) == sizes
    assert made.dtype is {"i": torch.int64, "b": torch.bool}.get(prefix, torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_a_drawn_program_runs_and_comes_out_equal(seed: int) -> None:
    steps = fuzz.drawn_steps(seed, 4)
    assert fuzz.problem(steps, seed, "priced")[:1] in ("", "?")
    assert steps == fuzz.drawn_steps(seed, 4)


def test_shrinking_leaves_what_the_fault_needs() -> None:
    steps = fuzz.drawn_steps(1, 8)
    wanted = steps[3]
    assert fuzz.shrunk(steps, lambda s: wanted in s) == (wanted,)
    assert wanted.op in fuzz.listing((wanted,), 1)


def test_a_fault_is_printed_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "problem", lambda steps, seed, split: "off" if len(steps) > 1 else "")
    result = CliRunner().invoke(fuzz.main, ["--count", "1", "--length", "5"])
    assert result.exit_code == 1
    assert "1 graphs: 1 wrong" in result.output
    assert result.output.count(" = ") == 3  # the pool and two steps


def test_a_broken_pass_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    lower = roo_rewrite.pipeline.passes.lower.lower

    def faulty(graph: Any) -> None:
        lower(graph)
        for node in graph.nodes:
            if node.target is torch.ops.aten.cat.default:
                node.args = (list(reversed(node.args[0])), *node.args[1:])

    monkeypatch.setattr(roo_rewrite.pipeline.passes.lower, "lower", faulty)
    found = [fuzz.problem(fuzz.drawn_steps(seed, 3), seed, "never") for seed in range(3)]
    assert any(f and f[0] != "?" for f in found)
