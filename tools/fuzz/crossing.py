"""Steps that look across rows, at the size of the batch, at jagged values, or draw at random."""

from __future__ import annotations

from typing import Any

import torch

from tools.fuzz.drawer import Drawer, floating, shape_of, step
from tools.fuzz.recorder import F64, UnusableError, val
from tools.fuzz.shapes import rows_of


@step(1.5)
def statistics(d: Drawer) -> Any:
    """A value against a statistic of the batch."""
    x = rows_of(d)
    keep = d.maybe()
    match d.number(0, 5):
        case 0:
            made = d.r("mean.dim", x, [0], keep)
        case 1:
            made = d.r("sum.default", x)
        case 2:
            made = d.r("amax.default", x, [0], keep)
        case 3:
            made = d.r("mean.default", x)
        case 4:
            return d.r("softmax.int", x, 0)
        case _:
            made = d.r("sum.dim_IntList", x, [0], keep)
    return d.r(
        d.one("sub.Tensor", "mul.Tensor", "add.Tensor"),
        x if d.maybe() else d.matrix(d.pick(floating), int(shape_of(x)[1])),
        made,
    )


@step(1.0)
def other_rows(d: Drawer) -> Any:
    """A value with rows of other places."""
    x = rows_of(d)
    match d.number(0, 6):
        case 0:
            return d.r("flip.default", x, [0])
        case 1:
            return d.r("roll.default", x, [1], [0])
        case 2:
            return d.r("cumsum.default", x, 0)
        case 3:
            return d.r("sort.default", x, 0)[0]
        case 4:
            return d.r("sub.Tensor", x, d.r("slice.Tensor", x, 0, 0, 1))
        case 5:
            order = d.r("argsort.stable", d.r("select.int", x, 1, 0), stable=True, dim=0)
            return d.r("index.Tensor", x, [order])
        case _:
            return d.r("sub.Tensor", x, d.r("select.int", x, 0, d.one(0, -1)))


@step(1.0)
def in_batch(d: Drawer) -> Any:
    """Every row against every row."""
    x, y = (d.matrix(v, 2) for v in d.some(2, 2))
    scores = d.r("mm.default", x, d.r("t.default", y))
    if d.maybe():
        return d.r("diagonal.default", d.r("softmax.int", scores, d.one(0, 1)))
    return d.r("mm.default", d.r("mul.Tensor", scores, 0.1), d.matrix(d.pick(floating)))


@step(1.0)
def sized(d: Drawer) -> Any:
    """The size of the batch as a number."""
    x = rows_of(d)
    size = d.r("sym_size.int", x, 0)
    if d.maybe():
        return d.r(d.one("mul.Tensor", "div.Tensor", "add.Tensor"), x, size)
    total = d.r("sum.dim_IntList", x, [0], True)
    return d.r("sub.Tensor", x, d.r("div.Tensor", total, size))


@step(1.0)
def numbered(d: Drawer) -> Any:
    """arange(B), to pick rows or as a value."""
    x = d.matrix(d.pick(floating), d.number(2, 4))
    rows, width = shape_of(x)
    numbers = d.r("arange.default", rows)
    match d.number(0, 3):
        case 0:
            column = d.r("argmax.default", d.matrix(d.pick(floating), width), 1)
            return d.r("index.Tensor", x, [numbers, column])
        case 1:
            column = d.r.tensor(torch.tensor([width - 1]))
            return d.r("index.Tensor", x, [numbers, column])
        case 2:
            flat = d.r("reshape.default", x, [-1])
            at = d.r("add.Tensor", d.r("mul.Tensor", numbers, width), d.number(0, width - 1))
            return d.r("index_select.default", flat, 0, at)
        case _:
            return d.r("mul.Tensor", x, d.r("unsqueeze.default", numbers, 1))


