"""Making parts and taking them apart: cat, stack, slice, select, index_select, unbind, split, expand, repeat."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from passes.coalesce import coalesced, merged_picks, with_picks
from passes.constants import evaluate
from passes.forms import (
    Blocks,
    Expanded,
    Filled,
    Form,
    Picked,
    Sum,
    Whole,
    dtype_of,
    hint,
    is_mixed,
    is_static,
    same_shape,
    same_size,
    with_size,
)
from passes.split import Application, Splitter, handles
from passes.splits.blocks import cut_operands, mapped, pick_form, running, together

aten = torch.ops.aten


@handles("aten.cat.default", "aten.concat.default", "aten.concatenate.default")
def cat(s: Splitter, app: Application) -> Form | None:
    """Parts of both sides stay parts; those of one side are joined."""
    forms = app["tensors"]
    if not all(isinstance(f, Form) for f in forms) or any(f.ndim != forms[0].ndim for f in forms):
        return None
    dim = app["dim"] % max(forms[0].ndim, 1)
    if any(not is_static(f.shape[dim]) for f in forms) or len({dtype_of(f) for f in forms}) > 1:
        return None
    inside = _by_piece(s, app, dim)
    if inside is not None:
        return inside
    parts = [p for f in forms for p in (f.parts if isinstance(f, Blocks) and f.dim == dim else (f,))]
    parts = [p for p in _flattened(s, parts, dim) if hint(p.shape[dim])]
    parts = with_picks(parts, dim) if is_mixed(Blocks(dim, tuple(parts))) else parts
    made = Blocks(dim, merged_picks(parts, dim))
    if len(parts) > 1 and len(made.parts) == 1:
        return made.parts[0]
    structured = any(isinstance(p, (Expanded, Blocks, Sum, Filled)) for p in made.parts)
    return made if len(made.parts) > 1 and (is_mixed(made) or structured) else None


def _flattened(s: Splitter, parts: Sequence[Form], dim: int) -> list[Form]:
    """cat([x[:, :1], x[:, 1:2]], 2)  =  reshape(x[:, :2], [B, 1, 2 m])        x: [B, n, m]

    Slices one by one would each be added to the whole gradient.
    """
    out: list[Form] = []
    for _, run in itertools.groupby(parts, lambda p: _entry_of(p, dim - 1)):
        same = list(run)
        index = tuple(i for p in same if isinstance(p, Picked) for i in p.index)
        if len(same) == 1 or _entry_of(same[0], dim - 1) is None:
            out += same
            continue
        shape = s.builder.sizes(with_size(same[0].shape, dim, len(same) * hint(same[0].shape[dim])))
        assert isinstance(same[0], Picked)
        node = s.builder.pick(same[0].base.node, dim - 1, index)
        out.append(Whole(s.builder.call(aten.reshape.default, node, shape)))
    return out


def _entry_of(form: Form, dim: int) -> Node | None:
    """The tensor a form is one entry of along `dim`."""
    one = isinstance(form, Picked) and form.dim == dim and len(form.index) == 1
    return form.base.node if one and isinstance(form, Picked) else None


def _by_piece(s: Splitter, app: Application, dim: int) -> Form | None:
    """Operands cut along another dim: a concatenation of each piece, so that the cut lasts."""
    forms = app["tensors"]
    cut = next((f.dim for f in forms if isinstance(f, Blocks) and f.dim != dim and is_mixed(f)), None)
    if cut is None:
        return None
    app = mapped(app, lambda f: coalesced(s, f) if isinstance(f, Blocks) and f.dim == cut else f)
    pieces = cut_operands(s, app, cut - forms[0].ndim)
    return Blocks(cut, tuple(together(s, pieces, cut, [cut] * len(forms))))


@handles("aten.stack.default")
def stack(s: Splitter, app: Application) -> Form | None:
    """A concatenation of operands with a new dim."""
    dim = app["dim"] % (app["tensors"][0].ndim + 1)
    if not is_mixed(Blocks(0, tuple(app["tensors"]))):
        return None
    return s.op(aten.cat.default, [s.op(aten.unsqueeze.default, f, dim) for f in app["tensors"]], dim)


@handles("aten.slice.Tensor", "aten.narrow.default")
def slice_(s: Splitter, app: Application) -> Form | None:
    """A range of a dim of parts."""
    x = app.form("self")
    dim = app["dim"] % max(x.ndim, 1)
    if isinstance(x, Whole) or not is_static(x.shape[dim]):
        return None
    if str(app.target) == "aten.narrow.default":
        start, step = app["start"], 1
        if isinstance(start, int) and start < 0:
            start += x.shape[dim]
        stop = start + app["length"]
    else:
        start, stop, step = app["start"], app["end"], app["step"]
    if any(isinstance(v, Node) for v in (start, stop, step)):
        return None
    return pick_form(s, x, dim, range(x.shape[dim])[slice(start, stop, step)])


@handles("aten.select.int")
def select(s: Splitter, app: Application) -> Form | None:
    """One entry of a dim of parts: the entry of the part that has it."""
    x = app.form("self")
    dim, index = app["dim"] % max(x.ndim, 1), app["index"]
    if not isinstance(x, (Blocks, Expanded)) or not is_static(x.shape[dim]) or isinstance(index, Node):
        return None
    picked = pick_form(s, x, dim, [index % x.shape[dim]])
    return s.op(aten.squeeze.dim, picked, dim)


@handles("aten.index_select.default")
def index_select(s: Splitter, app: Application) -> Form | None:
    """Entries by a constant index."""
    x, index = app.form("self"), constant_value(s, app.form("index"))
    dim = app["dim"] % max(x.ndim, 1)
    if isinstance(x, Whole) or index is None or not is_static(x.shape[dim]):
        return None
    return pick_form(s, x, dim, [int(i) % x.shape[dim] for i in index])


def constant_value(s: Splitter, form: Form) -> list[int] | None:
    """The entries of an index vector known at compile time."""
    if not isinstance(form, Whole):
        return None
    value = evaluate(s.captured, form.node)
    if value is None or value.ndim != 1 or value.dtype not in (torch.int64, torch.int32):
        return None
    return [int(v) for v in value]


@handles("aten.unbind.int")
def unbind(s: Splitter, app: Application) -> list[Form] | None:
    """Every entry of a dim of parts."""
    x = app.form("self")
    dim = app["dim"] % max(x.ndim, 1)
    if isinstance(x, Whole) or not is_static(x.shape[dim]):
        return None
    return [s.op(aten.squeeze.dim, pick_form(s, x, dim, [i]), dim) for i in range(x.shape[dim])]


@handles(
    "aten.split.Tensor",
    "aten.split_with_sizes.default",
    "aten.split.sizes",
    "aten.chunk.default",
    "aten.tensor_split.sections",
)
def split_parts(s: Splitter, app: Application) -> list[Form] | None:
    """Ranges of a dim of parts."""
    x = app.form("self")
    dim = app["dim"] % max(x.ndim, 1)
    if isinstance(x, Whole) or not is_static(x.shape[dim]):
        return None
    total = x.shape[dim]
    name = str(app.target)
    if name == "aten.tensor_split.sections":
        each, more = divmod(total, app["sections"])
        size: Any = [each + (i < more) for i in range(app["sections"])]
    elif name == "aten.chunk.default":
        size = math.ceil(total / app["chunks"])
    else:
        size = app.named.get("split_size", app.named.get("split_sizes"))
    sizes = size if isinstance(size, list) else [size] * (total // size) + [total % size] * bool(total % size)
    ends = running(sizes)
    return [pick_form(s, x, dim, range(end - n, end)) for n, end in zip(sizes, ends)]


@handles("aten.expand.default")
def expand(s: Splitter, app: Application) -> Form | None:
    """An expand is not carried out: what reads it may do with one copy."""
    x = app.form("self")
    sizes = [v.meta["val"] if isinstance(v, Node) else v for v in app["size"]]
    while x.ndim < len(sizes):
        x = s.op(aten.unsqueeze.default, x, 0)
    shape = tuple(have if is_static(want) and want == -1 else want for want, have in zip(sizes, x.shape))
    if same_shape(shape, x.shape):
        return x
    grown = [d for d in range(len(shape)) if not same_size(shape[d], x.shape[d])]
    if any(not is_static(shape[d]) for d in grown):
        return None
    return Expanded(x.form, shape) if isinstance(x, Expanded) else Expanded(x, shape)


@handles("aten.expand_as.default")
def expand_as(s: Splitter, app: Application) -> Form | None:
    """As `expand`, to the shape of another value."""
    x, shape = app.form("self"), app.form("other").shape
    if x.ndim != len(shape):
        return None
    grown = [d for d in range(len(shape)) if not same_size(shape[d], x.shape[d])]
    if any(not is_static(shape[d]) for d in grown):
        return None
    return Expanded(x.form if isinstance(x, Expanded) else x, shape) if grown else x
