"""Running sums over a cut dim.

cumsum(cat[E a, c])  =  cat[E cumsum(a), cumsum(c) + sum(E a)]
"""

from __future__ import annotations

import torch

from passes.forms import Blocks, Form, Whole, dtype_of, is_mixed
from passes.split import Application, Splitter, handles
from passes.splits.blocks import cut_form
from passes.splits.scaled import runs_of

aten = torch.ops.aten


@handles("aten.cumsum.default")
def running_sum(s: Splitter, app: Application) -> Form | None:
    """What comes before a part is added to each of its entries."""
    x = app.form("self")
    if not isinstance(x, Blocks) or app["dim"] % x.ndim != x.dim or not is_mixed(x) or app["dtype"] is not None:
        return None
    if dtype_of(x) in (torch.float16, torch.bfloat16):
        return None
    parts, total = list[Form](), None
    x = Blocks(x.dim, tuple(p for p, size in zip(x.parts, x.sizes) if size))
    for node, _ in runs_of(s, x):
        made = s.apply(app.replaced(self=Whole(node)))
        made = made if total is None else s.op(aten.add.Tensor, made, total, 1)
        last = int(made.shape[x.dim]) - 1
        parts, total = [*parts, made], cut_form(s, made, x.dim, last, last + 1)
    return Blocks(x.dim, tuple(parts))
