"""Convolutions of blocks.

conv(cat[E a, c], W)  =  E conv(a, Wa) + conv(c, Wc)          cut along the channels, whatever the window
conv(cat[E a, c], W)  =  cat[E conv(a, W), conv(c, W)]        cut along a dim that the window does not reach across
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from passes.forms import Blocks, Form, Whole, is_mixed
from passes.split import Application, Splitter, handles
from passes.split_linear import in_parts, product

aten = torch.ops.aten


@handles("aten.conv1d.default", "aten.conv2d.default")
def conv(s: Splitter, app: Application) -> Form | None:
    """x [B, C, ...] in blocks or terms."""
    x, weight, bias = app.form("input"), app.form("weight"), app["bias"]
    if not isinstance(weight, Whole) or not (bias is None or isinstance(bias, Whole)) or x.ndim != weight.ndim:
        return None
    if isinstance(x, Blocks) and x.dim > 1:
        return _beside(s, app, x)
    if app["groups"] != 1 or not in_parts(x, 1):
        return None
    node = None if bias is None else bias.node
    pointwise = all(n == 1 for n in weight.shape[2:]) and all(v == 1 for v in app["stride"])
    if pointwise and app["padding"] == [0] * (x.ndim - 2):
        return product(s, x, 1, weight.node, node, app.target)
    return _windows(s, app, x, weight.node, node)


def _windows(s: Splitter, app: Application, x: Form, weight: Node, bias: Node | None) -> Form | None:
    """A linear map over the channels; terms must have every entry that a window looks at."""
    if not isinstance(x, Blocks) or not is_mixed(x):
        return None
    x = Blocks(1, tuple(Whole(s.builder.whole(p)) for p in x.parts))
    options = [app[name] for name in ("stride", "padding", "dilation")]
    first = Whole(s.builder.pick(weight, 1, range(x.sizes[0])))
    shape = s.plain(app.replaced(input=x.parts[0], weight=first, bias=None)).shape

    def emit(x: Node, w: Node, b: Node | None = None) -> Node:
        return s.builder.call(app.target, x, w, b, *options)

    return product(s, x, 1, weight, bias, emit, shape)


def _beside(s: Splitter, app: Application, x: Blocks) -> Form | None:
    """Part by part, where the window is one entry wide along the cut."""
    at = x.dim - 2
    options = [app["weight"].shape[x.dim], *(_along(app[name], at) for name in ("stride", "padding"))]
    if options != [1, 1, 0] or not is_mixed(x):
        return None
    return Blocks(x.dim, tuple(s.apply(app.replaced(input=Whole(s.builder.whole(p)))) for p in x.parts))


def _along(option: Any, at: int) -> Any:
    return option[at if len(option) > 1 else 0] if isinstance(option, (list, tuple)) else None
