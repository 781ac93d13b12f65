"""One step of a recurrent net: the products with input and state, each by side, then the gates.

gru_cell(x, h):   i = linear(x, W_i, b_i), g = linear(h, W_h, b_h)        [rows, 3 H]: r, z, n
                  r = sigmoid(i_r + g_r), z = sigmoid(i_z + g_z), n = tanh(i_n + r g_n)
                  n + z (h - n)

Rows of the request, and a state that is the request's, have their products once per request.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from passes.forms import PROVENANCE, Blocks, Deferred, Form, Reshaped, Sum, Whole, hint, provenance
from passes.split import Application, Splitter, handles
from passes.splits.products import moves
from passes.splits.reshaped import through
from roo_rewrite.facts import Provenance

aten = torch.ops.aten


@handles("aten.gru_cell.default")
def gru_cell(s: Splitter, app: Application) -> Form | None:
    """input [rows, K] and hx [rows, H]; one of the products must move while the other does not."""
    x, h = app.form("input"), app.form("hx")
    considered = len(s.price.candidates)
    lifted = through(s, app) if isinstance(x, Reshaped) or isinstance(h, Reshaped) else None
    if lifted is not None:
        return lifted
    del s.price.candidates[considered:]
    weights = [app[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    constant = all(provenance(w) is Provenance.CONSTANT for w in weights if isinstance(w, Form))
    if not constant or x.ndim != 2 or max(provenance(x), provenance(h)) is not Provenance.IMPRESSION:
        return None
    built = len(s.builder.graph.nodes)
    products = [s.op(aten.linear.default, f, w, b) for f, w, b in zip((x, h), weights[:2], weights[2:])]
    del s.price.candidates[considered:]
    if not any(_moves(f) for f in products) or not _pays(s, products, built):
        return None
    return Whole(_gates(s, s.builder.whole(h), *(s.builder.whole(f) for f in products)))


def _moves(form: Form) -> bool:
    return moves(form.inner if isinstance(form, Deferred) else form)


def _pays(s: Splitter, products: list[Form], built: int) -> bool:
    """The products alone: the gates are as they were. Parts are put together for them."""
    price, impression = s.price, Provenance.IMPRESSION
    before = after = 0.0
    for node in list(s.builder.graph.nodes)[built:]:
        if node.target is aten.linear.default:
            shape, inner = tuple(node.meta["val"].shape), hint(node.args[0].meta["val"].shape[-1])
            before += price.product(shape, inner, impression)
            after += price.product(shape, inner, node.meta[PROVENANCE]) + price.start(1)
    parts = [f for f in products if isinstance(f.inner if isinstance(f, Deferred) else f, (Blocks, Sum))]
    after += sum(price.move(f.shape) for f in parts) + price.start(len(parts) - len(products))
    return s.take("recurrent cell: products by side", before, after)


def _gates(s: Splitter, h: Node, i: Node, g: Node) -> Node:
    """The step, from the products of input and state."""
    call, width = s.builder.call, int(h.meta["val"].shape[-1])
    (i_r, i_z, i_n), (g_r, g_z, g_n) = (
        [call(aten.slice.Tensor, p, 1, k * width, (k + 1) * width) for k in range(3)] for p in (i, g)
    )
    r, z = (call(aten.sigmoid.default, call(aten.add.Tensor, a, b)) for a, b in ((i_r, g_r), (i_z, g_z)))
    n = call(aten.tanh.default, call(aten.add.Tensor, i_n, call(aten.mul.Tensor, r, g_n)))
    return call(aten.add.Tensor, n, call(aten.mul.Tensor, z, call(aten.sub.Tensor, h, n)))
