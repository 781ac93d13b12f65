"""The benchmark's batches and timing, and its table end to end on one model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fixtures.fanout import Fanout
from roo_rewrite.errors import RooError
from tools.bench import flops, ops, speed, tables
from tools.bench.timing import SHAPES, fanouts, interleaved


@given(st.sampled_from(SHAPES), st.integers(1, 64), st.integers(1, 500))
def test_fanouts_sum_to_the_impressions(shape: str, fanout: int, impressions: int) -> None:
    counts = fanouts(shape, fanout, impressions)
    assert counts.dtype == torch.int64
    assert (counts >= 0).all()
    assert (counts.sum(), len(counts)) == (impressions, max(1, impressions // fanout))


def test_shapes_are_what_they_say() -> None:
    assert fanouts("even", 16, 1024).unique().tolist() == [16]
    skewed = fanouts("skewed", 4, 1024)
    assert skewed.max() > 8 * 4
    assert (skewed == 0).any()
    with pytest.raises(ValueError, match="no fan-out shape 'odd'"):
        fanouts("odd", 1, 1)


def test_interleaved_runs_every_variant_in_turn() -> None:
    order: list[str] = []
    times = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3)
    assert "".join(order) == "aabb" + "ab" + "ba" + "ab"
    assert set(times) == {"a", "b"}


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(speed.main, list(arguments))


def test_table_has_a_row_per_shape_and_mode() -> None:
    result = invoke("early_stage", "--twins-only", "--fanout", "4", "--impressions", "16", "--rounds", "1", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert {(r["shape"], r["mode"]) for r in rows} == {(s, m) for s in SHAPES for m in speed.MODES}
    assert all(r["original"] > 0 and r["twin"] > 0 and r["rewritten"] is None for r in rows)
    assert all(r["error"] < 1e-5 and r["requests"] == 4 for r in rows)


def test_unknown_model_lists_the_known() -> None:
    result = invoke("dlrm")
    assert result.exit_code == 2
    assert "no model dlrm" in result.output


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("task", list(ops.TASKS))
def test_every_way_of_a_jagged_task_agrees(task: str, shape: str) -> None:
    ways = ops.TASKS[task](Fanout(fanouts(shape, 4, 40)), 3)
    assert len(ways) > 2
    ops.check(ways)


def test_a_wrong_way_is_caught() -> None:
    with pytest.raises(AssertionError, match="not close"):
        ops.check({"one": lambda: torch.ones(2), "other": lambda: torch.zeros(2)})


def test_ops_prints_json() -> None:
    arguments = ["--task", "broadcast", "--shape", "even", "--width", "4", "--impressions", "32", "--rounds", "1"]
    result = CliRunner().invoke(ops.main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert all(row["ms"] > 0 for row in json.loads(result.stdout))


def test_flops_stand_beside_their_bounds() -> None:
    result = CliRunner().invoke(flops.main, ["two_tower", "--twins-only", "--fanout", "10", "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["twin"] == pytest.approx(row["scalar"]) == pytest.approx(row["net"])
    assert (row["rewritten"], row["verdict"]) == (None, "")


def test_attention_counts_as_its_products() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    assert flops.count_flops(Model(), ((torch.ones(2, 1, 5, 3),), {})) == 2 * 2 * 2 * 5 * 5 * 3


def test_a_product_added_in_place_counts() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(2, 5).addmm_(x, torch.ones(3, 5))

    assert flops.count_flops(Model(), ((torch.ones(2, 3),), {})) == 2 * 2 * 3 * 5


def test_the_documents_tables_are_markdown() -> None:
    arguments = ["deepctr", "WDL", "--fanout", "3", "--impressions", "12", "--rounds", "1"]
    result = CliRunner().invoke(tables.main, arguments)
    assert result.exit_code == 0, result.output
    head, rule, row = result.stdout.splitlines()
    assert head.count("|") == rule.count("|") == row.count("|")
    assert row.startswith("| WDL | 3 | ")


def test_too_many_flops_are_named() -> None:
    row = flops.Row("m", 10, 1000, net=1.0, scalar=0.5, rewritten=0.52, twin=0.6)
    assert row.verdict == "over scalar bound"
    assert "| m | 10 | 0.0 | 1.000 | 0.500 | 0.520 | 0.600 | over scalar bound |" in flops.markdown([row])


def test_an_operator_without_a_formula_is_not_counted_as_free() -> None:
    with torch.library._scoped_library("roo", "FRAGMENT") as library:
        library.define("uncounted(Tensor x) -> Tensor")
        library.impl("uncounted", lambda x: x @ x, "CPU")

        class Model(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.ops.roo.uncounted(x)

        with pytest.raises(RooError, match="would count as no FLOPs"):
            flops.count_flops(Model(), ((torch.ones(2, 2),), {}))
