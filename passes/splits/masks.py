"""Masks of attention scores.

A mask is recognised from its values, whatever else goes into it (see `ranges`): a region is banned where no entry
of it can be anything but False, or minus infinity, or so low that the softmax is exactly 0. In the latter case every
row must be known to see something, else the banned entries count after all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from passes.constants import evaluate
from passes.forms import (
    Alike,
    Blocks,
    Expanded,
    Filled,
    Form,
    Picked,
    Sum,
    Whole,
    dtype_of,
    hint,
    is_static,
    same_shape,
)
from passes.ranges import Range, bounds
from passes.split import Application, Splitter, handles
from passes.splits.blocks import broadcast, cut_form
from passes.splits.scores import note_scores

aten = torch.ops.aten
# exp(x - max) is 0 in every float type once x is this far below; scores of a working model are not.
LOW = -1e8


def known(s: Splitter, form: Any) -> Tensor | None:
    """The value of a form known at compile time."""
    if isinstance(form, Picked):
        base = evaluate(s.captured, form.base.node)
        return None if base is None else base.index_select(form.dim, torch.tensor(form.index))
    return evaluate(s.captured, form.node) if isinstance(form, Whole) else None


def ranged(s: Splitter, form: Any) -> Range | None:
    """What the entries of a form can be; see `ranges`."""
    if isinstance(form, Picked):
        found = bounds(s.captured, form.base.node)
        index = torch.tensor(form.index)
        low, high = (f if f.shape[form.dim] == 1 else f.index_select(form.dim, index) for f in found)
        return low, high
    if isinstance(form, Filled):
        value = torch.full([1] * form.ndim, form.value, dtype=torch.float64)
        return value, value
    if isinstance(form, Expanded):
        return ranged(s, form.form)
    if isinstance(form, (Blocks, Sum)):
        forms = form.parts if isinstance(form, Blocks) else [f for _, f in form.terms]
        ranges = [f for f in (ranged(s, part) for part in forms) if f is not None]
        if len(ranges) == len(forms):
            return _side_by_side(form, ranges) if isinstance(form, Blocks) else _added(form, ranges)
    return bounds(s.captured, form.node) if isinstance(form, Whole) else None


def _side_by_side(form: Blocks, ranges: Sequence[Range]) -> Range | None:
    if not all(is_static(size) for size in form.sizes):
        return None
    low, high = (torch.cat(_widened(form, ends), form.dim) for ends in zip(*ranges))
    return low, high


def _widened(form: Blocks, ends: Sequence[Tensor]) -> list[Tensor]:
    """Each at its size in the dim of the parts, and in the others what any of them has."""
    others = torch.broadcast_tensors(*(t.narrow(form.dim, 0, 1) for t in ends))  # type: ignore[no-untyped-call]
    shape = list(others[0].shape)
    return [t.expand(*shape[: form.dim], hint(n), *shape[form.dim + 1 :]) for t, n in zip(ends, form.sizes)]


def _added(form: Sum, ranges: Sequence[Range]) -> Range | None:
    total = torch.zeros([1] * form.ndim, dtype=torch.float64), torch.zeros([1] * form.ndim, dtype=torch.float64)
    for (factor, _), found in zip(form.terms, ranges):
        low, high = found if factor >= 0 else found[::-1]
        total = total[0] + factor * low, total[1] + factor * high
    return None if any(bool(t.isnan().any()) for t in total) else total


@handles("aten.masked_fill.Scalar")
def masked_fill(s: Splitter, app: Application) -> Form | None:
    """Where the mask is known to be all True the value is a constant; all False, nothing happens.

    What is one low number already is that number, or another, whatever the mask.
    """
    x, mask, value = app.form("self"), app.form("mask"), app["value"]
    grows = not same_shape(broadcast([x.shape, mask.shape]), x.shape)
    if not isinstance(value, (int, float)) or grows:
        return None
    if isinstance(x, (Filled, Banned)):
        return _filled_again(s, app, x, float(value))
    found = ranged(s, mask)
    if found is None:
        return None
    low, high = found
    if bool((low == 1).all()) and low.numel() and not isinstance(x, Blocks):
        return Filled(float(value), x.shape, next(iter(_nodes(x))))
    return x if bool((high == 0).all()) else None


def _filled_again(s: Splitter, app: Application, x: Filled | Banned, value: float) -> Form | None:
    if isinstance(x, Filled) and x.value == value:
        return x
    low = x.value <= LOW and value <= LOW
    return Banned(s, s.plain(app), app, max(x.value, value)) if low else None


def _nodes(form: Form) -> list[Node]:
    from passes.forms import leaves

    return [form.like] if isinstance(form, Filled) else list(leaves(form))


@handles("aten.softmax.int")
def softmax(s: Splitter, app: Application) -> Form | None:
    """Parts that are banned weigh 0, and the others are a softmax by themselves."""
    x = app.form("self")
    if isinstance(x, Blocks) and x.ndim > 2 and app["dim"] % x.ndim == x.ndim - 1:
        note_scores(s, x)
    if not isinstance(x, Blocks) or x.dim != app["dim"] % x.ndim:
        return None
    banned = [isinstance(p, (Filled, Banned)) and p.value <= LOW for p in x.parts]
    rest = [p for p, b in zip(x.parts, banned) if not b]
    if not any(banned) or not rest:
        return None
    lowest = max(p.value for p, b in zip(x.parts, banned) if b and isinstance(p, (Filled, Banned)))
    sees = _every_row_sees(s, rest)
    if sees is False or (lowest > float("-inf") and sees is None):
        return None
    joined = rest[0] if len(rest) == 1 else Blocks(x.dim, tuple(rest))
    weights = s.apply(app.replaced(self=joined))
    parts: list[Form] = []
    start = 0
    for part, is_banned, size in zip(x.parts, banned, x.sizes):
        if is_banned:
            parts.append(Filled(0.0, part.shape, _nodes(part)[0]))
        else:
            parts.append(cut_form(s, weights, x.dim, start, start + size))
            start += size
    return Blocks(x.dim, tuple(parts))


def _every_row_sees(s: Splitter, parts: Sequence[Form]) -> bool | None:
    """Whether each row of the scores has an entry that no mask lowers; None where masks are known at run time only.

    A row without one is not a number or counts what is banned; either way it depends on all entries.
    """
    nothing = torch.zeros(1, dtype=torch.bool)
    found = [_lowered(s, s.builder.whole(p), nothing, nothing) for p in parts]
    blind = torch.tensor(True)
    for banned, _, _ in found:
        blind = blind & banned.all(-1)
    if bool(blind.any()):
        return False
    return True if any(known and bool((~maybe).any(-1).all()) for _, maybe, known in found) else None


_SCALES = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
_SCORES = (aten.bmm.default, aten.matmul.default, aten.einsum.default, aten.mm.default)


def _lowered(s: Splitter, node: Node, banned: Tensor, maybe: Tensor) -> tuple[Tensor, Tensor, bool]:
    """What masks lower of scores for every batch, what they may lower, and whether nothing else does.

    banned, maybe: what the masks between here and the softmax lower; together they may leave less than each alone.
    """
    if node.target in _SCORES:
        return banned, maybe, True
    if node.target in _SCALES:
        source, factor = node.args[:2]
        number = isinstance(factor, (int, float)) or (isinstance(factor, Node) and _scalar(factor))
        if number and isinstance(source, Node):
            return _lowered(s, source, banned, maybe)
    if node.target is aten.masked_fill.Scalar:
        low, high = bounds(s.captured, node.args[1])  # type: ignore[arg-type]
        return _lowered(s, node.args[0], banned | (low == 1), maybe | (high == 1))  # type: ignore[arg-type]
    if node.target is aten.add.Tensor and len(node.args) == 2 and isinstance(node.args[1], Node):
        low, high = bounds(s.captured, node.args[1])
        return _lowered(s, node.args[0], banned | (high <= LOW), maybe | (low <= LOW))  # type: ignore[arg-type]
    return banned, maybe, False


def _scalar(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 0


@dataclass(frozen=True, eq=False)
class Banned(Alike):
    """Scores plus a mask that no softmax lets through, not carried out; none of them is above `value`."""

    s: Splitter
    inner: Form
    app: Application
    value: float

    def carry(self) -> Node:
        args, kwargs = self.app.arguments(self.s.carry_out)
        return self.s.builder.call(self.app.target, *args, **kwargs)


def added_mask(s: Splitter, app: Application) -> Form | None:
    """Scores plus a mask known to ban all of them."""
    x, mask = app.form("self"), app.form("other")
    if app["alpha"] != 1 or not same_shape(broadcast([x.shape, mask.shape]), x.shape):
        return None
    found = ranged(s, mask)
    if found is None or not dtype_of(mask).is_floating_point or isinstance(x, (Blocks, Filled, Banned)):
        return None
    highest = float(found[1].max()) if found[1].numel() else 0.0
    return Banned(s, x, app, highest) if highest <= LOW else None
