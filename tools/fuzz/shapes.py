"""Steps that move entries: arithmetic that broadcasts, views, indexing by constants, joins, writes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from tools.fuzz.drawer import Drawer, batch_dim, floating, integral, shape_of, step
from tools.fuzz.layers import joined, linear, stacked
from tools.fuzz.recorder import F64, val


@step(3.0)
def added(d: Drawer) -> Any:
    """A sum with coefficients; operands of size 1 broadcast."""
    width = d.number(1, 5)
    x = y = None
    for value in d.some(2, 4):
        y = d.matrix(value, 1 if d.maybe(0.2) else width)
        if x is None:
            x = y
        elif d.maybe(0.3):
            x = d.r("sub.Tensor", x, y)
        else:
            x = d.r("add.Tensor", x, y, alpha=d.scale()) if d.maybe(0.4) else d.r("add.Tensor", x, y)
    assert x is not None
    if d.maybe(0.3):
        x = d.r(
            *d.one(("mul.Tensor", x, d.scale()), ("neg.default", x), ("rsub.Scalar", x, 1.0), ("div.Tensor", x, 4.0))
        )
    return linear(d, x, d.number(1, 3)) if d.maybe(0.3) else x


@step(2.0)
def multiplied(d: Drawer) -> Any:
    width = d.number(1, 5)
    x, y = (d.matrix(v, 1 if d.maybe(0.2) else width) for v in d.some(2, 2))
    return d.r(d.one("mul.Tensor", "mul.Tensor", "maximum.default", "minimum.default"), x, y)


@step(1.5)
def with_constant(d: Drawer) -> Any:
    """A value with one that has no batch: sizes may equal the example's batch."""
    x = d.rows(d.pick(floating))
    last = shape_of(x)[1:]
    size = d.one([], [1], last[-1:], last, [1, *last], [1] * len(last))
    y = d.r.weight(*size) if d.maybe(0.7) else d.r.tensor(torch.rand(size, dtype=F64, generator=d.r.generator))
    return d.r(d.one("add.Tensor", "mul.Tensor", "sub.Tensor"), *d.one((x, y), (y, x)))


@step(1.0)
def as_wide_as_the_batch(d: Drawer) -> Any:
    """Features, tokens or constants as many as the example has rows."""
    size = d.one(6, 6, 61) if d.r.batch != 61 else 6
    x = d.matrix(d.pick(floating), size)
    y = d.r.tensor(torch.rand(size, dtype=F64, generator=d.r.generator), d.one("constant", "buffer"))
    made = d.r("mul.Tensor", x, y) if d.maybe() else d.r("add.Tensor", x, d.r("arange.default", size, dtype=F64))
    return d.r("softmax.int", made, 1) if d.maybe() else d.r("mm.default", made, d.r.weight(size, 2))


@step(1.5)
def stacked_fields(d: Drawer) -> Any:
    return stacked(d)


@step(1.5)
def side_by_side(d: Drawer) -> Any:
    return joined(d)


@step(1.5)
def merged_batch(d: Drawer) -> Any:
    """The batch merged with a dim, an op, the batch again."""
    x = stacked(d) if d.maybe() else d.cube(d.pick(floating), d.number(2, 3), d.number(1, 3))
    rows, steps, width = shape_of(x)
    first = d.maybe(0.3)
    if first:
        x = d.r("transpose.int", x, 0, 1)
    x = d.r("reshape.default", x, [-1, width]) if d.maybe() else d.r("flatten.using_ints", x, 0, 1)
    x = linear(d, x, 2) if d.maybe(0.7) else d.r("softmax.int", x, -1)
    width = int(shape_of(x)[1])
    wrong = d.maybe(0.15)
    sizes = [steps, rows, width] if first != wrong else [rows, steps, width]
    x = d.r("view.default", x, sizes)
    return d.r("permute.default", x, [1, 0, 2]) if sizes[0] == steps and d.maybe() else x


