"""Norms over both sides: layer norm, RMS norm, variances and lengths, by the statistics of each side.

layer_norm(x)  =  (x - m) r g + h         m the mean, r = 1/sqrt(var + eps): see `splits.scaled`
rms_norm(x)    =  x r g                   r = 1/sqrt(mean(x^2) + eps)
norm(x)        =  norm[norm(x_p)]         the Euclidean length

A linear map that follows sees blocks; anything else gets the op as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from passes.forms import Blocks, Form, Lazy, Scaled, Sum, Whole, dtype_of
from passes.split import Application, Splitter, handles
from passes.splits.scaled import centre, later, norm_of, sides_of, splits, sum_of_squares

aten = torch.ops.aten


@handles("aten.layer_norm.default")
def layer_norm(s: Splitter, app: Application) -> Form | None:
    """Kept for a linear map that may follow."""
    x = _over_last(app)
    if x is None:
        return None
    how = later(s, app)
    mean = s.builder.whole(s.op(aten.mean.dim, x, [x.dim], True))
    centred = centre(s, x, mean, how)
    variance = s.builder.whole(sum_of_squares(s, centred, 1.0 / int(x.shape[-1])))
    form = Scaled(centred, _inverse_root(s, variance, float(app["eps"])), x.dim, how)
    return Lazy(_affine(s, form, x, app["weight"], app["bias"]), how)


@handles("aten.rms_norm.default")
def rms_norm(s: Splitter, app: Application) -> Form | None:
    """Kept for a linear map that may follow."""
    x = _over_last(app)
    if x is None:
        return None
    square = s.builder.whole(s.op(aten.mean.dim, s.op(aten.mul.Tensor, x, x), [x.dim], True))
    eps = torch.finfo(dtype_of(x)).eps if app["eps"] is None else float(app["eps"])
    form = Scaled(x, _inverse_root(s, square, eps), x.dim, later(s, app))
    return Lazy(_affine(s, form, x, app["weight"], None), later(s, app))


def _over_last(app: Application) -> Blocks | None:
    """The operand, where it is cut along the only dim that is normalised, and the affine part is whole."""
    x = app.form("input")
    if not isinstance(x, Blocks) or x.dim != x.ndim - 1 or len(app["normalized_shape"]) != 1 or not splits(x):
        return None
    return x if all(f is None or isinstance(f, Whole) for f in (app["weight"], app.named.get("bias"))) else None


def _inverse_root(s: Splitter, variance: Node, eps: float) -> Whole:
    return Whole(s.builder.call(aten.rsqrt.default, s.builder.call(aten.add.Tensor, variance, eps)))


def _affine(s: Splitter, form: Scaled, x: Blocks, gain: Whole | None, shift: Whole | None) -> Form:
    made = form
    if gain is not None:
        row = s.builder.call(aten.reshape.default, gain.node, [1] * (x.ndim - 1) + [int(x.shape[-1])])
        made = Scaled(form, Whole(row), x.dim, form.how)
    return made if shift is None else Sum(((1.0, made), (1.0, shift)), x.shape)


@handles("aten.var.dim", "aten.var.correction", "aten.std.dim", "aten.std.correction")
def spread(s: Splitter, app: Application) -> Form | None:
    """A variance or standard deviation over the cut dim."""
    x = app.form("self")
    if not isinstance(x, Blocks) or not _is_cut_dim(x, app["dim"]) or not splits(x):
        return None
    count = int(x.shape[x.dim]) - _correction(app)
    if count <= 0:
        return None
    mean = s.builder.whole(s.op(aten.mean.dim, x, [x.dim], True))
    centred = centre(s, x, mean, later(s, app))
    if str(app.target).startswith("aten.var"):
        made: Form = sum_of_squares(s, centred, 1.0 / count)
    else:
        made = Whole(s.builder.call(aten.mul.Tensor, norm_of(s, centred), count**-0.5))
    return made if app["keepdim"] else s.op(aten.squeeze.dim, Whole(s.builder.whole(made)), x.dim)


@handles("aten.var_mean.dim", "aten.var_mean.correction")
def var_mean(s: Splitter, app: Application) -> list[Form] | None:
    """Both statistics."""
    given = {k: v for k, v in app.named.items() if k != "self"}
    target = aten.var.dim if str(app.target).endswith("dim") else aten.var.correction
    var = spread(s, Application(target, {"self": app["self"], **given}))
    return None if not isinstance(var, Form) else [var, s.op(aten.mean.dim, app["self"], app["dim"], app["keepdim"])]


def _correction(app: Application) -> float:
    if "unbiased" in app.named:
        return float(app["unbiased"])
    return 1.0 if app["correction"] is None else float(app["correction"])


def _is_cut_dim(x: Blocks, dims: Any) -> bool:
    dims = [dims] if isinstance(dims, int) else dims
    return dims is not None and [d % x.ndim for d in dims] == [x.dim]


@handles("aten.linalg_vector_norm.default")
def length(s: Splitter, app: Application) -> Form | None:
    """The Euclidean length over the cut dim."""
    x = app.form("self")
    if not isinstance(x, Blocks) or not _is_cut_dim(x, app["dim"]) or not splits(x) or app["dtype"] is not None:
        return None
    if app["ord"] != 2:
        return None
    norms = [s.builder.call(app.target, node, 2, [x.dim], True) for node, _ in sides_of(s, x)]
    return Whole(s.builder.call(app.target, s.builder.cat(norms, x.dim), 2, [x.dim], bool(app["keepdim"])))
