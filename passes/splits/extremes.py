"""The largest, the smallest and the soft largest entry over a cut dim.

amax(cat[E a, c])       =  max(E amax(a), amax(c))
logsumexp(cat[E a, c])  =  logsumexp[E logsumexp(a), logsumexp(c)]

The gradient of amax goes to all entries that are the largest, in equal shares. Where both sides have some, n and m
of them, the sides get n / (n + m) and m / (n + m): amax of each shares its own among them.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from passes.forms import Blocks, Form, Whole, dtype_of, provenance
from passes.split import Application, Splitter, handles
from passes.splits.reductions import chained, reduced_dims
from passes.splits.scaled import sides_of
from roo_rewrite.facts import Provenance

aten = torch.ops.aten


@handles("aten.amax.default", "aten.amin.default")
def extreme(s: Splitter, app: Application) -> Form | None:
    """Integers have no gradient; of floats the ties are counted, if that still pays."""
    x, dims = app.form("self"), reduced_dims(app, app.form("self"))
    if not isinstance(x, Blocks) or dims is None or x.dim not in dims:
        return None
    if not dtype_of(x).is_floating_point:
        made = chained(s, app)
        return made if isinstance(made, Form) else None
    if len(_sides(x)) < 2 or not _pays(s, app, x):
        return None
    (a, n), (c, m) = (_top(s, app, node, dims) for node, _ in sides_of(s, x))
    b = s.builder
    n, m = (b.call(aten.to.dtype, count, dtype_of(x)) for count in (n, m))
    total = b.call(aten.add.Tensor, n, m)
    shares = [b.call(aten.div.Tensor, count, total) for count in (n, m)]
    tied = b.call(aten.add.Tensor, *(b.call(aten.mul.Tensor, t, w) for t, w in zip((a, c), shares)))
    pick = aten.maximum.default if str(app.target) == "aten.amax.default" else aten.minimum.default
    return Whole(b.call(aten.where.self, b.call(aten.eq.Tensor, a, c), tied, b.call(pick, a, c)))


def _sides(x: Blocks) -> set[bool]:
    """Whether parts depend on the impression: a part of both sides does."""
    return {provenance(p) is Provenance.IMPRESSION for p in x.parts}


def _top(s: Splitter, app: Application, node: Node, dims: list[int]) -> tuple[Node, Node]:
    """The extreme entry of one side, and how many entries are as large."""
    b, keep = s.builder, bool(app["keepdim"])
    kept = b.call(app.target, node, dims, True)
    count = b.call(aten.sum.dim_IntList, b.call(aten.eq.Tensor, node, kept), dims, keep)
    return (kept if keep else b.call(aten.squeeze.dims, kept, dims)), count


def _pays(s: Splitter, app: Application, x: Blocks) -> bool:
    sides = [
        (n.meta["val"].shape, side) for (n, _), side in zip(sides_of(s, x), (Provenance.REQUEST, Provenance.IMPRESSION))
    ]
    out = s.plain(app).shape
    before = s.price.move(x.shape)
    after = sum(s.price.move(shape, side, 4.0) for shape, side in sides) + 6 * s.price.move(out) + s.price.start(12)
    return s.take(f"{str(app.target).split('.')[1]} of each side", before, after)


@handles("aten.logsumexp.default")
def logsumexp(s: Splitter, app: Application) -> Form | None:
    """Over each side, then over the two."""
    x, dims = app.form("self"), reduced_dims(app, app.form("self"))
    if not isinstance(x, Blocks) or dims is None or x.dim not in dims:
        return None
    if len(_sides(x)) < 2 or not dtype_of(x).is_floating_point:
        return None
    b = s.builder
    both = b.cat([_soft_top(s, app, node, dims) for node, _ in sides_of(s, x)], x.dim)
    made = b.call(app.target, both, [x.dim], True)
    return Whole(made if app["keepdim"] else b.call(aten.squeeze.dims, made, dims))


def _soft_top(s: Splitter, app: Application, node: Node, dims: list[int]) -> Node:
    """logsumexp of one side. Where all its entries are -inf its own gradient is NaN, though no entry of it counts."""
    b, nothing = s.builder, float("-inf")
    dead = b.call(aten.eq.Scalar, b.call(aten.amax.default, node, dims, True), nothing)
    alive = b.call(aten.masked_fill.Scalar, node, dead, 0.0)
    return b.call(aten.masked_fill.Scalar, b.call(app.target, alive, dims, True), dead, nothing)
