"""Rules of jagged values decline unless values, offsets and dense rows are known to belong together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import roo_rewrite.rules  # noqa: F401 - registers the rules
from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Lengths, Offsets, Ragged, Replicated, Rows
from roo_rewrite.rules import law
from roo_rewrite.rules.registry import Case, Operand, infer, make_call, registered

aten = torch.ops.aten
BATCH = 7
LENGTHS = Operand((BATCH,), Lengths(lengths="hist"), torch.int64)
OFFSETS = Operand((BATCH + 1,), Offsets("hist"), torch.int64)
VALUES = Operand((10, 2), Ragged("hist"))


def joint(least: int) -> Iterator[tuple[str, Case]]:
    """The cases that hold, and have so many jagged operands at least."""
    for op, rule in sorted(registered().items()):
        for a_case in rule.cases:
            jagged = sum(shape.split(":")[-1].split(" ")[0] in ("R", *law.JAGGED) for shape in a_case.shapes)
            if jagged >= least and not a_case.declines and (find_spec("fbgemm_gpu") or not op.startswith("fbgemm.")):
                yield op, a_case


def predict(op: str, a_case: Case, i: int, batching: Batching) -> Batching:
    """What the rule says once operand i has another batching."""
    trial = law.trial(op, a_case, BATCH)
    drawn = list(trial.drawn)
    drawn[i] = replace(drawn[i], batching=batching)
    return law.predict(registered()[op], replace(trial, drawn=tuple(drawn)))


def infer_call(op: Any, *args: Any, out: Any = ((BATCH, 2),), **kwargs: Any) -> Batching:
    return infer(make_call(op, args, kwargs, lambda value: value, BATCH, out))


def label(value: Any) -> str:
    """A name that is the same in every process."""
    return "_".join(value.shapes) if isinstance(value, Case) else str(value)


@pytest.mark.parametrize(("op", "a_case"), list(joint(2)), ids=label)
def test_each_operand_must_belong_to_the_same_pair(op: str, a_case: Case) -> None:
    for i, drawn in enumerate(law.trial(op, a_case, BATCH).drawn):
        if isinstance(drawn.batching, (Ragged, Offsets, Lengths)):
            with pytest.raises(NotRowWise):
                predict(op, a_case, i, replace(drawn.batching, lengths="other"))
            with pytest.raises(NotRowWise):
                predict(op, a_case, i, Replicated())
        if isinstance(drawn.batching, Offsets):
            with pytest.raises(NotRowWise):
                predict(op, a_case, i, replace(drawn.batching, first=not drawn.batching.first))
            with pytest.raises(NotRowWise):
                predict(op, a_case, i, replace(drawn.batching, last=not drawn.batching.last))


@pytest.mark.parametrize(("op", "a_case"), list(joint(1)), ids=label)
def test_dense_operands_must_have_the_rows(op: str, a_case: Case) -> None:
    for i, drawn in enumerate(law.trial(op, a_case, BATCH).drawn):
        if type(drawn.batching) is Rows:
            for wrong in (Replicated(), Rows(1), Rows(0, inner=2)):
                with pytest.raises(NotRowWise):
                    predict(op, a_case, i, wrong)


def test_sums_of_what_is_no_declared_length_are_refused() -> None:
    pytest.importorskip("fbgemm_gpu")
    plain = Operand((BATCH,), Rows(0), torch.int64)
    for name in ("complete", "exclusive", "inclusive"):
        op = law.operator(f"fbgemm.asynchronous_{name}_cumsum.default")
        with pytest.raises(NotRowWise, match="sums over the batch"):
            infer_call(op, plain)
    with pytest.raises(NotRowWise, match="cumsum along the batch"):
        infer_call(aten.cumsum.default, plain, 0)


def test_differences_of_offsets_are_lengths_only_where_all_are_there() -> None:
    assert infer_call(aten.diff.default, OFFSETS) == Lengths(lengths="hist")
    ends = replace(OFFSETS, batching=Offsets("hist", first=False))
    starts = replace(OFFSETS, batching=Offsets("hist", last=False))
    other = replace(OFFSETS, batching=Offsets("other", last=False))
    assert infer_call(aten.sub.Tensor, ends, starts) == Lengths(lengths="hist")
    for refused in (
        (aten.diff.default, ends),
        (aten.diff.default, OFFSETS, 2),
        (aten.sub.Tensor, starts, ends),
        (aten.sub.Tensor, ends, other),
        (aten.diff.default, OFFSETS, 1, 0, ends),
    ):
        with pytest.raises(NotRowWise):
            infer_call(*refused)
    with pytest.raises(NotRowWise):
        infer_call(aten.sub.Tensor, ends, starts, alpha=2)


def test_a_zero_before_the_ends_makes_offsets() -> None:
    ends = replace(OFFSETS, batching=Offsets("hist", first=False))
    assert infer_call(aten.pad.default, ends, [1, 0]) == Offsets("hist")
    for args in (([0, 1],), ([1, 0], "constant", 3.0), ([1, 0], "replicate")):
        with pytest.raises(NotRowWise):
            infer_call(aten.pad.default, ends, *args)
    with pytest.raises(NotRowWise):
        infer_call(aten.pad.default, OFFSETS, [1, 0])


@pytest.mark.parametrize("bounds", [(1, -1), (0, 3), (2, None), (0, None, 2)])
def test_other_parts_of_offsets_are_refused(bounds: tuple[Any, ...]) -> None:
    with pytest.raises(NotRowWise, match="some of the offsets"):
        infer_call(aten.slice.Tensor, OFFSETS, 0, *bounds)


def test_segments_are_of_dim_0_and_of_known_lengths() -> None:
    assert infer_call(aten.segment_reduce.default, VALUES, "sum", lengths=LENGTHS) == Rows(0)
    for wrong in ({}, {"lengths": LENGTHS, "axis": 1}, {"lengths": LENGTHS, "indices": OFFSETS}):
        with pytest.raises(NotRowWise):
            infer_call(aten.segment_reduce.default, VALUES, "sum", **wrong)


def test_values_jagged_twice_are_refused() -> None:
    pytest.importorskip("fbgemm_gpu")
    with pytest.raises(NotRowWise, match="several dims"):
        infer_call(law.operator("fbgemm.jagged_to_padded_dense.default"), VALUES, [OFFSETS, OFFSETS], [3, 3])
    with pytest.raises(NotRowWise, match="several values"):
        infer_call(law.operator("fbgemm.segment_sum_csr.default"), 2, OFFSETS, VALUES)


def test_pooled_tables_are_permuted_by_constants_along_columns() -> None:
    pytest.importorskip("fbgemm_gpu")
    op = law.operator("fbgemm.permute_pooled_embs.default")
    table, rows = Operand((2,), Replicated()), Operand((BATCH, 5), Rows(0))
    assert infer_call(op, rows, table, table, table, table) == Rows(0)
    with pytest.raises(NotRowWise, match="permutes the batch"):
        infer_call(op, Operand((5, BATCH), Rows(1)), table, table, table, table)
    with pytest.raises(NotRowWise, match="batch of its own"):
        infer_call(op, rows, table, Operand((BATCH,), Rows(0)), table, table)


def test_rows_are_repeated_by_the_lengths_of_a_pair_or_by_constants() -> None:
    rows, plain = Operand((BATCH, 2), Rows(0)), Operand((BATCH,), Rows(0), torch.int64)
    counts = Operand((2,), Replicated(), torch.int64)
    op = aten.repeat_interleave.self_Tensor
    assert infer_call(op, rows, LENGTHS, 0) == Ragged("hist")
    assert infer_call(op, rows, counts, 1) == Rows(0)
    for refused in ((rows, plain, 0), (rows, LENGTHS, None), (rows, counts, None), (rows, counts, 0)):
        with pytest.raises(NotRowWise):
            infer_call(op, *refused)


def test_dense_rows_are_cut_by_whole_offsets() -> None:
    pytest.importorskip("fbgemm_gpu")
    op, dense = law.operator("fbgemm.dense_to_jagged.default"), Operand((BATCH, 3, 2), Rows(0))
    for at in (Offsets("hist", first=False), Offsets("hist", last=False), Lengths(lengths="hist"), Replicated()):
        with pytest.raises(NotRowWise, match="not known"):
            infer_call(op, dense, [replace(OFFSETS, batching=at)])
