"""Reshapes of parts: a cut dim that is kept, merged or unmerged where the cut falls on a boundary stays cut.

[B, F*D] cut at 3*D   -> view [B, F, D]   cut at 3
[B, F, D] cut at 3    -> flatten [B, F*D] cut at 3*D
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from passes.forms import (
    Blocks,
    Expanded,
    Form,
    Lazy,
    Picked,
    Reshaped,
    Sum,
    Whole,
    hint,
    is_static,
    same_size,
    with_size,
)
from passes.split import Application, Splitter, handles
from passes.splits.blocks import pick_form
from passes.splits.joins import constant_value
from passes.splits.nested import nested
from passes.splits.reshaped import kept_apart, later_view
from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Rows
from roo_rewrite.rules import families
from roo_rewrite.rules.registry import Operand

aten = torch.ops.aten


VIEWS = ("aten.view.default", "aten.reshape.default", "aten.flatten.using_ints", "aten.unflatten.int")


@handles("aten.view.default", "aten.reshape.default")
def reshape(s: Splitter, app: Application) -> Form | None:
    """A reshape of parts or of an expanded value."""
    x = app.form("self")
    if isinstance(x, Whole):
        return None
    sizes = [
        v.meta["val"] if isinstance(v, Node) else v for v in (app["size"] if "size" in app.named else app["shape"])
    ]
    return _kept(s, x, _filled_in(x.shape, sizes))


@handles("aten.reshape_as.default", "aten.view_as.default")
def reshape_as(s: Splitter, app: Application) -> Form | None:
    """A reshape to the shape of another value."""
    x = app.form("self")
    return None if isinstance(x, Whole) else _kept(s, x, app.form("other").shape)


@handles("aten.flatten.using_ints")
def flatten(s: Splitter, app: Application) -> Form | None:
    """Dims merged into one."""
    x = app.form("self")
    first, last = app["start_dim"] % max(x.ndim, 1), app["end_dim"] % max(x.ndim, 1)
    if isinstance(x, Whole) or x.ndim == 0:
        return None
    merged = _product(x.shape[first : last + 1])
    return _kept(s, x, (*x.shape[:first], merged, *x.shape[last + 1 :]))


def _kept(s: Splitter, x: Form, shape: tuple[Any, ...]) -> Form | None:
    """A reshape, not carried out where it merges the batch with dims that are cut or expanded."""
    return rows_kept_apart(s, x, shape) or to_shape(s, x, shape)


def rows_kept_apart(s: Splitter, x: Form, shape: tuple[Any, ...]) -> Form | None:
    """A later view of `x`, regrouped behind the cut dim where rows are made of more; None where cuts do not last."""
    if isinstance(x, Blocks) and shape and not is_static(shape[0]):
        lead = x.shape[: x.dim + 1]
        left = shape[0] // _product(lead)
        left = int(left) if not is_static(left) and left.node.expr.is_Integer else left
        if same_size(_product([*lead, left]), shape[0]):
            between = [] if is_static(left) and left == 1 else [left]
            x = to_shape(s, x, (*lead, *between, *shape[1:])) or x
    many = hint(shape[0]) // max(hint(x.shape[0]), 1) if shape and x.ndim and not is_static(shape[0]) else 0
    if isinstance(x, Blocks) and many > 1 and not kept_apart(x, shape) and same_size(x.shape[0] * many, shape[0]):
        x = to_shape(s, x, (x.shape[0], many, *shape[1:])) or x
    return later_view(s, x, shape) if kept_apart(x, shape) else None


@handles("aten.unflatten.int")
def unflatten(s: Splitter, app: Application) -> Form | None:
    """A dim taken apart."""
    x = app.form("self")
    if isinstance(x, Whole):
        return None
    dim = app["dim"] % x.ndim
    sizes = [v.meta["val"] if isinstance(v, Node) else v for v in app["sizes"]]
    inner = _filled_in((x.shape[dim],), sizes)
    return to_shape(s, x, (*x.shape[:dim], *inner, *x.shape[dim + 1 :]))


def _product(sizes: Sequence[Any]) -> Any:
    """A product that stays a plain int where every factor is one."""
    out: Any = 1
    for size in sizes:
        out = size if is_static(out) and out == 1 else out if is_static(size) and size == 1 else out * size
    return out


def _filled_in(before: Sequence[Any], sizes: Sequence[Any]) -> tuple[Any, ...]:
    """`sizes` with its -1 worked out."""
    if -1 not in [v for v in sizes if is_static(v)]:
        return tuple(sizes)
    rest = _product([v for v in sizes if not (is_static(v) and v == -1)])
    missing = _product(before) // rest  # a batch size on both sides cancels
    if isinstance(missing, torch.SymInt) and missing.node.expr.is_Integer:
        missing = int(missing)
    return tuple(missing if is_static(v) and v == -1 else v for v in sizes)


def to_shape(s: Splitter, x: Form, shape: tuple[Any, ...]) -> Form | None:
    """A row-major reshape of a form; None where a cut does not fall on a boundary."""
    if len(shape) == x.ndim and all(same_size(a, b) for a, b in zip(shape, x.shape)):
        return x
    if isinstance(x, Blocks):
        return _blocks(s, x, shape)
    if isinstance(x, Expanded):
        return _expanded(s, x, shape)
    if isinstance(x, Reshaped):
        return rows_kept_apart(s, x.inner, shape) or to_shape(s, x.inner, shape)
    if isinstance(x, Lazy):
        inner = to_shape(s, x.inner, shape)
        if inner is None:
            return None
        return Lazy(inner, lambda: s.builder.call(aten.reshape.default, x.carry(), s.builder.sizes(shape)))
    if isinstance(x, Sum):
        terms = [(c, _same_layout(s, x, t, shape)) for c, t in x.terms]
        return None if any(t is None for _, t in terms) else Sum(tuple(terms), shape)  # type: ignore[arg-type]
    return Whole(s.builder.call(aten.reshape.default, s.builder.whole(x), s.builder.sizes(shape)))


def reshaped(s: Splitter, x: Form, shape: tuple[Any, ...]) -> Form:
    """A row-major reshape of a form, carried out where a cut does not fall on a boundary."""
    made = to_shape(s, x, shape)
    return made or Whole(s.builder.call(aten.reshape.default, s.builder.whole(x), s.builder.sizes(shape)))


def _same_layout(s: Splitter, x: Sum, term: Form, shape: tuple[Any, ...]) -> Form | None:
    full = len(term.shape) == x.ndim and all(same_size(a, b) for a, b in zip(term.shape, x.shape))
    return to_shape(s, term, shape) if full else None


def _blocks(s: Splitter, x: Blocks, shape: tuple[Any, ...]) -> Form | None:
    """Cut positions are multiples of `unit`; the dim is a batch of units, and goes where that batch goes."""
    merged = _merged_dims(x.shape, shape)
    if merged is not None and any(isinstance(p, Blocks) for p in x.parts):
        return merge_cells(s, x, *merged)
    unit = math.gcd(*x.sizes)
    place = _place(x.shape, x.dim, unit, shape)
    if place is None:
        return nested(s, x, shape) if merged is None else merge_cells(s, x, *merged)
    parts = []
    for part, size in zip(x.parts, x.sizes):
        mine = with_size(shape, place.dim, size // unit * place.inner)
        made = _picked(s, part, x, shape) or to_shape(s, part, mine)
        if made is None:
            return None
        parts.append(made)
    return Blocks(place.dim, tuple(parts))


def _picked(s: Splitter, part: Form, x: Blocks, shape: tuple[Any, ...]) -> Form | None:
    """Entries along the cut dim of a tensor that has more of them: it is reshaped once for all of its parts."""
    place = _place(x.shape, x.dim, 1, shape) if isinstance(part, Picked) and part.dim == x.dim else None
    if place is None or not isinstance(part, Picked):
        return None
    inner, entries = place.inner, hint(part.base.shape[x.dim])
    base = to_shape(s, part.base, with_size(shape, place.dim, entries * inner))
    index = tuple(i * inner + j for i in part.index for j in range(inner))
    return Picked(base, place.dim, index) if isinstance(base, Whole) else None


def merge_cells(s: Splitter, x: Blocks, first: int, last: int) -> Blocks | None:
    """Dims first..last merged into one, with cuts along several of them: each entry is found in its cell.

    A cell is a box that lies in one part along every cut dim; flattened, its entries are picked in order.
    """
    sizes = x.shape[first : last + 1]
    if any(not is_static(n) for n in sizes):
        return None
    owner = torch.full(sizes, -1)
    place = torch.full(sizes, -1)
    cells: list[Whole] = []
    for corner, form in cells_of(x, [0] * x.ndim):
        box = tuple(slice(corner[d], corner[d] + int(form.shape[d])) for d in range(first, last + 1))
        if any(corner[d] or not same_size(form.shape[d], x.shape[d]) for d in range(x.ndim) if not first <= d <= last):
            return None
        inner = form.shape[first : last + 1]
        shape = (*form.shape[:first], math.prod(inner), *form.shape[last + 1 :])
        flat = s.builder.call(aten.reshape.default, s.builder.whole(form), s.builder.sizes(shape))
        owner[box] = len(cells)
        place[box] = torch.arange(math.prod(inner)).view(inner)
        cells.append(Whole(flat))
    parts: list[tuple[int, list[int]]] = []
    for cell, at in zip(owner.flatten().tolist(), place.flatten().tolist()):
        if parts and parts[-1][0] == cell:
            parts[-1][1].append(at)
        else:
            parts.append((cell, [at]))
    return Blocks(first, tuple(Picked(cells[cell], first, tuple(index)) for cell, index in parts))


def cells_of(form: Form, corner: list[int]) -> Iterator[tuple[list[int], Form]]:
    """The uncut boxes of nested blocks, each with the corner it begins at."""
    if not isinstance(form, Blocks):
        yield corner, form
        return
    start = corner[form.dim]
    for part, size in zip(form.parts, form.sizes):
        yield from cells_of(part, [*corner[: form.dim], start, *corner[form.dim + 1 :]])
        start += size


def _merged_dims(before: Sequence[Any], after: Sequence[Any]) -> tuple[int, int] | None:
    """The run of dims that `after` has as one, if that is all that differs."""
    gone = len(before) - len(after)
    for first in range(len(after)):
        last = first + gone
        same = [*zip(before[:first], after[:first]), *zip(before[last + 1 :], after[first + 1 :])]
        if gone > 0 and is_static(after[first]) and all(same_size(a, b) for a, b in same):
            sizes = before[first : last + 1]
            if all(is_static(n) for n in sizes) and math.prod(sizes) == after[first]:
                return first, last
    return None


@handles("aten.index.Tensor")
def index(s: Splitter, app: Application) -> Form | None:
    """Constant index vectors of adjacent dims: the dims are merged, and entries picked."""
    x, indices = app.form("self"), app["indices"]
    dims = [d for d, v in enumerate(indices) if v is not None]
    if not isinstance(x, Blocks) or not dims or dims != list(range(dims[0], dims[-1] + 1)):
        return None
    vectors = [constant_value(s, v) if isinstance(v, Form) else None for v in indices[dims[0] : dims[-1] + 1]]
    sizes = x.shape[dims[0] : dims[-1] + 1]
    if any(v is None for v in vectors) or any(not is_static(n) for n in sizes):
        return None
    if len({len(v or ()) for v in vectors}) > 1:  # one broadcasts
        return None
    flat = [0] * len(vectors[0] or ())
    for vector, size in zip(vectors, sizes):
        flat = [f * size + v % size for f, v in zip(flat, vector or ())]
    merged: Form | None = x if len(dims) == 1 else merge_cells(s, x, dims[0], dims[-1])
    return None if merged is None else pick_form(s, merged, dims[0], flat)


def _place(before: Sequence[Any], dim: int, unit: int, after: Sequence[Any]) -> Rows | None:
    total = hint(before[dim])
    operand = Operand(tuple(hint(v) for v in before), Rows(dim, 1, unit))
    try:
        place = families.reshaped(operand, [hint(v) for v in after], total // unit)
    except NotRowWise:
        return None
    if not isinstance(place, Rows) or place.outer != 1 or not is_static(after[place.dim]):
        return None
    return place


def _expanded(s: Splitter, x: Expanded, shape: tuple[Any, ...]) -> Form | None:
    """An expanded dim that survives as a dim of its own stays expanded; merged with another it is carried out."""
    inner_shape = shape
    for dim in range(x.ndim):
        if same_size(x.shape[dim], x.form.shape[dim]):
            continue
        if not is_static(x.shape[dim]):
            return None
        place = _place(x.shape, dim, 1, shape)
        if place is None or place.inner != 1:
            return Whole(s.builder.call(aten.reshape.default, s.builder.whole(x), s.builder.sizes(shape)))
        inner_shape = with_size(inner_shape, place.dim, 1)
    inner = to_shape(s, x.form, inner_shape)
    return None if inner is None else Expanded(inner, shape)
