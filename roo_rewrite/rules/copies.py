"""Copies of entries along dims."""

from __future__ import annotations

import math
from dataclasses import replace

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Replicated, Rows
from roo_rewrite.rules.families import shifted, wrap
from roo_rewrite.rules.registry import Call, Extent, Operand, case, rule


def _x(call: Call) -> Operand:
    return call.operand("self")


@rule(
    "aten.repeat.default",
    sizes=("repeats",),
    places=True,
    cases=[
        case("#B 1", call=lambda n, x: (x, [1, 3])),
        case("B 3", call=lambda n, x: (x, [1, 2])),
        case("B 3", call=lambda n, x: (x, [2, 1, 1])),
        case("1 3", call=lambda n, x: (x, [n, 2])),
        case("4 3", call=lambda n, x: (x, [n, 1])),
        case("1 3", call=lambda n, x: (x, [n * 2, 1])),
        case("3 1", call=lambda n, x: (x, [2, 1, n])),
        case("1 3", call=lambda n, x: (x, [n, n]), declines=True),
        case("1 3", call=lambda n, x: (x, [n + 1, 1]), declines=True),
        case("B 3", call=lambda n, x: (x, [2, 1])),
        case("B*2 3", call=lambda n, x: (x, [3, 1])),
        case("B", call=lambda n, x: (x, [n]), declines=True),
    ],
)
@rule(
    "aten.tile.default",
    sizes=("dims",),
    cases=[
        case("B 3", call=lambda n, x: (x, [2])),
        case("B 3", call=lambda n, x: (x, [2, 1])),
        case("1 3", call=lambda n, x: (x, [n, 1])),
    ],
)
def repeat(call: Call) -> Batching:
    """Whole copies along dims; of the batch dim they are an outer dim of the merged one."""
    x, repeats = _x(call), list(call.args.get("repeats") or call["dims"])
    repeats = [1] * (x.ndim - len(repeats)) + repeats
    new = len(repeats) - x.ndim
    if x.rows is None:
        return _copies(call, x, repeats)
    if any(isinstance(r, Extent) for r in repeats):
        raise NotRowWise("repeats the batch as often as it has rows")
    rows = shifted(x.rows, new)
    return replace(rows, outer=rows.outer * repeats[rows.dim])


def _copies(call: Call, x: Operand, repeats: list[int]) -> Batching:
    """A value without a batch repeated for every row: all of dim i is one block of the merged dim."""
    grown = [i for i, r in enumerate(repeats) if isinstance(r, Extent)]
    if not grown:
        return Replicated()
    size = ((1,) * (len(repeats) - x.ndim) + x.shape)[grown[0]]
    if len(grown) > 1 or repeats[grown[0]] % call.batch or (size > 1 and repeats[grown[0]] != call.batch):
        raise NotRowWise("several sizes depend on the batch")
    return Rows(grown[0], inner=repeats[grown[0]] // call.batch * size)


@rule(
    "aten.repeat_interleave.self_int",
    sizes=("repeats", "output_size"),
    cases=[
        case("1 3", call=lambda n, x: (x, n, 0)),
        case("2 3", call=lambda n, x: (x, n, 0)),
        case("B 3", call=lambda n, x: (x, n, 0), declines=True),
        case("B 3", call=lambda n, x: (x, 2, 0, {"output_size": 2 * n})),
        case("B 3", call=lambda n, x: (x, 2, 1)),
        case("B 3", call=lambda n, x: (x, 2, 0)),
        case("B*2 3", call=lambda n, x: (x, 3, 0)),
        case("B", call=lambda n, x: (x, 2)),
        case("2 B 3", call=lambda n, x: (x, 2)),
        case("2 3*B", call=lambda n, x: (x, 2)),
    ],
)
def repeat_interleave(call: Call) -> Batching:
    """Each entry of a dim several times in a row: an inner dim merged into it."""
    x, repeats = _x(call), call["repeats"]
    if isinstance(repeats, Extent):
        return _interleaved_rows(call, x)
    if x.rows is None:
        return Replicated()
    if call["dim"] is None:
        inner = math.prod(x.shape[x.rows.dim + 1 :]) * call["repeats"]
        return Rows(0, x.rows.outer * math.prod(x.shape[: x.rows.dim]), x.rows.inner * inner)
    inner = call["repeats"] if wrap(call["dim"], x.ndim) == x.rows.dim else 1
    return Rows(x.rows.dim, x.rows.outer, x.rows.inner * inner)


def _interleaved_rows(call: Call, x: Operand) -> Batching:
    """Entries of a value without a batch repeated for every row: they are the outer dim of the merged one."""
    if x.rows is not None or call["dim"] is None or call["repeats"] % call.batch:
        raise NotRowWise("repeats the batch as often as it has rows")
    dim = wrap(call["dim"], x.ndim)
    return Rows(dim, x.shape[dim], call["repeats"] // call.batch)


@rule("aten.kron.default", cases=[case("B 2", "3"), case("2 3", "B 2"), case("B", "2"), case("B", "B", declines=True)])
def kron(call: Call) -> Batching:
    """Products of all pairs of entries, dim by dim: those of `other` are the inner dim of the merged one."""
    x, y = call.operand("self"), call.operand("other")
    ndim = max(x.ndim, y.ndim)
    left, right = ((1,) * (ndim - o.ndim) + o.shape for o in (x, y))
    if x.rows is not None and y.rows is not None:
        raise NotRowWise("pairs every row with every row")
    if x.rows is not None:
        rows = shifted(x.rows, ndim - x.ndim)
        return replace(rows, inner=rows.inner * right[rows.dim])
    if y.rows is None:
        return Replicated()
    rows = shifted(y.rows, ndim - y.ndim)
    return replace(rows, outer=rows.outer * left[rows.dim])
