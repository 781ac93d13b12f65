"""Entries in another order, more than once, or with constants beside them.

flip(cat[E a, c])          =  cat[flip(c), flip(E a)]          along the cut dim; along another, part by part
pad(cat[E a, c], (1, 2))   =  cat[0, E a, c, 0, 0]
repeat, gather, ...        =  the entries they name, picked from their parts
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from passes.constants import evaluate
from passes.forms import (
    PROVENANCE,
    Blocks,
    Expanded,
    Filled,
    Form,
    Picked,
    Whole,
    hint,
    is_mixed,
    is_static,
    leaves,
    same_size,
    with_size,
)
from passes.split import Application, Splitter, handles
from passes.splits.blocks import pick_form
from passes.splits.reshaped import side_by_side

aten = torch.ops.aten


def _is_parts(x: Form) -> bool:
    return isinstance(x, (Blocks, Expanded, Picked, Filled))


@handles("aten.flip.default")
def flip(s: Splitter, app: Application) -> Form | None:
    """Dims reversed."""
    x = app.form("self")
    dims = [d % x.ndim for d in app["dims"]] if x.ndim else []
    if not isinstance(x, Blocks) or x.dim not in dims:
        return None
    picked = pick_form(s, x, x.dim, range(int(x.shape[x.dim]))[::-1])
    others = [d for d in dims if d != x.dim]
    return s.op(aten.flip.default, picked, others) if others else picked


@handles("aten.roll.default")
def roll(s: Splitter, app: Application) -> Form | None:
    """Dims rotated."""
    x, shifts, dims = app.form("self"), app["shifts"], app["dims"]
    if not isinstance(x, Blocks) or not dims or any(isinstance(n, Node) for n in shifts):
        return None
    pairs = [(n, d % x.ndim) for n, d in zip(shifts, dims)]
    size = int(x.shape[x.dim])
    turn = sum(n for n, d in pairs if d == x.dim)
    if all(d != x.dim for _, d in pairs):
        return None
    picked = pick_form(s, x, x.dim, [(i - turn) % size for i in range(size)])
    others = [(n, d) for n, d in pairs if d != x.dim]
    return s.op(aten.roll.default, picked, *(list(v) for v in zip(*others))) if others else picked


@handles("aten.constant_pad_nd.default", "aten.pad.default")
def pad(s: Splitter, app: Application) -> Form | None:
    """Constants beside the parts."""
    x, widths = app.form("self"), app["pad"]
    value = app["value"] if app["value"] is not None else 0
    if not isinstance(x, Blocks) or not is_mixed(x) or any(isinstance(n, Node) for n in (*widths, value)):
        return None
    if app.named.get("mode", "constant") != "constant":
        return None
    made: Form = x
    for i in range(0, len(widths), 2):
        dim, (before, after) = x.ndim - 1 - i // 2, widths[i : i + 2]
        if before or after:
            if not is_static(x.shape[dim]) or max(-before, 0) + max(-after, 0) >= int(x.shape[dim]):
                return None
            made = _padded(s, made, dim, (before, after), Filled(float(value), (), next(leaves(x))))
    return made


def _padded(s: Splitter, x: Form, dim: int, widths: tuple[int, int], edge: Filled) -> Form:
    """One dim padded; a negative width cuts off. Parts along another dim are padded one by one."""
    if isinstance(x, Blocks) and x.dim != dim:
        return Blocks(x.dim, tuple(_padded(s, p, dim, widths, edge) for p in x.parts))
    before, after = widths
    size = int(x.shape[dim])
    inner = pick_form(s, x, dim, range(max(-before, 0), size - max(-after, 0)))
    like = min(leaves(inner), key=lambda n: n.meta[PROVENANCE], default=edge.like)
    edges = [(Filled(edge.value, with_size(x.shape, dim, n), like),) if n > 0 else () for n in widths]
    parts = inner.parts if isinstance(inner, Blocks) else (inner,)
    return Blocks(dim, (*edges[0], *parts, *edges[1])) if any(edges) else inner


@handles("aten.repeat.default", "aten.tile.default")
def repeat(s: Splitter, app: Application) -> Form | None:
    """Copies of dims of size 1 are an expand; of others they are picks, or an expand beside them (a view of one)."""
    x = app.form("self")
    repeats = app["repeats"] if "repeats" in app.named else app["dims"]
    if any(isinstance(r, Node) for r in repeats):
        return None
    repeats = [1] * (x.ndim - len(repeats)) + list(repeats)
    while x.ndim < len(repeats):
        x = s.op(aten.unsqueeze.default, x, 0)
    if isinstance(x, Whole) and any(r != 1 and not same_size(n, 1) for r, n in zip(repeats, x.shape)):
        return side_by_side(s, x, repeats)
    return _copied(s, x, {d: [*range(hint(x.shape[d]))] * r for d, r in enumerate(repeats) if r != 1})


@handles("aten.repeat_interleave.self_int")
def repeat_interleave(s: Splitter, app: Application) -> Form | None:
    """Every entry of a dim several times in a row."""
    x, count = app.form("self"), app["repeats"]
    if app["dim"] is None or isinstance(count, Node) or x.ndim == 0:
        return None
    dim = app["dim"] % x.ndim
    return _copied(s, x, {dim: [i for i in range(hint(x.shape[dim])) for _ in range(count)]})


def _copied(s: Splitter, x: Form, index: dict[int, list[int]]) -> Form | None:
    """The entries `index` of some dims."""
    if any(not is_static(x.shape[d]) or not chosen for d, chosen in index.items()):
        return None
    if not _is_parts(x) and any(not same_size(x.shape[d], 1) for d in index):
        return None
    shape = x.shape
    for dim, chosen in index.items():
        shape = with_size(shape, dim, len(chosen))
        if not same_size(x.shape[dim], 1):
            x = pick_form(s, x, dim, chosen)
    if all(same_size(a, b) for a, b in zip(x.shape, shape)):
        return x
    return Expanded(x.form if isinstance(x, Expanded) else x, shape)


@handles("aten.gather.default")
def gather(s: Splitter, app: Application) -> Form | None:
    """Entries by an index that is one constant vector for every row."""
    x, index = app.form("self"), app.form("index")
    if not _is_parts(x) or index.ndim != x.ndim or x.ndim == 0:
        return None
    dim = app["dim"] % x.ndim
    rest = [d for d in range(x.ndim) if d != dim]
    found = _vector(s, index, dim)
    if found is None or not is_static(x.shape[dim]) or any(not same_size(x.shape[d], index.shape[d]) for d in rest):
        return None
    return pick_form(s, x, dim, found)


def _vector(s: Splitter, index: Form, dim: int) -> list[int] | None:
    """The entries along `dim` of an index that is the same in every other dim."""
    while isinstance(index, Expanded):
        index = index.form
    if not isinstance(index, Whole):
        return None
    node: Any = index.node
    while node.target in (aten.expand.default, aten.expand_as.default):
        node = node.args[0]
    value = evaluate(s.captured, node)
    if value is None or value.ndim > index.ndim or value.dtype != torch.int64:
        return None
    value = value.reshape([1] * (index.ndim - value.ndim) + list(value.shape))
    if value.numel() != value.shape[dim] or value.numel() != hint(index.shape[dim]):
        return None
    return [int(v) for v in value.flatten()]
