"""How a rule is found and applied: arguments by name, sizes that follow the batch, jagged values, constants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import roo_rewrite.rules  # noqa: F401 - registers the rules
from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Lengths, Offsets, Ragged, Replicated, RowIndex, Rows, Several, parts
from roo_rewrite.rules.registry import (
    Call,
    Extent,
    Operand,
    case,
    declined,
    find,
    infer,
    make_call,
    no_rule,
    op_name,
    reason_without_rule,
    registered,
    rule,
)

aten = torch.ops.aten
BATCH = 7


def call(op: Any, *args: Any, out: Any = ((BATCH, 3),), **kwargs: Any) -> Call:
    return make_call(op, args, kwargs, lambda value: value, BATCH, out)


def operand(*shape: int, batching: Batching, dtype: torch.dtype = torch.float32) -> Operand:
    return Operand(shape, batching, dtype)


X = operand(BATCH, 3, batching=Rows(0))
W = operand(3, batching=Replicated())
JAGGED = operand(10, 3, batching=Ragged("hist"))


def test_arguments_go_by_name_with_defaults_filled_in() -> None:
    made = call(aten.softmax.int, X, dim=1)
    assert made.name == "aten.softmax.int"
    assert made["dim"] == 1
    assert made["dtype"] is None
    assert made.operand("self") == X
    assert not made.several


def test_operands_inside_lists_are_found() -> None:
    assert call(aten.cat.default, [X, X], 1).operands() == [X, X]


def test_ops_with_several_outputs_say_so() -> None:
    assert call(aten.topk.default, X, 2).several
    assert call(aten.unbind.int, X).several


def test_an_argument_that_is_no_tensor_is_no_operand() -> None:
    with pytest.raises(AssertionError, match="dim"):
        call(aten.softmax.int, X, 1).operand("dim")


def test_a_second_rule_is_an_error() -> None:
    with pytest.raises(ValueError, match="has a rule already"):
        rule("aten.relu.default", cases=[case("B 3")])(lambda made: Replicated())
    with pytest.raises(ValueError, match="has a rule already"):
        no_rule("twice", "aten.relu.default")
    with pytest.raises(ValueError, match="has a rule already"):
        rule("aten.nonzero.default", cases=[])(lambda made: Replicated())


def test_rules_and_reasons_do_not_overlap() -> None:
    assert not registered().keys() & declined().keys()
    assert find("aten.relu.default") is registered()["aten.relu.default"]
    assert find("aten.nonzero.default") is None


def test_an_op_without_a_rule_says_why() -> None:
    assert "depends on the values" in reason_without_rule("aten.nonzero.default")
    assert reason_without_rule("aten.nonesuch.default") == "no row rule for aten.nonesuch.default"
    with pytest.raises(NotRowWise, match="depends on the values"):
        infer(call(aten.nonzero.default, X))


def test_constants_make_constants_with_or_without_a_rule() -> None:
    assert infer(call(aten.nonzero.default, W)) == Replicated()
    assert infer(call(aten.topk.default, W, 2, out=((2,), (2,)))) == Several((Replicated(), Replicated()))
    assert infer(call(aten.eye.default, 4)) == Replicated()


def test_random_numbers_are_no_constants() -> None:
    with pytest.raises(NotRowWise, match="random"):
        infer(call(aten.rand.default, [4]))
    with pytest.raises(NotRowWise, match="own mask"):
        infer(call(aten.dropout.default, W, 0.5, True))
    assert infer(call(aten.dropout.default, W, 0.5, False)) == Replicated()


def test_a_number_that_follows_the_batch_is_refused_where_the_rule_knows_no_sizes() -> None:
    with pytest.raises(NotRowWise, match="other depends on the batch size"):
        infer(call(aten.div.Scalar, X, Extent(BATCH)))
    with pytest.raises(NotRowWise, match="entry for every pair"):
        infer(call(aten.eye.default, Extent(BATCH)))
    with pytest.raises(NotRowWise, match="fill_value depends on the batch size"):
        infer(call(aten.full.default, [3], Extent(BATCH)))


def test_extents_stay_extents() -> None:
    n = Extent(BATCH)
    assert all(isinstance(e, Extent) for e in (n * 2, 2 * n, n + 1, 1 + n))
    assert (n * 2, 2 * n, n + 1, 1 + n) == (14, 14, 8, 8)


def test_sizes_must_be_those_of_the_batch() -> None:
    assert infer(call(aten.view.default, X, [Extent(BATCH), 3, 1], out=((BATCH, 3, 1),))) == Rows(0)
    assert infer(call(aten.view.default, X, [-1, 3, 1], out=((BATCH, 3, 1),))) == Rows(0)
    with pytest.raises(NotRowWise, match="sizes"):
        infer(call(aten.view.default, X, [BATCH, 3, 1], out=((BATCH, 3, 1),)))
    with pytest.raises(NotRowWise, match="sizes"):
        infer(call(aten.expand.default, X, [BATCH, 3]))
    with pytest.raises(NotRowWise, match="several sizes"):
        infer(call(aten.zeros.default, [Extent(BATCH), Extent(BATCH)]))
    with pytest.raises(NotRowWise, match="no multiple"):
        infer(call(aten.zeros.default, [Extent(BATCH + 1)]))
    with pytest.raises(NotRowWise, match="some rows"):
        infer(call(aten.slice.Tensor, X, 0, 0, BATCH))
    assert infer(call(aten.zeros.default, [BATCH, 3])) == Replicated()


def test_jagged_values_go_element_by_element() -> None:
    assert infer(call(aten.relu.default, JAGGED, out=((10, 3),))) == Ragged("hist")
    assert infer(call(aten.add.Tensor, JAGGED, W, out=((10, 3),))) == Ragged("hist")
    assert infer(call(aten.view.default, JAGGED, [-1, 3, 1], out=((10, 3, 1),))) == Ragged("hist")
    both = infer(call(aten.max.dim, JAGGED, 1, out=((10,), (10,))))
    assert both == Several((Ragged("hist"), Ragged("hist")))


@pytest.mark.parametrize(
    "made",
    [
        call(aten.sum.dim_IntList, JAGGED, [0]),
        call(aten.softmax.int, JAGGED, 0),
        call(aten.view.default, JAGGED, [-1], out=((30,),)),
        call(aten.add.Tensor, JAGGED, operand(10, 3, batching=Rows(0))),
        call(aten.add.Tensor, JAGGED, operand(10, 3, batching=Ragged("other"))),
        call(aten.add.Tensor, JAGGED, operand(10, 3, batching=Replicated())),
        call(aten.index.Tensor, JAGGED, [operand(BATCH, batching=RowIndex(0), dtype=torch.int64)]),
        call(aten.view.default, JAGGED, [Extent(10), 3], out=((10, 3),)),
        call(aten.relu.default, operand(8, batching=Offsets("hist"))),
    ],
    ids=str,
)
def test_what_mixes_jagged_rows_is_refused(made: Call) -> None:
    with pytest.raises(NotRowWise):
        infer(made)


def test_row_numbers_stay_row_numbers_where_they_are_only_placed() -> None:
    numbers = operand(BATCH, batching=RowIndex(0, 2), dtype=torch.int64)
    assert infer(call(aten.unsqueeze.default, numbers, 0, out=((1, BATCH),))) == RowIndex(1, 2)
    assert infer(call(aten.detach.default, numbers, out=((BATCH,),))) == RowIndex(0, 2)
    wide = operand(BATCH, 1, batching=RowIndex(0, 2), dtype=torch.int64)
    assert infer(call(aten.expand.default, wide, [-1, 3])) == RowIndex(0, 2)
    with pytest.raises(NotRowWise, match="leave their dim"):
        infer(call(aten.view.default, operand(BATCH, 3, batching=RowIndex(0)), [-1], out=((21,),)))
    with pytest.raises(NotRowWise, match="used as values"):
        infer(call(aten.add.Tensor, numbers, numbers, out=((BATCH,),)))


def test_lengths_stay_lengths_where_they_are_only_placed() -> None:
    lengths = operand(BATCH, batching=Lengths(lengths="hist"), dtype=torch.int64)
    assert infer(call(aten.view.default, lengths, [-1], out=((BATCH,),))) == Lengths(lengths="hist")
    assert infer(call(aten.to.dtype, lengths, torch.int32, out=((BATCH,),))) == Lengths(lengths="hist")
    assert infer(call(aten.to.dtype, lengths, torch.float32, out=((BATCH,),))) == Rows(0)
    assert infer(call(aten.unsqueeze.default, lengths, 1, out=((BATCH, 1),))) == Rows(0)
    assert infer(call(aten.add.Tensor, lengths, 1, out=((BATCH,),))) == Rows(0)
    assert infer(call(aten.flip.default, operand(2, BATCH, batching=Rows(1)), [0], out=((2, BATCH),))) == Rows(1)


def test_offsets_know_how_many_they_are() -> None:
    assert Offsets("hist").total
    assert not Offsets("hist", first=False).total
    assert not Offsets("hist", last=False).total


def test_parts_are_flat() -> None:
    assert parts(Rows(0)) == (Rows(0),)
    assert parts(Several((Rows(0), Several((Rows(1), Replicated()))))) == (Rows(0), Rows(1), Replicated())


def test_a_batch_of_its_own_is_refused() -> None:
    made = call(aten.linear.default, X, operand(BATCH, 3, batching=Rows(0)))
    with pytest.raises(NotRowWise, match="weight has a batch of its own"):
        infer(made)


def test_names_of_ops() -> None:
    assert op_name(aten.relu.default) == "aten.relu.default"
    assert op_name(len) == "builtins.len"


def test_no_op_has_lost_its_rule() -> None:
    """The gather law is drawn from the registry: a rule that is gone would be missed by no other test."""
    had = (Path(__file__).parent / "ops_with_rule.txt").read_text().split()
    lost = {name for name in had if known_to_torch(name)} - set(registered())
    assert not lost, "these were hoisted before; take one out of the list only with a reason"


def known_to_torch(name: str) -> bool:
    namespace, packet, _ = name.split(".", 2)
    return hasattr(getattr(torch.ops, namespace), packet)