@step(1.0)
def seq_first(d: Drawer) -> Any:
    x = d.r("transpose.int", stacked(d), 0, 1)
    if d.maybe():
        return d.r("sum.dim_IntList", x, [d.one(0, 0, 2)])
    return d.r("cat.default", [x, d.r("transpose.int", stacked(d, int(shape_of(x)[2])), 0, 1)], 0)


@step(1.5)
def regrouped(d: Drawer) -> Any:
    """Features as another grid."""
    x = d.matrix(joined(d), d.one(4, 6, 8, 12))
    width = int(shape_of(x)[1])
    part = d.one(*(n for n in (1, 2, 3, 4) if width % n == 0))
    x = d.r("view.default", x, d.one([-1, part, width // part], [val(x).shape[0], part, width // part]))
    return d.r("transpose.int", x, 1, 2) if d.maybe() else d.r("sum.dim_IntList", x, [1])


@step(2.5)
def indexed(d: Drawer) -> Any:
    """Entries by constants."""
    x = joined(d) if d.maybe() else stacked(d, low=3)
    size = int(shape_of(x)[1])
    index = torch.randint(0, size, (d.number(1, 5),), generator=d.r.generator)
    match d.number(0, 8):
        case 0:
            return d.r("index_select.default", x, 1, index)
        case 1:
            return d.r("index.Tensor", x, [None, d.r.tensor(index, d.one("constant", "buffer"))])
        case 2:
            return d.r("select.int", x, 1, d.one(0, -1, size - 1))
        case 3:
            return d.r("slice.Tensor", x, 1, d.one(0, 1, None), d.one(size, -1, 2**63 - 1), d.one(1, 2))
        case 4:
            return d.r("flip.default", x, [d.one(1, -1)])
        case 5:
            return d.r("roll.default", x, [1], [1])
        case 6:
            return d.r("split.Tensor", x, max(1, size // 2), 1)
        case 7:
            return d.r("unbind.int", x, 1)[:3] if size < 6 else d.r("chunk.default", x, 2, 1)
        case _:
            wide = d.r(
                "expand.default",
                d.r.tensor(index.view([1, -1] + [1] * (val(x).ndim - 2))),
                [val(x).shape[0], -1, *shape_of(x)[2:]],
            )
            return d.r("gather.default", x, 1, wide)


@step(1.0)
def repeated(d: Drawer) -> Any:
    x = d.matrix(d.pick(floating), d.number(1, 3))
    match d.number(0, 3):
        case 0:
            return d.r("repeat.default", x, [1, 2])
        case 1:
            return d.r("repeat_interleave.self_int", x, 2, 1)
        case 2:
            wide = d.r("expand.default", d.r("unsqueeze.default", x, 1), [-1, 3, -1])
            return linear(d, wide, 2) if d.maybe() else d.r("flatten.using_ints", wide, 1)
        case _:
            y = d.cube(d.pick(floating), 2, int(shape_of(x)[1]))
            wide = d.r("expand_as.default", d.r("unsqueeze.default", x, 1), y)
            return d.r("cat.default", [wide, y], d.one(1, 2))


@step(1.0)
def padded(d: Drawer) -> Any:
    x = joined(d) if d.maybe() else stacked(d)
    if d.maybe():
        return d.r("constant_pad_nd.default", x, [1, d.number(0, 2)], d.one(0, 1.0))
    return d.r("unfold.default", x, val(x).ndim - 1, 1, 1)


@step(2.0)
def written(d: Drawer) -> Any:
    """In place: into a view of a fresh value, which is read afterwards."""
    base = d.r("clone.default", d.rows(d.pick(floating))) if d.maybe(0.6) else d.r("mul.Tensor", joined(d), 2.0)
    if val(base).ndim < 2:
        base = d.r("unsqueeze.default", base, 1)
    size = int(shape_of(base)[1])
    view = d.one(
        lambda: base,
        lambda: d.r("select.int", base, 1, size - 1),
        lambda: d.r("slice.Tensor", base, 1, 0, max(1, size // 2)),
        lambda: d.r("transpose.int", base, 0, 1),
    )()
    match d.number(0, 4):
        case 0:
            d.r("fill_.Scalar", view, 0.5)
        case 1:
            d.r("mul_.Tensor", view, d.scale())
        case 2:
            d.r("zero_.default", view)
        case 3 if val(view).ndim == 2 and batch_dim(view) == 0:
            d.r("add_.Tensor", view, d.matrix(d.pick(floating), int(shape_of(view)[1])))
        case 4 if val(view).ndim == 1:
            d.r("copy_.default", view, d.r("squeeze.dim", d.matrix(d.pick(floating), 1), 1))
        case _:
            d.r("add_.Scalar", view, 1.0)
    return base


@step(1.0)
def scattered(d: Drawer) -> Any:
    x = d.matrix(d.pick(floating), d.number(2, 4))
    if d.maybe():
        y = d.r("squeeze.dim", d.matrix(d.pick(floating), 1), 1)
        return d.r("select_scatter.default", x, y, 1, d.one(0, -1))
    return d.r("slice_scatter.default", x, d.matrix(d.pick(floating), 1), 1, 1, 2)


@step(1.5)
def masked(d: Drawer) -> Any:
    """Comparisons, masks, choices."""
    width = d.number(1, 4)
    x, y = (d.matrix(v, width) for v in d.some(2, 2))
    mask = d.r(d.one("gt.Tensor", "le.Tensor"), x, y) if d.maybe() else d.r("gt.Scalar", y, 0.1)
    match d.number(0, 3):
        case 0:
            return d.r("where.self", mask, x, y)
        case 1:
            return d.r("masked_fill.Scalar", x, mask, d.one(0.0, -3.0))
        case 2:
            return d.r("mul.Tensor", d.r("to.dtype", mask, F64), x)
        case _:
            return [mask, d.r("clamp.default", x, -0.5, 0.5)]


@step(1.0)
def integers(d: Drawer) -> Any:
    ids = d.pick(integral)
    match d.number(0, 4):
        case 0:
            return (
                d.r("add.Tensor", ids, d.matrix(d.pick(floating), 1))
                if val(ids).ndim == 2
                else d.r("mul.Tensor", ids, 3)
            )
        case 1:
            return d.r("eq.Tensor", d.matrix(ids, 2), d.matrix(d.pick(integral), 2))
        case 2:
            return d.r("to.dtype", ids, F64)
        case 3:
            return d.r("one_hot.default", d.r("remainder.Scalar", ids, 4), 4)
        case _:
            return d.r("cat.default", [d.matrix(ids), d.matrix(d.pick(integral))], 1)


@step(1.0)
def ranked(d: Drawer) -> Any:
    """Order along features."""
    x = joined(d)
    size = int(shape_of(x)[1])
    match d.number(0, 4):
        case 0:
            return d.r("topk.default", x, min(2, size), 1)
        case 1:
            return d.r("sort.default", x, 1, d.maybe())[0]
        case 2:
            return d.r("argsort.default", x, 1) if d.maybe() else d.r("argmax.default", x, 1)
        case 3:
            return d.r("cumsum.default", x, 1)
        case _:
            return d.r("max.dim", x, 1)


@step(1.0)
def filled(d: Drawer) -> Any:
    """Constants of the batch's size."""
    x = d.matrix(d.pick(floating), d.number(1, 3))
    rows, width = shape_of(x)
    made = d.one(
        lambda: d.r("zeros.default", [rows, width], dtype=F64),
        lambda: d.r("new_zeros.default", x, [rows, width]),
        lambda: d.r("ones_like.default", x),
        lambda: d.r("full.default", [rows, width], 0.5, dtype=F64),
        lambda: d.r("expand.default", d.r.weight(1, width), [rows, -1]),
    )()
    parts = [x, made, d.matrix(d.pick(floating), width)]
    d.chance.shuffle(parts)
    return d.r("cat.default", parts, 1) if d.maybe() else d.r("add.Tensor", made, parts[0])


def rows_of(d: Drawer) -> Node:
    """A float value `[B, K]`."""
    return d.matrix(d.pick(floating))
