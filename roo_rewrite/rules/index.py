"""Picking entries by index, with a table or a row of the batch to pick from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Replicated, RowIndex, Rows
from roo_rewrite.rules.concat import common
from roo_rewrite.rules.families import aligned, batched, broadcast_shape, shifted, wrap
from roo_rewrite.rules.registry import Call, Operand, case, no_rule, rule

OTHER_ROWS = "an index picks among the rows of the batch"


def picked(x: Operand, dim: int, index: Operand) -> Batching:
    """x with dim `dim` replaced by the dims of index."""
    if is_row_index(index, x.rows, dim):
        return Rows(dim)
    if x.rows is not None and index.rows is not None:
        raise NotRowWise("both the index and what it picks from have a batch")
    if index.rows is not None:
        return shifted(index.rows, dim)
    if x.rows is None:
        return Replicated()
    if x.rows.dim == dim:
        raise NotRowWise(OTHER_ROWS)
    return shifted(x.rows, (index.ndim - 1) * int(dim < x.rows.dim))


def is_row_index(index: Operand, rows: Rows | None, dim: int) -> bool:
    """Whether the index gives every row its own place in the batch, `rows`, of dim `dim`."""
    at = index.batching
    return isinstance(at, RowIndex) and rows == Rows(dim, 1, at.step)


@rule(
    "aten.index_select.default",
    special=(RowIndex,),
    cases=[
        case("B 4", "i:2", call=lambda n, x, i: (x, 1, i)),
        case("4 3", "i:B", call=lambda n, x, i: (x, 0, i)),
        case("2 4", "i:B*2", call=lambda n, x, i: (x, -1, i)),
        case("B 4", "#B", call=lambda n, x, i: (x, 0, i)),
        case("7 4", "#B", call=lambda n, x, i: (x, 0, i), declines=True),
        case("B*4 4", "#B*2", call=lambda n, x, i: (x, 0, i), declines=True),
        case("B*2 4", "#B*2", call=lambda n, x, i: (x, 0, i)),
        case("B 4", "i:2", call=lambda n, x, i: (x, 0, i), declines=True),
        case("B 4", "i:B", call=lambda n, x, i: (x, 0, i), declines=True),
    ],
)
def index_select(call: Call) -> Batching:
    """Entries `index` of one dim."""
    x = call.operand("self")
    return picked(x, wrap(call["dim"], x.ndim), call.operand("index"))


@rule(
    "aten.gather.default",
    cases=[
        case("B 4", "i:B 2", call=lambda n, x, i: (x, 1, i)),
        case("B 2 4", "i:B 1 3", call=lambda n, x, i: (x, -1, i)),
        case("4 3", "i:B 3", call=lambda n, x, i: (x, 0, i)),
        case("7 4", "i:B 2", call=lambda n, x, i: (x, 1, i), declines=True),
        case("B 4", "i:7 2", call=lambda n, x, i: (x, 1, i), declines=True),
        case("B 4", "i:3 1", call=lambda n, x, i: (x, 1, i), declines=True),
        case("B 4", "i:B 4", call=lambda n, x, i: (x, 0, i), declines=True),
    ],
)
def gather(call: Call) -> Batching:
    """`out[i][j] = self[index[i][j]][j]` for dim 0: other dims run in step with those of the index."""
    return in_step(call, call.operand("index"), [])


def in_step(call: Call, out: Operand, others: Sequence[Operand]) -> Batching:
    """Ops whose operands run in step along all dims but `dim`; the first entries, where sizes differ."""
    x, index = call.operand("self"), call.operand("index")
    dim = wrap(call["dim"], x.ndim)
    if x.rows is None and out is index and index.rows is not None and index.rows.dim == dim:
        return index.rows
    rows = common([x, index, *others])
    if rows is not None and rows.dim == dim:
        raise NotRowWise(OTHER_ROWS)
    return batched(rows)


@rule(
    "aten.take_along_dim.default",
    cases=[
        case("B 4", "i:B 2", call=lambda n, x, i: (x, i, 1)),
        case("1 4", "i:B 2", call=lambda n, x, i: (x, i, 1)),
        case("7 4", "i:B 2", call=lambda n, x, i: (x, i, 1), declines=True),
        case("B 4", "i:7 4", call=lambda n, x, i: (x, i, 0), declines=True),
        case("B 4", "i:1 2", call=lambda n, x, i: (x, i, -1)),
        case("4 2", "i:B 2", call=lambda n, x, i: (x, i, 0)),
        case("4", "i:B 2", call=lambda n, x, i: (x, i)),
        case("2 2", "i:2 B", call=lambda n, x, i: (x, i)),
        case("2 2", "i:3 B*2 2", call=lambda n, x, i: (x, i)),
        case("B 4", "i:1 4", call=lambda n, x, i: (x, i, 0), declines=True),
        case("B", "i:2", call=lambda n, x, i: (x, i), declines=True),
    ],
)
def take_along_dim(call: Call) -> Batching:
    """Like gather, with broadcasting along the other dims."""
    x, index = call.operand("self"), call.operand("indices")
    if call["dim"] is None:
        if x.rows is not None:
            raise NotRowWise(OTHER_ROWS)
        return batched(index.rows and Rows(0, *_merged(index)))
    dim = wrap(call["dim"], x.ndim)
    if x.rows is not None and x.rows.dim == dim:
        raise NotRowWise(OTHER_ROWS)
    if index.rows is not None and index.rows.dim == dim and x.rows is None:
        return index.rows
    return batched(aligned([x, index]))


def _merged(x: Operand) -> tuple[int, int]:
    """Outer and inner of the batch of x once all its dims are merged."""
    assert x.rows is not None
    flat = torch.Size(x.shape)
    outer, inner = flat[: x.rows.dim].numel(), flat[x.rows.dim + 1 :].numel()
    return x.rows.outer * outer, x.rows.inner * inner


@rule(
    "aten.take.default",
    cases=[case("4", "i:B 2"), case("B", "i:2", call=lambda n, x, i: (x, i), declines=True)],
)
def take(call: Call) -> Batching:
    """Entries of self seen as one vector."""
    call.replicated("self")
    return batched(call.operand("index").rows)


def indexed(x: Operand, indices: Sequence[Operand | None]) -> tuple[Operand, int, list[int]]:
    """Of an advanced index: the broadcast index, where its dims go in the result, and the dims of x it takes."""
    taken: list[int] = []
    given: list[Operand] = []
    at = 0
    for index in indices:
        mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        if index is None:
            at += 1
            continue
        if mask and index.rows is not None:
            raise NotRowWise("a mask over the batch picks some of its rows")
        span = index.ndim if mask else 1
        taken += range(at, at + span)
        at += span
        given.append(Operand((-1,), Replicated()) if mask else index)
    together = taken == list(range(taken[0], taken[-1] + 1))
    return _one_index(x, given, taken), taken[0] if together else 0, taken


def _one_index(x: Operand, given: Sequence[Operand], taken: Sequence[int]) -> Operand:
    """The indices broadcast together, row numbers of the batch taken for rows."""
    rows = x.rows
    if rows is not None and rows.dim in taken:
        if len(given) != len(taken) or not is_row_index(given[list(taken).index(rows.dim)], rows, rows.dim):
            raise NotRowWise(OTHER_ROWS)
        at = list(taken).index(rows.dim)
        number = given[at].batching
        assert isinstance(number, RowIndex)
        given = [replace(g, batching=Rows(number.dim)) if i == at else g for i, g in enumerate(given)]
    elif rows is not None and any(g.rows is not None for g in given):
        raise NotRowWise("both the index and what it picks from have a batch")
    return Operand(broadcast_shape(given), batched(aligned(given)))


_INDEX_CASES = [
    case("B 4", "i:3", call=lambda n, x, i: (x, [None, i])),
    case("B 4 4", "i:3", "i:3", call=lambda n, x, i, j: (x, [None, i, j])),
    case("4 B 4", "i:3", "i:3", call=lambda n, x, i, j: (x, [i, None, j])),
    case("4 4 4 B", "i:3", "i:3", call=lambda n, x, i, j: (x, [None, i, j])),
    case("4 4 4 B", "i:2 3", "i:3", call=lambda n, x, i, j: (x, [i, None, j])),
    case("4 4 4", "i:B", "i:1", call=lambda n, x, i, j: (x, [None, i, j])),
    case("4 2 4", "i:3 B", "i:3 1", call=lambda n, x, i, j: (x, [i, None, j])),
    case("4 3", "i:B", call=lambda n, x, i: (x, [i])),
    case("4 4", "i:B 1", "i:2", call=lambda n, x, i, j: (x, [i, j])),
    case("B 4", "#B", "i:B", call=lambda n, x, r, i: (x, [r, i])),
    case("B 4 4", "#B 1", "i:B 2", call=lambda n, x, r, i: (x, [r, i])),
    case("3 B 4", "#B", "i:B", call=lambda n, x, r, i: (x, [None, r, i])),
    case("B*2 4", "#B*2", call=lambda n, x, r: (x, [r])),
    case("B 4", "i:B", call=lambda n, x, i: (x, [i]), declines=True),
    case("7 4", "#B", call=lambda n, x, r: (x, [r]), declines=True),
    case("B*2 4", "#B", call=lambda n, x, r: (x, [r]), declines=True),
    case("B 4 4", "#B", "i:7", call=lambda n, x, r, i: (x, [r, i]), declines=True),
    case("B 4", "i:2", call=lambda n, x, i: (x, [i]), declines=True),
    case("B 4", "i:B", call=lambda n, x, i: (x, [None, i]), declines=True),
]
_MASK_CASES = [
    case("B 3", call=lambda n, x: (x, [None, torch.tensor([True, False, True])])),
    case("B 4", "b:B", call=lambda n, x, m: (x, [m]), declines=True),
    case("7 4", "b:B", call=lambda n, x, m: (x, [m]), declines=True),
    case("3 2 B 2", call=lambda n, x: (x, [torch.tensor([[True, False], [True, True], [False, False]])])),
    case("2 4 B", "i:2", call=lambda n, x, i: (x, [torch.tensor([True, True]), i])),
]


@rule("aten.index.Tensor", special=(RowIndex,), cases=[*_INDEX_CASES, *_MASK_CASES])
@rule("aten._unsafe_index.Tensor", special=(RowIndex,), cases=_INDEX_CASES)
def index(call: Call) -> Batching:
    """Advanced indexing: the dims taken give way to those of the indices, or these come first."""
    x = call.operand("self")
    found, at, taken = indexed(x, call["indices"])
    if found.rows is not None:
        return shifted(found.rows, at)
    if x.rows is None:
        return Replicated()
    before = sum(d < x.rows.dim for d in taken)
    return shifted(x.rows, found.ndim * int(at <= x.rows.dim - before) - before)


@rule(
    "aten.masked_select.default",
    cases=[
        case("B 3", call=lambda n, x: (x, torch.tensor([True, False, True]))),
        case("B 2 2", call=lambda n, x: (x, torch.tensor([[[True, False], [True, True]]]))),
        case("B 3", "b:B 3", declines=True),
    ],
)
def masked_select(call: Call) -> Batching:
    """By a constant mask every row gives as many entries; they are merged into one dim."""
    x, mask = call.operand("self"), call.operand("mask")
    if mask.rows is not None:
        raise NotRowWise("a mask over the batch picks some of its rows")
    rows = aligned([x, mask])
    (total,) = call.out[0]
    if rows is None:
        return Replicated()
    if rows.dim != _first_dim(x, mask) or rows.outer != 1 or not total or total % call.batch:
        raise NotRowWise("the entries a mask picks lie before the batch dim")
    return Rows(0, 1, total // call.batch)


def _first_dim(x: Operand, mask: Operand) -> int:
    """The first dim of the operands, broadcast, that has more than one entry."""
    shape = broadcast_shape([x, mask])
    return next((i for i, size in enumerate(shape) if size != 1), len(shape))


@rule(
    "aten.one_hot.default",
    cases=[case("i:B", call=lambda n, x: (x, 4)), case("i:2 B", call=lambda n, x: (x, 4)), case("i:B", declines=True)],
)
def one_hot(call: Call) -> Batching:
    """A new last dim of `num_classes`; without it, of the largest entry in the batch."""
    rows = call.operand("self").rows
    if rows is not None and call["num_classes"] < 0:
        raise NotRowWise("the number of classes is the largest entry in the batch")
    return batched(rows)


@rule("aten.bucketize.Tensor", cases=[case("B 3", "s:4")])
@rule(
    "aten.searchsorted.Tensor",
    cases=[
        case("s:4", "B 3"),
        case("s:B 4", "B 3"),
        case("s:B", "3", declines=True),
        case("s:B", "B 3", declines=True),
        case("s:7 4", "B 3", declines=True),
    ],
)
def searchsorted(call: Call) -> Batching:
    """Where each entry of self falls in a sorted vector, its own or one for all."""
    call.replicated("boundaries")
    x = call.operand("self")
    table = call.args.get("sorted_sequence")
    sorter = call.args.get("sorter")
    if table is None or (table.ndim == 1 and table.rows is None):
        call.replicated("sorter")
        return batched(x.rows)
    rows = common([o for o in (table, x, sorter) if o is not None])
    if rows is not None and rows.dim == table.ndim - 1:
        raise NotRowWise("searches among the rows of the batch")
    return batched(rows)


@rule(
    "aten.isin.Tensor_Tensor",
    cases=[case("i:B 3", "i:2"), case("i:3", "i:B", declines=True)],
)
@rule("aten.isin.Tensor_Scalar", cases=[case("i:B 3", call=lambda n, x: (x, 2))])
def isin(call: Call) -> Batching:
    """Whether each entry is one of a fixed set."""
    call.replicated("test_elements")
    return batched(call.operand("elements").rows)


no_rule(
    "how many rows come out depends on the values of all of them",
    "aten.nonzero.default",
    "aten.nonzero_numpy.default",
    "aten.nonzero_static.default",
    "aten.argwhere.default",
    "aten._unique2.default",
    "aten.unique_dim.default",
    "aten.unique_consecutive.default",
    "aten.unique_dim_consecutive.default",
)
no_rule("counts over the batch", "aten.bincount.default", "aten.histc.default")
no_rule("reads one number out of a tensor", "aten.item.default", "aten._local_scalar_dense.default")
no_rule("fills by the order of the rows", "aten.masked_scatter.default")
no_rule("changes the table by the ids of the whole batch (max_norm)", "aten.embedding_renorm.default")
no_rule("has an entry for every pair of rows", "aten.eye.default", "aten.eye.m", "aten.block_diag.default")
no_rule("pairs every row with every row", "aten.cartesian_prod.default", "aten.combinations.default")
