"""Products with something added: addmm, baddbmm.

baddbmm(b, x, y, beta, alpha)  =  beta b + alpha (x @ y)
"""

from __future__ import annotations

from typing import Any

import torch

from passes.forms import Blocks, Form, Scaled, Sum, Whole, dtype_of, provenance
from passes.split import Application, Splitter, handles
from passes.splits.linear import product
from passes.splits.scaled import Centred
from roo_rewrite.facts import Provenance

aten = torch.ops.aten


@handles("aten.addmm.default")
def addmm(s: Splitter, app: Application) -> Form | None:
    """With a vector added as it is, a linear map."""
    x, y, bias = app.form("mat1"), app.form("mat2"), app.form("self")
    plain = app["beta"] == 1 and app["alpha"] == 1 and isinstance(bias, Whole) and bias.ndim == 1
    in_parts = isinstance(x, Sum) or (isinstance(x, (Blocks, Scaled, Centred)) and x.dim == 1)
    if not plain or not in_parts or not isinstance(y, Whole):
        return _added(s, app, aten.mm.default, x, y)
    assert isinstance(bias, Whole)
    return product(s, x, 1, s.builder.call(aten.t.default, y.node), bias.node, aten.linear.default)


@handles("aten.baddbmm.default")
def baddbmm(s: Splitter, app: Application) -> Form | None:
    """A batch of products, something added to each: scores and a mask, say."""
    return _added(s, app, aten.bmm.default, app.form("batch1"), app.form("batch2"))


def _added(s: Splitter, app: Application, target: Any, x: Form, y: Form) -> Form | None:
    """The product and the sum by themselves, where the product falls into parts."""
    beta, alpha, other = app["beta"], app["alpha"], app.form("self")
    numbers = all(isinstance(v, (int, float)) for v in (beta, alpha))
    if (isinstance(x, Whole) and isinstance(y, Whole)) or not numbers or not dtype_of(x).is_floating_point:
        return None
    made = s.op(target, x, y)
    if isinstance(made, Whole) and provenance(made) is Provenance.IMPRESSION:
        return None
    if alpha != 1:
        made = s.op(aten.mul.Tensor, made, alpha)
    if beta == 0:
        return made
    return s.op(aten.add.Tensor, made, other if beta == 1 else s.op(aten.mul.Tensor, other, beta))
