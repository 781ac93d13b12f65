"""Entries written into a value: what is written and what is left stay on their sides.

x[:, i] = v        =  cat[x, v][.., each entry where it lies now]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from passes.forms import Blocks, Form, dtype_of, is_mixed, is_static, same_shape, with_size
from passes.split import Application, Splitter, handles
from passes.splits.blocks import pick_form

aten = torch.ops.aten


@handles("aten.select_scatter.default")
def select_scatter(s: Splitter, app: Application) -> Form | None:
    """One entry of a dim."""
    x, index = app.form("self"), app["index"]
    dim = app["dim"] % max(x.ndim, 1)
    if not is_static(x.shape[dim]) or not isinstance(index, int):
        return None
    return _written(s, x, s.op(aten.unsqueeze.default, app["src"], dim), dim, [index % x.shape[dim]])


@handles("aten.slice_scatter.default")
def slice_scatter(s: Splitter, app: Application) -> Form | None:
    """A range of a dim."""
    x, where = app.form("self"), (app["start"], app["end"], app["step"])
    dim = app["dim"] % max(x.ndim, 1)
    if not is_static(x.shape[dim]) or any(not isinstance(v, int) for v in where if v is not None):
        return None
    return _written(s, x, app.form("src"), dim, range(x.shape[dim])[slice(*where)])


def _written(s: Splitter, x: Form, v: Form, dim: int, places: Sequence[int]) -> Form | None:
    """x with entries `places` of `dim` replaced by v, where both sides are in it."""
    if dtype_of(x) != dtype_of(v) or not is_mixed(Blocks(dim, (x, v))):
        return None
    if not same_shape(v.shape, with_size(x.shape, dim, len(places))):
        return None
    index = list(range(x.shape[dim]))
    for new, place in enumerate(places, x.shape[dim]):
        index[place] = new
    return pick_form(s, s.op(aten.cat.default, [x, v], dim), dim, index)
