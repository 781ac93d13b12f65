"""Convolutions of blocks.

conv(cat[E a, c], W)  =  E conv(a, Wa) + conv(c, Wc)          cut along the channels, whatever the window
conv(cat[E a, c], W)  =  cat[E conv(a, W), conv(c, W)]        cut along a dim that the window does not reach across
conv(cat[E a, c], W)  =  cat[E conv(a, W), conv(cat[b, c], W)]     b: the entries of a that windows over c reach
"""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

import torch
from torch.fx import Node

from passes.forms import PROVENANCE, Blocks, Filled, Form, Lazy, Whole, is_mixed, leaves, provenance, with_size
from passes.split import Application, Splitter, handles
from passes.splits.blocks import cut_form
from passes.splits.linear import in_parts, product
from roo_rewrite.facts import Provenance

aten = torch.ops.aten
# A window of few channels costs an entry of its result, however long it is: 4 ns where moving one is 0.13.
_ENTRY = 30.0
_PLAIN = {"aten.conv1d.padding": aten.conv1d.default, "aten.conv2d.padding": aten.conv2d.default}


@handles("aten.conv1d.default", "aten.conv2d.default", *_PLAIN)
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
    x = x.inner if isinstance(x, Lazy) else x
    if not isinstance(x, Blocks) or x.dim != 1 or not is_mixed(x):
        return None
    x = Blocks(1, tuple(Whole(s.builder.whole(p)) for p in x.parts))
    options = [app[name] for name in ("stride", "padding", "dilation")]
    first = Whole(s.builder.pick(weight, 1, range(x.sizes[0])))
    shape = s.plain(app.replaced(input=x.parts[0], weight=first, bias=None)).shape

    def emit(x: Node, w: Node, b: Node | None = None) -> Node:
        return s.builder.call(app.target, x, w, b, *options)

    return product(s, x, 1, weight, bias, emit, shape)


def _beside(s: Splitter, app: Application, x: Blocks) -> Form | None:
    """Part by part: a run of windows that see the request's entries alone, then a run of those that do not."""
    if not is_mixed(x):
        return None
    shape = s.plain(app).shape
    found = _padded(app, x)
    if found is None:
        return None
    app, x = found
    at = x.dim - 2
    step, gap = (_along(app[name], at) for name in ("stride", "dilation"))
    early = [provenance(p) is not Provenance.IMPRESSION for p, size in zip(x.parts, x.sizes) for _ in range(size)]
    span = (int(app["weight"].shape[x.dim]) - 1) * gap + 1
    starts = range(0, len(early) - span + 1, step)
    runs = [list(run) for _, run in groupby(starts, key=lambda i: all(early[i : i + span]))]
    if len(runs) < 2:
        return None
    pieces = [cut_form(s, x, x.dim, run[0], run[-1] + span) for run in runs]
    if span > 1 and not _pays(s, app, x, pieces, [len(run) for run in runs], shape):
        return None
    return Blocks(x.dim, tuple(s.apply(app.replaced(input=Whole(s.builder.whole(p)))) for p in pieces))


def _padded(app: Application, x: Blocks) -> tuple[Application, Blocks] | None:
    """The same windows without padding along the cut: zeros of it are parts of the input."""
    dims, at = range(x.ndim - 2), x.dim - 2
    if app["padding"] == "valid":
        before = after = [0 for _ in dims]
    elif app["padding"] == "same":
        whole = [(int(app["weight"].shape[2 + d]) - 1) * _along(app["dilation"], d) for d in dims]
        before, after = [n // 2 for n in whole], [n - n // 2 for n in whole]
    else:
        before = after = [_along(app["padding"], d) for d in dims]
    if any(b != a for d, (b, a) in enumerate(zip(before, after)) if d != at):
        return None
    like = next(n for n in leaves(x) if n.meta[PROVENANCE] is not Provenance.IMPRESSION)
    zeros = [Filled(0.0, with_size(x.shape, x.dim, n), like) for n in (before[at], after[at])]
    parts = (*(zeros[:1] if before[at] else ()), *x.parts, *(zeros[1:] if after[at] else ()))
    options = {**app.named, "padding": [0 if d == at else n for d, n in enumerate(before)]}
    return Application(_PLAIN.get(str(app.target), app.target), options), Blocks(x.dim, parts)


def _pays(
    s: Splitter, app: Application, x: Blocks, pieces: list[Form], counts: list[int], shape: tuple[Any, ...]
) -> bool:
    """Whether windows by side, put together again, are faster than all of them per impression."""
    price, (channels, *window) = s.price, (int(n) for n in app["weight"].shape)
    sides = [provenance(p) for p in pieces]

    def cost(entries: tuple[Any, ...], side: Provenance) -> float:
        return price.product(entries, math.prod(window), side, channels) + price.move(entries, side, _ENTRY)

    before = cost(shape, Provenance.IMPRESSION) + price.move(x.shape)
    after = sum(cost(with_size(shape, x.dim, n), side) for n, side in zip(counts, sides))
    after += sum(price.move(p.shape, side) for p, side in zip(pieces, sides))
    after += price.move(shape) + price.start(2 * len(pieces))
    per_request = sum(n for n, side in zip(counts, sides) if side is not Provenance.IMPRESSION)
    return s.take(f"conv: {per_request} of {sum(counts)} windows per request", before, after)


def _along(option: Any, at: int) -> Any:
    return option[at if len(option) > 1 else 0] if isinstance(option, (list, tuple)) else None
