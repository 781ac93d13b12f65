"""Writing at an index: scatter, index_put, index_add and kin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Replicated, RowIndex
from roo_rewrite.rules.concat import common
from roo_rewrite.rules.families import aligned, along, batched, shifted, wrap
from roo_rewrite.rules.index import OTHER_ROWS, in_step, index, indexed
from roo_rewrite.rules.registry import Call, Operand, case, rule


@rule(
    "aten.scatter.src",
    "aten.scatter_add.default",
    cases=[
        case("B 4", "i:B 1", "B 1", call=lambda n, x, i, s: (x, 1, i, s)),
        case("4 B", "i:1 B", "1 B", call=lambda n, x, i, s: (x, 0, i, s)),
        case("B 4", "i:B 1", "7 1", call=lambda n, x, i, s: (x, 1, i, s), declines=True),
        case("7 4", "i:B 1", "B 1", call=lambda n, x, i, s: (x, 1, i, s), declines=True),
        case("B 4", "i:B 4", "B 4", call=lambda n, x, i, s: (x, 0, i, s), declines=True),
    ],
)
@rule(
    "aten.scatter.value",
    cases=[
        case("B 4", "i:B 2", call=lambda n, x, i: (x, 1, i, 5)),
        case("B 4", "i:3 2", call=lambda n, x, i: (x, 1, i, 5), declines=True),
    ],
)
@rule("aten.scatter.value_reduce", cases=[case("B 4", "i:B 2", call=lambda n, x, i: (x, 1, i, 5, {"reduce": "add"}))])
@rule(
    "aten.scatter.reduce", cases=[case("B 4", "i:B 2", "B 2", call=lambda n, x, i, s: (x, 1, i, s, {"reduce": "add"}))]
)
@rule(
    "aten.scatter_reduce.two",
    cases=[case("B 4", "i:B 2", "B 2", call=lambda n, x, i, s: (x, 1, i, s, "amax"))],
)
def scatter(call: Call) -> Batching:
    """self with entries `index` of dim `dim` overwritten or added to."""
    return in_step(call, call.operand("self"), [call.args["src"]] if "src" in call.args else [])


@rule(
    "aten.index_put.default",
    special=(RowIndex,),
    cases=[
        case("B 4", "b:B 4", call=lambda n, x, m: (x, [m], torch.tensor(9.0).to(x))),
        case("B 4", "b:B", call=lambda n, x, m: (x, [m], torch.tensor([9.0]).to(x))),
        case("B 4", "i:2", "1", call=lambda n, x, i, v: (x, [None, i], v)),
        case("B 4", "#B", "i:B", "B", call=lambda n, x, r, i, v: (x, [r, i], v)),
        case("B 4", "#B", "i:B", "7", call=lambda n, x, r, i, v: (x, [r, i], v), declines=True),
        case("7 4", "#B", "i:B", "B", call=lambda n, x, r, i, v: (x, [r, i], v), declines=True),
        case("B 4", "i:B", "1", call=lambda n, x, i, v: (x, [None, i], v), declines=True),
        case("4 7", "i:2", "2 B", call=lambda n, x, i, v: (x, [i], v), declines=True),
        case("4 3", "i:B", call=lambda n, x, i: (x, [i], torch.tensor(9.0).to(x)), declines=True),
        case("B 4", "b:7 4", call=lambda n, x, m: (x, [m], torch.tensor(9.0).to(x)), declines=True),
        case("B 4", "#B", "i:B", call=lambda n, x, r, i: (x, [r, i], torch.tensor(9.0).to(x))),
        case("B 4", "i:2", call=lambda n, x, i: (x, [i], torch.tensor(9.0).to(x)), declines=True),
    ],
)
def index_put(call: Call) -> Batching:
    """self with the entries at an advanced index overwritten or added to."""
    x, values, indices = call.operand("self"), call.operand("values"), call["indices"]
    if _is_row_mask(x, indices) and values.rows is None and set(values.shape) <= {1}:
        return batched(x.rows)
    where = index(replace(call, args={"self": x, "indices": indices}))
    if x.rows is None and (where != Replicated() or values.rows is not None):
        raise NotRowWise("rows of the batch write into one value")
    found, _, taken = indexed(x, indices)
    target = Operand((1,) * (found.ndim + x.ndim - len(taken)), where)
    if aligned([target, values]) != target.rows:
        raise NotRowWise("the batch lies in different dims of the operands")
    return batched(x.rows)


def _is_row_mask(x: Operand, indices: Sequence[Any]) -> bool:
    """Whether the index is one mask over the first dims of x, with the same batch."""
    mask = next(iter(indices)) if len(indices) == 1 else None
    return mask is not None and mask.dtype == torch.bool and mask.rows is not None and mask.rows == x.rows


_ONE_DIM = [
    case("B 4", "i:2", "B 2", call=lambda n, x, i, s: (x, 1, i, s)),
    case("4 B", "i:2", "2 B", call=lambda n, x, i, s: (x, 0, i, s)),
    case("B 4", "i:2", "2 4", call=lambda n, x, i, s: (x, 0, i, s), declines=True),
]


@rule("aten.index_add.default", "aten.index_copy.default", cases=_ONE_DIM)
@rule("aten.index_reduce.default", cases=[case("B 4", "i:2", "B 2", call=lambda n, x, i, s: (x, 1, i, s, "amax"))])
def index_add(call: Call) -> Batching:
    """Entries `index` of one dim overwritten or added to, the other dims in step."""
    call.replicated("index")
    x = call.operand("self")
    rows = common([x, call.operand("source")])
    if rows is not None and rows.dim == wrap(call["dim"], x.ndim):
        raise NotRowWise(OTHER_ROWS)
    return batched(rows)


@rule(
    "aten.index_fill.int_Scalar",
    cases=[
        case("B 4", "i:2", call=lambda n, x, i: (x, 1, i, 5)),
        case("B 4", "i:2", call=lambda n, x, i: (x, 0, i, 5), declines=True),
    ],
)
@rule("aten.index_fill.int_Tensor", cases=[case("4 B", "i:2", "", call=lambda n, x, i, v: (x, 0, i, v))])
def index_fill(call: Call) -> Batching:
    """Entries `index` of one dim set to a number."""
    call.replicated("index", "value")
    return along(call, call["dim"], what=OTHER_ROWS)


@rule(
    "aten.slice_scatter.default",
    cases=[
        case("B 4", "B 2", call=lambda n, x, s: (x, s, 1, 1, 3)),
        case("4 B", "2 B", call=lambda n, x, s: (x, s, 0, 0, 2)),
        case("B 4", "B 4", call=lambda n, x, s: (x, s, 0)),
        case("B 4", "2 4", call=lambda n, x, s: (x, s, 0, 0, 2), declines=True),
    ],
)
def slice_scatter(call: Call) -> Batching:
    """A range of a dim written over. Of the batch dim, only all of it."""
    x, src = call.operand("self"), call.operand("src")
    rows = common([x, src])
    if rows is not None and rows.dim == wrap(call["dim"], x.ndim) and src.shape != x.shape:
        raise NotRowWise("writes over some rows of the batch")
    return batched(rows)


@rule(
    "aten.select_scatter.default",
    cases=[
        case("B 4", "B", call=lambda n, x, s: (x, s, 1, 2)),
        case("4 B", "B", call=lambda n, x, s: (x, s, 0, -1)),
        case("B 4", "7", call=lambda n, x, s: (x, s, 1, 2), declines=True),
        case("B 4", "4", call=lambda n, x, s: (x, s, 0, 1), declines=True),
    ],
)
def select_scatter(call: Call) -> Batching:
    """One entry of a dim written over."""
    x, src = call.operand("self"), call.operand("src")
    dim = wrap(call["dim"], x.ndim)
    if x.rows is not None and x.rows.dim == dim:
        raise NotRowWise("writes over one row of the batch")
    if src.rows is None:
        return batched(common([x, src]))
    return batched(common([x, replace(src, batching=shifted(src.rows, int(dim <= src.rows.dim)))]))


@rule(
    "aten.diagonal_scatter.default",
    cases=[case("B 3 3", "B 3", call=lambda n, x, s: (x, s, 0, 1, 2)), case("3 3 B", "B 3")],
)
def diagonal_scatter(call: Call) -> Batching:
    """The diagonal of two dims, the last dim of src, written over."""
    x, src = call.operand("self"), call.operand("src")
    pair = {wrap(call["dim1"], x.ndim), wrap(call["dim2"], x.ndim)}
    if x.rows is not None and x.rows.dim in pair:
        raise NotRowWise("writes over the diagonal of the batch")
    rows = x.rows
    if src.rows != (rows and shifted(rows, -sum(d < rows.dim for d in pair))):
        raise NotRowWise("the batch lies in different dims of the operands")
    return batched(rows)
