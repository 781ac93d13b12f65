"""Sums of both sides: linearity and regrouping.

(E a + c) + E b  =  E(a + b) + c         a sum keeps its terms, request terms are added first
f(E a + c)       =  f(E a) + f(c)        f linear; taken only where a term is cheap by itself
s x + b + x      kept as it is           s: one value a row; the dots of a cross network are dots of x
"""

from __future__ import annotations

import math
from typing import Any

import torch

from passes.forms import (
    Blocks,
    Expanded,
    Filled,
    Form,
    Lazy,
    Scaled,
    Sum,
    Turned,
    Whole,
    dtype_of,
    is_mixed,
    same_shape,
)
from passes.split import Application, Splitter, handles
from passes.splits.blocks import blockwise, broadcast
from passes.splits.chains import regrouped
from passes.splits.masks import added_mask
from passes.splits.outer import outer
from passes.splits.scaled import centred, later
from passes.splits.scaled import scaled as scaled_rows
from passes.splits.weighted import weighted
from roo_rewrite.errors import NotRowWise

aten = torch.ops.aten


def terms_of(form: Form) -> tuple[tuple[float, Form], ...]:
    """A form as a sum."""
    return form.terms if isinstance(form, Sum) else ((1.0, form),)


@handles("aten.add.Tensor", "aten.sub.Tensor")
def add(s: Splitter, app: Application) -> Form | None:
    """A sum of both sides is kept as its terms."""
    left, right = app["self"], app["other"]
    if not isinstance(left, Form) or not isinstance(right, Form) or not isinstance(app["alpha"], (int, float)):
        return None
    if dtype_of(left) != dtype_of(right) or not dtype_of(left).is_floating_point:
        return None
    less = centred(s, app)
    if less is not None:
        return less
    factored = any(isinstance(t, Scaled) for f in (left, right) for _, t in terms_of(f))
    if any(isinstance(f, Blocks) for f in (left, right)) and not factored:
        return _blocks(s, app)
    banned = added_mask(s, app) if str(app.target) == "aten.add.Tensor" else None
    if banned is not None:
        return banned
    sign = float(app["alpha"]) * (-1.0 if str(app.target).startswith("aten.sub") else 1.0)
    terms = (*terms_of(left), *((sign * c, t) for c, t in terms_of(right)))
    made = Sum(terms, broadcast([left.shape, right.shape]))
    if (any(isinstance(t, (Blocks, Filled)) for _, t in terms) and not factored) or not _worth(made):
        return None
    return made


def _blocks(s: Splitter, app: Application) -> Form | None:
    try:
        return blockwise(s, app)
    except NotRowWise:
        return None


def _worth(form: Sum) -> bool:
    """Whether keeping the terms apart can gain anything: both sides, or a term that is only expanded."""
    return is_mixed(form) or any(isinstance(t, Expanded) for _, t in form.terms)


@handles("aten.rsub.Scalar", "aten.neg.default", "aten.mul.Scalar", "aten.div.Scalar")
def scale(s: Splitter, app: Application) -> Form | None:
    """A sum scaled by a number, term by term."""
    x = app.form("self")
    if not isinstance(x, Sum):
        return None
    match str(app.target):
        case "aten.neg.default":
            factor: Any = -1.0
        case "aten.mul.Scalar":
            factor = app["other"]
        case "aten.div.Scalar":
            factor = 1.0 / app["other"] if isinstance(app["other"], (int, float)) and app["other"] else None
        case _:
            factor = None
    return scaled(x, factor) if isinstance(factor, (int, float)) and _finite(factor) else None


@handles("aten.mul.Tensor", "aten.div.Tensor")
def multiply(s: Splitter, app: Application) -> Form | None:
    """A sum times a number, parts times weights; anything else is pointwise."""
    x, y = app["self"], app["other"]
    if isinstance(x, Sum) and isinstance(y, (int, float)) and not isinstance(y, bool) and _finite(y):
        return scaled(x, float(y) if str(app.target).startswith("aten.mul") else 1.0 / float(y))
    rows = scaled_rows(s, app)
    if rows is not None or str(app.target) != "aten.mul.Tensor":
        return rows
    return outer(s, app) or regrouped(s, app) or weighted(s, app)


def _finite(factor: float) -> bool:
    """Whether a number can be moved into the terms: infinities of opposite sign would meet."""
    return factor != 0 and math.isfinite(factor)


def scaled(form: Sum, factor: float) -> Sum:
    """Each term of a sum times a number."""
    return Sum(tuple((c * factor, t) for c, t in form.terms), form.shape)


@handles(
    "aten.transpose.int",
    "aten.permute.default",
    "aten.unsqueeze.default",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.t.default",
)
def view(s: Splitter, app: Application) -> Form | None:
    """A view of a sum is the sum of views, of a scaled value the view of both factors."""
    x = app.form("self")
    if isinstance(x, Scaled):
        return _scaled_view(s, app, x)
    if isinstance(x, Lazy):
        return _turned(s, app, x)
    if not isinstance(x, Sum) or not same_shape(broadcast([t.shape for _, t in x.terms]), x.shape):
        return None
    made = tuple((c, s.apply(app.replaced(self=_with_dims(s, t, x.ndim)))) for c, t in x.terms)
    return Sum(made, broadcast([t.shape for _, t in made]))


def _scaled_view(s: Splitter, app: Application, x: Scaled) -> Form | None:
    inner = s.apply(app.replaced(self=x.inner))
    if not isinstance(inner, (Blocks, Scaled)):
        return None
    by = s.apply(app.replaced(self=x.by))
    return Scaled(inner, by, inner.dim, later(s, app)) if isinstance(by, Whole) else None


def _turned(s: Splitter, app: Application, x: Lazy) -> Form | None:
    """The parts of a product that is not carried out, its last two of three dims exchanged."""
    dims = app.named.get("dims") or [app.named.get("dim0"), app.named.get("dim1")]
    if x.ndim != 3 or not isinstance(x.inner, Blocks) or None in dims:
        return None
    if [d % 3 for d in dims] not in ([0, 2, 1], [1, 2], [2, 1]):
        return None
    inner = s.op(aten.transpose.int, x.inner, 1, 2)
    return Turned(inner, lambda: s.builder.whole(s.plain(app)), x)


def _with_dims(s: Splitter, term: Form, ndim: int) -> Form:
    """A term with all dims of its sum."""
    for _ in range(ndim - term.ndim):
        term = s.op(aten.unsqueeze.default, term, 0)
    return term
