"""What looks row-wise and is not: each of these is declined, for the reason given."""

from __future__ import annotations

import sys
from itertools import product
from typing import Any

import pytest
import torch

import roo_rewrite.rules  # noqa: F401 - registers the rules
from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Replicated, RowIndex, Rows
from roo_rewrite.rules.registry import Extent, Operand, infer, make_call

aten = torch.ops.aten
B = 7
N = Extent(B)


def rows(*shape: int, dim: int = 0, outer: int = 1, inner: int = 1, dtype: torch.dtype = torch.float32) -> Operand:
    return Operand(shape, Rows(dim, outer, inner), dtype)


def fixed(*shape: int, dtype: torch.dtype = torch.float32) -> Operand:
    return Operand(shape, Replicated(), dtype)


def ids(*shape: int, dim: int = 0) -> Operand:
    return rows(*shape, dim=dim, dtype=torch.int64)


def verdict(op: Any, *args: Any, out: Any = ((B, 3),), **kwargs: Any) -> Batching:
    return infer(make_call(op, args, kwargs, lambda value: value, B, out))


GRU = [fixed(6, 3), fixed(6, 2), fixed(6), fixed(6)]


def gru(
    x: Operand, hx: Operand, params: list[Operand], layers: int = 1, dropout: float = 0.0, train: bool = False
) -> Any:
    out = ((B, 4, 2), (1, B, 2))
    return verdict(aten.gru.input, x, hx, params, True, layers, dropout, train, False, True, out=out)


REFUSED = {
    "batch statistics": lambda: verdict(
        aten.batch_norm.default, rows(B, 3), None, None, None, None, True, 0.1, 1e-5, True
    ),
    "running statistics of instances": lambda: verdict(
        aten.instance_norm.default, rows(B, 3, 4), None, None, fixed(3), fixed(3), True, 0.1, 1e-5, True
    ),
    "dropout in training": lambda: verdict(aten.dropout.default, rows(B, 3), 0.5, True),
    "dropout between layers": lambda: gru(rows(B, 4, 3), rows(2, B, 2, dim=1), GRU * 2, 2, 0.5, True),
    "attention dropout": lambda: verdict(
        aten.scaled_dot_product_attention.default, rows(B, 2, 3), rows(B, 4, 3), rows(B, 4, 3), None, 0.1
    ),
    "weights of each row": lambda: gru(rows(B, 4, 3), rows(1, B, 2, dim=1), [rows(6, B, dim=1), *GRU[1:]]),
    "a single sequence": lambda: gru(rows(B, 3), rows(1, B, dim=1), GRU),
    "states of another dim": lambda: gru(rows(B, 4, 3), rows(B, 1, 2), GRU),
    "a cell with weights of each row": lambda: verdict(
        aten.gru_cell.default, rows(B, 3), rows(B, 2), rows(6, B, dim=1), fixed(6, 2)
    ),
    "gradients by frequency": lambda: verdict(aten.embedding.default, fixed(4, 3), ids(B), -1, True),
    "gradients of bags by frequency": lambda: verdict(
        aten.embedding_bag.default,
        fixed(4, 3),
        ids(B),
        Operand((B,), RowIndex(0), torch.int64),
        True,
        out=((B, 3), (0,), (B,), (B,)),
    ),
    "a table of rows": lambda: verdict(aten.embedding.default, rows(B, 3), fixed(2, dtype=torch.int64)),
    "classes over the batch": lambda: verdict(aten.one_hot.default, ids(B)),
    "a mean loss": lambda: verdict(aten.mse_loss.default, rows(B), rows(B)),
    "a summed loss": lambda: verdict(aten.binary_cross_entropy.default, rows(B), rows(B), None, 2),
    "a mean triplet loss": lambda: verdict(aten.triplet_margin_loss.default, rows(B, 3), rows(B, 3), rows(B, 3)),
    "a mean cosine loss": lambda: verdict(aten.cosine_embedding_loss.default, rows(B, 3), rows(B, 3), rows(B)),
    "class weights of rows": lambda: verdict(aten.cross_entropy_loss.default, rows(B, 3), ids(B), rows(3), 0),
    "one row of logits": lambda: verdict(aten.cross_entropy_loss.default, rows(B), fixed(dtype=torch.int64), None, 0),
    "the batch for classes, in both": lambda: verdict(
        aten.cross_entropy_loss.default, rows(3, B, dim=1), rows(3, B, dim=1), None, 0
    ),
    "targets of rows for fixed logits": lambda: verdict(aten.cross_entropy_loss.default, fixed(B, 4), ids(B), None, 0),
    "the diagonal of rows and rows": lambda: verdict(aten.einsum.default, "bb->b", [rows(B, B)], out=((B,),)),
    "the batch for classes": lambda: verdict(aten.cross_entropy_loss.default, rows(3, B, dim=1), ids(3), None, 0),
    "division by the batch size": lambda: verdict(aten.div.Tensor, rows(B, 3), N),
    "the first rows": lambda: verdict(aten.slice.Tensor, rows(B, 3), 0, 0, 3, out=((3, 3),)),
    "as many rows as traced": lambda: verdict(aten.slice.Tensor, rows(B, 3), 0, 0, B),
    "every other row": lambda: verdict(aten.slice.Tensor, rows(2 * B, 3, outer=2), 0, 0, sys.maxsize, 2),
    "all rows but one": lambda: verdict(aten.slice.Tensor, rows(B, 3), 0, 1, sys.maxsize, out=((B - 1, 3),)),
    "a window of rows": lambda: verdict(aten.narrow.default, rows(2 * B, 3, outer=2), 0, 3, N),
    "a shifted block": lambda: verdict(aten.slice.Tensor, rows(2 * B, 3, outer=2), 0, B, 2 * N),
    "as many columns as rows": lambda: verdict(aten.slice.Tensor, rows(B, 9), 1, 0, N, out=((B, B),)),
    "parts of as many columns as rows": lambda: verdict(aten.split.Tensor, rows(B, 14), N, 1, out=((B, B), (B, B))),
    "parts of the rows": lambda: verdict(aten.split.Tensor, rows(2 * B, 3, outer=2), B, 0, out=((B, 3), (B, 3))),
    "parts of unequal blocks": lambda: verdict(
        aten.chunk.default, rows(3 * B, 3, outer=3), 2, 0, out=((11, 3), (10, 3))
    ),
    "parts at positions that are rows": lambda: verdict(
        aten.tensor_split.indices, rows(B, 3), [ids(2)], 0, out=((B, 3), (0, 3))
    ),
    "a view of fixed sizes": lambda: verdict(aten.view.default, rows(B, 6), [B, 2, 3], out=((B, 2, 3),)),
    "a view that swaps sizes": lambda: verdict(aten.view.default, rows(B, 6), [6, N], out=((6, B),)),
    "a view with another size of the batch": lambda: verdict(aten.view.default, rows(B, 7), [-1, N], out=((B, B),)),
    "a split of fixed sizes": lambda: verdict(aten.unflatten.int, rows(2 * B, 3, inner=2), 0, [B, 2], out=((B, 2, 3),)),
    "a split of columns by the batch": lambda: verdict(aten.unflatten.int, rows(B, 7), 1, [N, 1], out=((B, B, 1),)),
    "a view as a value with another batch": lambda: verdict(
        aten.view_as.default, rows(B, 6), rows(6, B, dim=1), out=((6, B),)
    ),
    "an expand of fixed sizes": lambda: verdict(aten.expand.default, rows(B, 1), [B, 3]),
    "an expand by rows and rows": lambda: verdict(aten.expand.default, rows(B, 1), [N, N], out=((B, B),)),
    "columns repeated by the batch": lambda: verdict(aten.expand.default, rows(B, 1), [-1, N], out=((B, B),)),
    "two sizes": lambda: verdict(aten.expand.default, fixed(1, 1), [N, N], out=((B, B),)),
    "a size that is no multiple": lambda: verdict(aten.expand.default, fixed(1, 1), [N + 1, 3], out=((B + 1, 3),)),
    "copies by the batch": lambda: verdict(aten.repeat.default, rows(B, 3), [1, N], out=((B, 3 * B),)),
    "writing by numbers of rows": lambda: verdict(aten.index_add.default, rows(B, 3), 1, ids(3), rows(B, 3)),
    "writing over rows": lambda: verdict(
        aten.index_copy.default, rows(B, 3), 0, fixed(B, dtype=torch.int64), rows(B, 3)
    ),
    "filling by numbers of rows": lambda: verdict(aten.index_fill.int_Scalar, rows(B, 3), 1, ids(3), 1.0),
    "writing over some rows": lambda: verdict(
        aten.slice_scatter.default, rows(2 * B, 3, outer=2), rows(2 * B, 2, outer=2), 0
    ),
    "writing over the batch": lambda: verdict(aten.select_scatter.default, rows(B, 3), rows(3), 0, 0),
    "the diagonal of the batch": lambda: verdict(aten.diagonal_scatter.default, rows(B, 3), rows(3)),
    "another row's diagonal": lambda: verdict(aten.diagonal_scatter.default, rows(B, 3, 3), rows(3, B, dim=1), 0, 1, 2),
    "matrices of rows": lambda: verdict(aten.linalg_inv.default, rows(B, 3)),
    "slopes of each row": lambda: verdict(aten.prelu.default, rows(3, B, dim=1), fixed(B), out=((3, B),)),
    "another diagonal": lambda: verdict(aten.linalg_diagonal.default, rows(B, 3, 3), dim1=0, dim2=1),
}


