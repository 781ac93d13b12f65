"""Reductions over a cut dim: the same over each part, then combined.

sum(cat[E a, c], d)   =  E sum(a, d) + sum(c, d)
amax(cat[E a, c], d)  =  max(E amax(a, d), amax(c, d))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from passes.forms import Blocks, Expanded, Filled, Form, Sum, dtype_of, provenance, same_size
from passes.split import Application, Splitter, handles
from passes.splits.blocks import broadcast
from passes.splits.scaled import Squared, sum_of_squares
from passes.splits.weighted import Weighted, weighted_sum
from roo_rewrite.facts import Provenance

aten = torch.ops.aten


@handles("aten.sum.dim_IntList", "aten.mean.dim")
def total(s: Splitter, app: Application) -> Form | None:
    """A sum or mean over a cut dim is the sum of those of each side, weighted for a mean."""
    x = app.form("self")
    dims = reduced_dims(app, x)
    if dims is None or app.named.get("dtype") not in (None, dtype_of(x)):
        return None
    if isinstance(x, Squared) and dims == [x.inner.dim]:
        weight = 1.0 / int(x.shape[dims[0]]) if str(app.target).startswith("aten.mean") else 1.0
        made = sum_of_squares(s, x.inner, weight)
        return made if app["keepdim"] else s.op(aten.squeeze.dim, made, dims[0])
    if isinstance(x, Weighted) and str(app.target).startswith("aten.sum"):
        return weighted_sum(s, app, x, dims)
    if isinstance(x, Sum):
        return _of_terms(s, app, x, dims)
    if not isinstance(x, Blocks) or x.dim not in dims or not dtype_of(x).is_floating_point:
        return None
    parts = by_side(s, x)
    results = [s.apply(app.replaced(self=p)) for p in parts]
    whole = sum(int(p.shape[x.dim]) for p in parts)
    mean = str(app.target).startswith("aten.mean")
    weights = [int(p.shape[x.dim]) / whole if mean else 1.0 for p in parts]
    return Sum(tuple(zip(weights, results)), results[0].shape)


def _of_terms(s: Splitter, app: Application, x: Sum, dims: Sequence[int]) -> Form | None:
    """A sum of terms is reduced term by term, where every term has the reduced dims."""
    for _, term in x.terms:
        if term.ndim != x.ndim or any(not same_size(term.shape[d], x.shape[d]) for d in dims):
            return None
        if isinstance(term, Expanded):
            return None
    made = tuple((c, s.apply(app.replaced(self=t))) for c, t in x.terms)
    return Sum(made, broadcast([f.shape for _, f in made]))


def by_side(s: Splitter, x: Blocks) -> list[Form]:
    """The parts of each side as one part, request side first; those with a form of their own stay alone.

    No part is cut along the dim of `x`. Their order along it is lost. Parts that are cut along another dim would be
    put together along that one, and this dim be cut in each.
    """
    sides: dict[bool, list[Form]] = {True: [], False: []}
    out: list[Form] = [p for p in x.parts if isinstance(p, Blocks)]
    for part in x.parts:
        if not isinstance(part, Blocks):
            sides[provenance(part) is not Provenance.IMPRESSION].append(part)
    for parts in sides.values():
        if parts:
            joined = parts[0] if len(parts) == 1 else s.op(aten.cat.default, parts, x.dim)
            out += joined.parts if isinstance(joined, Blocks) and joined.dim == x.dim else [joined]
    return out


@handles("aten.any.dim", "aten.all.dim", "aten.prod.dim_int")
def chained(s: Splitter, app: Application) -> Form | None:
    """A reduction that is associative and commutative, combined pairwise."""
    x = app.form("self")
    dims = reduced_dims(app, x)
    if not isinstance(x, Blocks) or dims is None or x.dim not in dims:
        return None
    combine, neutral = {
        "aten.amax.default": (aten.maximum.default, None),
        "aten.amin.default": (aten.minimum.default, None),
        "aten.any.dim": (aten.logical_or.default, 0),
        "aten.all.dim": (aten.logical_and.default, 1),
        "aten.prod.dim_int": (aten.mul.Tensor, 1),
    }[str(app.target)]
    counts = [p for p in x.parts if not (isinstance(p, Filled) and p.value == neutral)]
    x = Blocks(x.dim, tuple(counts or x.parts[:1]))
    result, *rest = [s.apply(app.replaced(self=p)) for p in by_side(s, x)]
    for other in rest:
        result = s.op(combine, result, other)
    return result


def reduced_dims(app: Application, x: Form) -> list[int] | None:
    """The dims an op reduces; None where it takes all."""
    dims: Any = app["dim"]
    if dims is None or isinstance(dims, int):
        dims = [dims] if isinstance(dims, int) else []
    return [d % max(x.ndim, 1) for d in dims] or None
