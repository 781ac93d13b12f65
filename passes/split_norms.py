"""Layer norm over both sides, followed by a linear map.

x = cat[E a, c], m its mean, r = 1/sqrt(var + eps), m_p and n_p mean and size of part p

var            =  sum_p [ sum (x_p - m_p)^2 + n_p (m_p - m)^2 ] / n          (no cancellation)
linear(r (x - m) g + h, W)  =  r ( sum_p (x_p - m_p) g_p Wp' + (m_p - m) (g_p Wp') ) + h W'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from passes.forms import Blocks, Deferred, Form, Whole, dtype_of, is_mixed, provenance
from passes.split import Application, Splitter, handles
from roo_rewrite.facts import Provenance

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Normalized(Deferred):
    """layer_norm of blocks over their last dim, not carried out. `app` is the op on the blocks."""

    s: Splitter
    x: Blocks
    app: Application

    @property
    def inner(self) -> Form:  # type: ignore[override]
        return self.x

    def carry(self) -> Node:
        args, kwargs = self.app.arguments(self.s.carry_out)
        return self.s.builder.call(self.app.target, *args, **kwargs)

    @property
    def shape(self) -> tuple[Any, ...]:  # type: ignore[override]
        return self.x.shape


@handles("aten.layer_norm.default")
def layer_norm(s: Splitter, app: Application) -> Form | None:
    """Kept for a linear map that may follow."""
    x = app.form("input")
    over_last = isinstance(x, Blocks) and x.dim == x.ndim - 1 and len(app["normalized_shape"]) == 1
    if not over_last or not is_mixed(x) or dtype_of(x) not in (torch.float32, torch.float64):
        return None
    assert isinstance(x, Blocks)
    affine = [app["weight"], app["bias"]]
    return Normalized(s, x, app) if all(f is None or isinstance(f, Whole) for f in affine) else None


def sides_of(s: Splitter, x: Blocks) -> list[tuple[Node, list[int], Provenance]]:
    """Each side's entries as one tensor, and their places along the last dim."""
    found: dict[bool, tuple[list[Node], list[int]]] = {True: ([], []), False: ([], [])}
    start = 0
    for part, size in zip(x.parts, x.sizes):
        nodes, places = found[provenance(part) is not Provenance.IMPRESSION]
        nodes.append(s.builder.whole(part))
        places += range(start, start + size)
        start += size
    out = []
    for early, (nodes, places) in found.items():
        if nodes:
            out.append(
                (s.builder.cat(nodes, x.ndim - 1), places, Provenance.REQUEST if early else Provenance.IMPRESSION)
            )
    return out


def linear_of_normalized(s: Splitter, form: Normalized, weight: Whole, bias: Whole | None) -> Form | None:
    """The linear map through the statistics of each side, if that pays."""
    x, k, n = form.x, int(form.x.shape[-1]), int(weight.shape[0])
    if not _pays(s, form, weight):
        return None
    b, last = s.builder, x.ndim - 1
    gain, shift = form.app["weight"], form.app["bias"]
    scaled = weight.node if gain is None else b.call(aten.mul.Tensor, weight.node, gain.node)
    parts = sides_of(s, x)
    means = [b.call(aten.mean.dim, node, [last], True) for node, _, _ in parts]
    centred = [b.call(aten.sub.Tensor, node, mean) for (node, _, _), mean in zip(parts, means)]
    squares = [b.call(aten.sum.dim_IntList, b.call(aten.mul.Tensor, c, c), [last], True) for c in centred]
    sizes = [len(places) for _, places, _ in parts]
    mean = _total(s, [b.call(aten.mul.Tensor, m, size / k) for m, size in zip(means, sizes)])
    gaps = [b.call(aten.sub.Tensor, m, mean) for m in means]
    between = [b.call(aten.mul.Tensor, b.call(aten.mul.Tensor, g, g), float(size)) for g, size in zip(gaps, sizes)]
    var = b.call(aten.mul.Tensor, _total(s, [*squares, *between]), 1.0 / k)
    scale = b.call(aten.rsqrt.default, b.call(aten.add.Tensor, var, float(form.app["eps"])))
    terms = []
    for c, gap, (_, places, _) in zip(centred, gaps, parts):
        columns = b.pick(scaled, 1, places)
        terms.append(b.call(aten.linear.default, c, columns))
        terms.append(b.call(aten.mul.Tensor, gap, b.call(aten.sum.dim_IntList, columns, [1])))
    y = b.call(aten.mul.Tensor, _total(s, terms), scale)
    constant = _constant(s, weight.node, shift, bias)
    assert n == int(y.meta["val"].shape[-1])
    return Whole(y if constant is None else b.call(aten.add.Tensor, y, constant))


def _constant(s: Splitter, weight: Node, shift: Whole | None, bias: Whole | None) -> Node | None:
    moved = None if shift is None else s.builder.call(aten.mv.default, weight, shift.node)
    if moved is None or bias is None:
        return moved if bias is None else bias.node
    return s.builder.call(aten.add.Tensor, moved, bias.node)


def _total(s: Splitter, nodes: list[Node]) -> Node:
    """Request terms first, then the others."""
    ordered = sorted(nodes, key=lambda n: provenance(Whole(n)) is Provenance.IMPRESSION)
    total = ordered[0]
    for node in ordered[1:]:
        total = s.builder.call(aten.add.Tensor, total, node)
    return total


def _pays(s: Splitter, form: Normalized, weight: Whole) -> bool:
    x, k, n = form.x, int(form.x.shape[-1]), int(weight.shape[0])
    price, impression = s.price, Provenance.IMPRESSION
    shape = (*x.shape[:-1], n)
    early = sum(size for part, size in zip(x.parts, x.sizes) if provenance(part) is not impression)
    before = price.product(shape, k, impression) + 3 * price.move(x.shape)
    after = price.product(shape, k - early, impression) + price.product(shape, early, Provenance.REQUEST)
    after += 3 * price.move((*x.shape[:-1], k - early)) + 4 * price.move(shape) + price.start(12)
    where = s.builder.origin.name if s.builder.origin is not None else ""
    return price.take(f"layer norm and linear: {early} of {k} columns per request", before, after, where)