@pytest.mark.parametrize("what", REFUSED)
def test_is_declined(what: str) -> None:
    with pytest.raises(NotRowWise) as caught:
        REFUSED[what]()
    assert str(caught.value)


def test_what_is_declined_in_training_is_not_in_eval() -> None:
    x, mean = rows(B, 3), fixed(3)
    assert verdict(aten.dropout.default, x, 0.5, False) == Rows(0)
    assert verdict(aten.dropout.default, x, 0.0, True) == Rows(0)
    assert verdict(aten.batch_norm.default, x, mean, mean, mean, mean, False, 0.1, 1e-5, True) == Rows(0)


def test_dropout_between_layers_needs_several_layers_and_training() -> None:
    x, state, stacked = rows(B, 4, 3), rows(1, B, 2, dim=1), rows(2, B, 2, dim=1)
    assert gru(x, state, GRU, 1, 0.5, True).parts == (Rows(0), Rows(1))
    assert gru(x, stacked, GRU * 2, 2, 0.5, False).parts == (Rows(0), Rows(1))
    assert gru(x, stacked, GRU * 2, 2, 0.0, True).parts == (Rows(0), Rows(1))


def test_a_loss_of_constants_may_be_reduced() -> None:
    assert verdict(aten.mse_loss.default, fixed(3), fixed(3)) == Replicated()


def test_a_range_numbers_the_rows_or_is_declined() -> None:
    accepted = set()
    for start, scale, more, step in product(range(-3, 4), range(1, 5), range(-3, 4), range(1, 5)):
        numbers = torch.arange(start, scale * B + more, step)
        try:
            found = verdict(aten.arange.start_step, start, scale * N + more, step, out=(tuple(numbers.shape),))
        except NotRowWise:
            continue
        assert found == RowIndex(0, step)
        assert numbers.equal(step * torch.arange(B))
        accepted.add(step)
    assert accepted == {1, 2, 3, 4}
