"""Weighted sums of parts: attention pooling over fields or pairs of both sides.

sum_d (w * cat[E a, c])  =  sum_d (w_a * E a) + sum_d (w_c * c)        w_p: the entries of w beside p

No part is put beside another, and E a is read at the request's rate. A linear map of few outputs goes inside:

linear(sum_d (w * E a), W)  =  sum_d (w * E linear(a, W))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from passes.coalesce import coalesced, picked
from passes.forms import (
    Blocks,
    Deferred,
    Form,
    Picked,
    Sum,
    Whole,
    dtype_of,
    is_mixed,
    numel,
    provenance,
    same_shape,
    same_size,
)
from passes.split import Application, Splitter
from passes.splits.atoms import Atom
from passes.splits.blocks import broadcast
from passes.splits.scaled import later
from roo_rewrite.facts import Provenance

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Weighted(Deferred):
    """`inner * parts`: `inner`, the impression's, has as many dims and an entry for each of the cut dim."""

    inner: Whole
    parts: Blocks
    how: Callable[[], Node]

    @property
    def shape(self) -> tuple[Any, ...]:  # type: ignore[override]
        return self.parts.shape


def weighted(s: Splitter, app: Application) -> Form | None:
    """A product of parts of both sides and an impression's weights; carried out only if asked."""
    parts, by = app["self"], app["other"]
    if not isinstance(parts, Blocks):
        parts, by = by, parts
    if not isinstance(parts, Blocks) or not isinstance(by, Whole) or not is_mixed(parts) or by.ndim != parts.ndim:
        return None
    if not dtype_of(by).is_floating_point or dtype_of(by) != dtype_of(parts):
        return None
    fits = same_shape(broadcast([by.shape, parts.shape]), parts.shape)
    if not fits or not same_size(by.shape[parts.dim], parts.shape[parts.dim]):
        return None
    return Weighted(by, parts, later(s, app)) if provenance(by) is Provenance.IMPRESSION else None


def weighted_sum(s: Splitter, app: Application, x: Weighted, dims: Sequence[int]) -> Form | None:
    """Its sum over the cut dim, by the tensors the parts are entries of, if the weights are less to pick than they."""
    dim = x.parts.dim
    before, after = s.price.move(x.shape), s.price.move(x.inner.shape) + s.price.start(6)
    if dim not in dims or not s.take("sum: weighted parts of both sides", before, after):
        return None
    terms = []
    for node, index, places in _entries(s, x.parts):
        weights = s.builder.pick(x.inner.node, dim, places)
        product = s.builder.call(aten.mul.Tensor, weights, s.builder.pick(node, dim, index))
        terms.append((1.0, s.plain(app.replaced(self=Whole(product)))))
    return Sum(tuple(terms), terms[0][1].shape)


def _entries(s: Splitter, x: Blocks) -> list[tuple[Node, list[int], list[int]]]:
    """Of each tensor that has parts: the entries of it, in order, and their places along the cut dim."""
    form = coalesced(s, x)
    parts = form.parts if isinstance(form, Blocks) else (form,)
    found: dict[Node, list[tuple[int, int]]] = {}
    place = 0
    for part in parts:
        along = isinstance(part, Picked) and part.dim == x.dim
        node = part.base.node if isinstance(part, Picked) and along else s.builder.whole(part)
        for entry in picked(part, x.dim):
            found.setdefault(node, []).append((entry, place))
            place += 1
    return [(node, [e for e, _ in sorted(pairs)], [p for _, p in sorted(pairs)]) for node, pairs in found.items()]


def inside(s: Splitter, atom: Atom, n: int) -> bool:
    """Whether the linear map of an atom to n entries is less work inside of the weighted sum that it is."""
    found = _summed(atom)
    if found is None:
        return False
    weights, parts, _ = found
    shape, columns = tuple(weights.meta["val"].shape), int(parts.meta["val"].shape[-1])
    early, late = Provenance.REQUEST, Provenance.IMPRESSION
    read = s.price.move(shape, late, 1.0)
    before = s.price.batched(s.price.rows(shape[:1], early), s.price.fanout, numel(shape[1:]), columns)
    after = s.price.product((*shape[:-1], n), columns, early) + read + n * s.price.move(shape, late) + s.price.start(2)
    return s.take("linear: inside of a weighted sum of the request's", before, after)


def _summed(atom: Atom) -> tuple[Node, Node, int] | None:
    """(weights, the request's parts, dim) of an atom that is a weighted sum: weights are 1 wide where it is mapped."""
    node = atom.node
    if node.target is not aten.sum.dim_IntList or len(node.args) > 2 or node.kwargs:
        return None
    product, dims = node.args
    dim: Any = dims[0] if isinstance(dims, (list, tuple)) and len(dims) == 1 else dims
    if not isinstance(dim, int):
        return None
    if not isinstance(product, Node) or product.target is not aten.mul.Tensor or atom.index is not None:
        return None
    shape = tuple(product.meta["val"].shape)
    dim %= len(shape)
    for weights, parts in (product.args[:2], product.args[1::-1]):
        if not isinstance(weights, Node) or not isinstance(parts, Node) or dim in (0, len(shape) - 1):
            continue
        thin = same_shape(weights.meta["val"].shape, (*shape[:-1], 1)) and same_shape(parts.meta["val"].shape, shape)
        sides = [provenance(Whole(f)) for f in (weights, parts)]
        if thin and sides[0] is Provenance.IMPRESSION and sides[1] is not Provenance.IMPRESSION:
            return weights, parts, dim
    return None


def mapped(s: Splitter, atom: Atom) -> Node:
    """The weighted sum of what the request's parts are mapped to, times the factor of the atom."""
    found = _summed(atom)
    assert found is not None
    weights, parts, dim = found
    columns = s.builder.pick(atom.weight, 1, atom.columns)
    product = s.builder.call(aten.mul.Tensor, weights, s.builder.call(aten.linear.default, parts, columns))
    made = s.builder.call(aten.sum.dim_IntList, product, [dim])
    return made if atom.factor is None else s.builder.call(aten.mul.Tensor, made, atom.factor)