@step(1.0)
def over_the_batch(d: Drawer) -> Any:
    """Joins along the batch, taken apart again or reduced."""
    width = d.number(1, 3)
    x, y = (d.matrix(v, width) for v in d.some(2, 2))
    if d.maybe(0.3):
        return d.r(d.one("sum.dim_IntList", "mean.dim"), d.r("stack.default", [x, y], 0), [0])
    both = d.r("cat.default", [x, y], 0)
    both = d.r("tanh.default", both) if d.maybe() else d.r("linear.default", both, d.r.weight(width, width))
    match d.number(0, 2):
        case 0:
            return d.r("slice.Tensor", both, 0, 0, val(x).shape[0])
        case 1:
            return d.r("select.int", d.r("view.default", both, [2, -1, width]), 0, d.one(0, 1))
        case _:
            return d.r("unflatten.int", both, 0, d.one([2, -1], [-1, 2]))


@step(1.0)
def dropped(d: Drawer) -> Any:
    """Dropout and noise; none of it in most programs."""
    x = rows_of(d)
    if d.maybe(0.75):
        return d.r("dropout.default", x, 0.5, False)
    if d.maybe(0.6):
        return d.r("dropout.default", x, 0.5, True)
    return d.r("add.Tensor", x, d.r("mul.Tensor", d.r("rand_like.default", x), 0.1))


@step(0.7)
def detached(d: Drawer) -> Any:
    return d.r("mul.Tensor", d.r("detach.default", rows_of(d)), d.matrix(d.pick(floating), 1))


@step(0.7)
def loss(d: Drawer) -> Any:
    width = d.number(1, 3)
    x, y = (d.matrix(v, width) for v in d.some(2, 2))
    if d.maybe():
        return d.r("mse_loss.default", x, y, d.one(0, 1, 2))
    return d.r("binary_cross_entropy_with_logits.default", x, d.r("sigmoid.default", y), None, None, d.one(0, 1))


@step(1.5)
def jagged(d: Drawer) -> Any:
    """The values of a jagged pair, pooled by row."""
    pair = {n.name: n for n in d.r.inputs if n.name in ("values", "lengths")}
    if len(pair) < 2:
        raise UnusableError("no jagged pair")
    values, lengths = pair["values"], pair["lengths"]
    width = d.number(1, 3)
    made = d.r("embedding.default", d.r.weight(9, width), values)
    if d.maybe(0.4):
        rows = d.matrix(d.pick(floating), width)
        wide = d.r("repeat_interleave.self_Tensor", rows, lengths, 0, output_size=val(values).shape[0])
        made = d.r(d.one("mul.Tensor", "add.Tensor"), made, wide)
    if d.maybe(0.3):
        made = d.r("tanh.default", d.r("linear.default", made, d.r.weight(width, width)))
    if d.maybe():
        return d.r("segment_reduce.default", made, "sum", lengths=lengths, unsafe=True)
    ends = d.r("cumsum.default", lengths, 0)
    starts = d.r("sub.Tensor", ends, lengths)
    table = d.r.weight(9, width)
    return d.r("embedding_bag.default", table, values, starts, False, d.one(0, 1))[0]


@step(1.0)
def masked_history(d: Drawer) -> Any:
    """A padded history, its mask from lengths."""
    steps, width = d.number(2, 4), d.number(1, 3)
    history = d.cube(d.pick(floating), steps, width)
    many = d.r("remainder.Scalar", d.pick(lambda n: val(n).dtype is torch.int64 and val(n).ndim == 1), steps)
    places = d.r("arange.default", steps)
    mask = d.r("lt.Tensor", d.r("unsqueeze.default", places, 0), d.r("unsqueeze.default", many, 1))
    weights = d.r("unsqueeze.default", d.r("to.dtype", mask, F64), 2)
    total = d.r("sum.dim_IntList", d.r("mul.Tensor", history, weights), [1])
    if d.maybe(0.4):
        return total
    size = d.r("clamp_min.default", d.r("sum.dim_IntList", weights, [1]), 1)
    return d.r("div.Tensor", total, size)
