"""Attention over history and target.

    softmax(q [k_h, k_t]' + mask) [v_h, v_t]
      rows of the history, target banned    =  softmax(q_h k_h' + mask_hh) v_h          per request
      rows of the target                    =  two groups of scores, one softmax, two weighted sums

A mask is recognised from its values: a region is banned where every entry of it is known at compile time
to be False, or minus infinity, or so low that the softmax is exactly 0. In the latter case every row must
be known to see something, else the banned entries count after all.
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
    Blocks,
    Deferred,
    Filled,
    Form,
    Picked,
    Whole,
    dtype_of,
    hint,
    is_static,
    provenance,
    same_shape,
    same_size,
)
from passes.split import Application, Splitter, handles
from passes.split_blocks import broadcast, cut_form
from passes.split_scores import note, note_scores
from roo_rewrite.facts import Provenance

aten = torch.ops.aten
# exp(x - max) is 0 in every float type once x is this far below; scores of a working model are not.
LOW = -1e8


def known(s: Splitter, form: Any) -> Tensor | None:
    """The value of a form known at compile time."""
    if isinstance(form, Picked):
        base = evaluate(s.captured, form.base.node)
        return None if base is None else base.index_select(form.dim, torch.tensor(form.index))
    return evaluate(s.captured, form.node) if isinstance(form, Whole) else None


@handles("aten.masked_fill.Scalar")
def masked_fill(s: Splitter, app: Application) -> Form | None:
    """Where the mask is known to be all True the value is a constant; all False, nothing happens."""
    x, mask, value = app.form("self"), app.form("mask"), app["value"]
    found = known(s, mask)
    grows = not same_shape(broadcast([x.shape, mask.shape]), x.shape)
    if found is None or not isinstance(value, (int, float)) or grows:
        return None
    if bool(found.all()) and found.numel() and not isinstance(x, Blocks):
        return Filled(float(value), x.shape, next(iter(_nodes(x))))
    return x if not bool(found.any()) else None


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
    found = [_lowered(s, s.builder.whole(p), torch.zeros(1, dtype=torch.bool)) for p in parts]
    blind = torch.tensor(True)
    for banned, _ in found:
        blind = blind & banned.all(-1)
    if bool(blind.any()):
        return False
    return True if any(known and bool((~banned).any(-1).all()) for banned, known in found) else None


_SCALES = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
_SCORES = (aten.bmm.default, aten.matmul.default, aten.einsum.default, aten.mm.default)


def _lowered(s: Splitter, node: Node, banned: Tensor) -> tuple[Tensor, bool]:
    """What constant masks lower of scores, and whether nothing else does.

    banned: what the masks between here and the softmax lower; together they may leave less than each alone.
    """
    if node.target in _SCORES:
        return banned, True
    if node.target in _SCALES:
        source, factor = node.args[:2]
        number = isinstance(factor, (int, float)) or (isinstance(factor, Node) and _scalar(factor))
        return _lowered(s, source, banned) if number and isinstance(source, Node) else (banned, False)
    if node.target is aten.masked_fill.Scalar:
        mask = evaluate(s.captured, node.args[1])  # type: ignore[arg-type]
        return (banned, False) if mask is None else _lowered(s, node.args[0], banned | mask)  # type: ignore[arg-type]
    if node.target is aten.add.Tensor and len(node.args) == 2:
        bias = evaluate(s.captured, node.args[1]) if isinstance(node.args[1], Node) else None
        return (banned, False) if bias is None else _lowered(s, node.args[0], banned | (bias <= LOW))  # type: ignore[arg-type]
    return banned, False


def _scalar(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 0


@dataclass(frozen=True, eq=False)
class Banned(Deferred):
    """Scores plus a mask that no softmax lets through, not carried out; none of them is above `value`."""

    s: Splitter
    inner: Form
    app: Application
    value: float

    def carry(self) -> Node:
        args, kwargs = self.app.arguments(self.s.carry_out)
        return self.s.builder.call(self.app.target, *args, **kwargs)

    @property
    def shape(self) -> tuple[Any, ...]:  # type: ignore[override]
        return self.inner.shape


def added_mask(s: Splitter, app: Application) -> Form | None:
    """Scores plus a mask known to ban all of them."""
    x, mask = app.form("self"), app.form("other")
    if app["alpha"] != 1 or not same_shape(broadcast([x.shape, mask.shape]), x.shape):
        return None
    found = known(s, mask)
    if found is None or not found.is_floating_point() or not found.numel() or isinstance(x, (Blocks, Filled, Banned)):
        return None
    highest = float(found.max())
    return Banned(s, x, app, highest) if highest <= LOW else None


# -- the fused op


@handles("aten.scaled_dot_product_attention.default")
def attention(s: Splitter, app: Application) -> Form | None:
    """Query blocks each attend to the key blocks they can see."""
    q, k, v = app.form("query"), app.form("key"), app.form("value")
    seq = k.ndim - 2
    cut = isinstance(k, Blocks) and isinstance(v, Blocks) and k.dim == v.dim == seq and k.sizes == v.sizes
    if not cut or app["dropout_p"] or app["enable_gqa"] or q.ndim != k.ndim:
        return None
    assert isinstance(k, Blocks)
    assert isinstance(v, Blocks)
    if any(not same_size(a, b) for a, b in zip(q.shape[:-2], k.shape[:-2])):
        return None
    sizes = q.sizes if isinstance(q, Blocks) and q.dim == seq else [hint(q.shape[seq])]
    if not is_static(q.shape[seq]):
        return None
    mask = _mask_of(s, app, q, k)
    if mask is _UNKNOWN:
        return None
    parts, start, moved = [], 0, 0
    plan = []
    for size in sizes:
        rows = (start, start + size)
        seen = _seen(s, mask, rows, k.sizes)
        if seen is None:
            return None
        plan.append((cut_form(s, q, seq, *rows), rows, seen))
        moved += sum(provenance(k.parts[j]) is not Provenance.IMPRESSION for j in seen)
        start += size
    _note_blind(s, [(provenance(part), rows) for part, rows, _ in plan], k, mask)
    if not moved or not _pays(s, q, k, plan):
        return None
    for part, rows, seen in plan:
        parts.append(_rows(s, app, part, k, v, seen, mask, rows))
    return parts[0] if len(parts) == 1 else Blocks(seq, tuple(parts))


def _note_blind(s: Splitter, queries: Sequence[tuple[Provenance, tuple[int, int]]], k: Blocks, mask: Any) -> None:
    """Notes what the rows of the request would still see if they did not see the impression."""
    visible = torch.ones(queries[-1][1][1], sum(k.sizes), dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        visible = mask.clone() if mask.dtype == torch.bool else mask > LOW
    forbidden = torch.zeros_like(visible)
    for side, rows in queries:
        start = 0
        for part, size in zip(k.parts, k.sizes):
            apart = side is not Provenance.IMPRESSION and provenance(part) is Provenance.IMPRESSION
            forbidden[rows[0] : rows[1], start : start + size] = apart
            start += size
    note(s, visible, forbidden)


_UNKNOWN = object()


def _mask_of(s: Splitter, app: Application, q: Form, k: Form) -> Any:
    """None, a known tensor [..., Lq, Lk], or a Form known only at run time."""
    mask = app["attn_mask"]
    if app["is_causal"]:
        return torch.ones(hint(q.shape[-2]), hint(k.shape[-2]), dtype=torch.bool).tril() if mask is None else _UNKNOWN
    if mask is None:
        return None
    found = known(s, mask)
    if found is not None:
        return found.expand(*found.shape[:-2], q.shape[-2], k.shape[-2]) if found.ndim >= 2 else _UNKNOWN
    return mask if isinstance(mask, Form) and mask.ndim >= 2 else _UNKNOWN


def _seen(s: Splitter, mask: Any, rows: tuple[int, int], sizes: Sequence[int]) -> list[int] | None:
    """Key blocks the query rows can see. None where some row may see nothing."""
    if not isinstance(mask, Tensor):
        return list(range(len(sizes)))
    visible = mask if mask.dtype == torch.bool else mask > LOW
    mine = visible[..., rows[0] : rows[1], :]
    if not bool(mine.any(-1).all()):
        return None
    out, start = [], 0
    for j, size in enumerate(sizes):
        if bool(mine[..., start : start + size].any()):
            out.append(j)
        start += size
    return out


def _pays(s: Splitter, q: Form, k: Blocks, plan: Sequence[tuple[Form, tuple[int, int], list[int]]]) -> bool:
    price, width = s.price, hint(q.shape[-1])
    scores = (*q.shape[:-1], k.shape[-2])
    before = 2 * price.product(scores, width, Provenance.IMPRESSION) + 2 * price.move(k.shape)
    after = price.start(6)
    for part, rows, seen in plan:
        side = max([provenance(part), *(provenance(k.parts[j]) for j in seen)])
        keys = sum(k.sizes[j] for j in seen)
        after += 2 * price.product((*q.shape[:-2], rows[1] - rows[0], keys), width, side)
    where = s.builder.origin.name if s.builder.origin is not None else ""
    return price.take(f"attention: {len(plan)} query blocks, {len(k.parts)} key blocks", before, after, where)


def _rows(
    s: Splitter, app: Application, q: Form, k: Blocks, v: Blocks, seen: list[int], mask: Any, rows: tuple[int, int]
) -> Form:
    """Attention of some query rows to the key blocks they see."""
    groups: list[list[int]] = []
    for early in (True, False):
        mine = [j for j in seen if (provenance(k.parts[j]) is not Provenance.IMPRESSION) == early]
        groups += [mine] if mine else []
    columns = {j: (sum(k.sizes[:j]), sum(k.sizes[: j + 1])) for j in seen}
    order = [j for group in groups for j in group]
    bias = _cut_mask(s, mask, rows, [columns[j] for j in order])
    keys = [_side_by_side(s, [k.parts[j] for j in g], k.dim) for g in groups]
    values = [_side_by_side(s, [v.parts[j] for j in g], v.dim) for g in groups]
    if len(groups) == 1:
        whole = app.replaced(query=q, key=keys[0], value=values[0], attn_mask=bias, is_causal=False)
        return s.plain(whole)
    return _two_groups(s, app, q, keys, values, bias)


def _side_by_side(s: Splitter, forms: Sequence[Form], dim: int) -> Form:
    return Whole(s.builder.cat([s.builder.whole(f) for f in forms], dim))


def _cut_mask(s: Splitter, mask: Any, rows: tuple[int, int], columns: Sequence[tuple[int, int]]) -> Form | None:
    """The mask of these rows and columns; None where it lets everything through."""
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        cut = torch.cat([mask[..., rows[0] : rows[1], a:b] for a, b in columns], -1)
        everything = bool(cut.all()) if cut.dtype == torch.bool else not bool(cut.any())
        return None if everything else Whole(s.builder.literal(cut))
    last = mask.ndim - 1
    if hint(mask.shape[last - 1]) > 1:
        mask = cut_form(s, mask, last - 1, *rows)
    if hint(mask.shape[last]) == 1:
        return mask  # type: ignore[no-any-return]
    return _side_by_side(s, [cut_form(s, mask, last, a, b) for a, b in columns], last)


def _two_groups(
    s: Splitter, app: Application, q: Form, keys: Sequence[Form], values: Sequence[Form], mask: Form | None
) -> Form:
    """Scores of each group, one softmax, a weighted sum of each group."""
    b = s.builder
    scale = app["scale"] if app["scale"] is not None else float(hint(q.shape[-1])) ** -0.5
    scaled = b.call(aten.mul.Tensor, b.whole(q), scale)
    scores = [b.call(aten.matmul.default, scaled, b.call(aten.transpose.int, b.whole(k), -2, -1)) for k in keys]
    joined = b.cat(scores, q.ndim - 1)
    if mask is not None:
        node = b.whole(mask)
        if dtype_of(mask) == torch.bool:
            joined = b.call(aten.masked_fill.Scalar, joined, b.call(aten.logical_not.default, node), float("-inf"))
        else:
            joined = b.call(aten.add.Tensor, joined, node)
    # A row that may see nothing gets 0, as in the fused op.
    weights = b.call(aten.softmax.int if mask is None else aten._safe_softmax.default, joined, -1)
    total: Node | None = None
    start = 0
    for value in values:
        size = hint(value.shape[-2])
        part = b.call(aten.matmul.default, b.pick(weights, q.ndim - 1, range(start, start + size)), b.whole(value))
        total = part if total is None else b.call(aten.add.Tensor, total, part)
        start += size
    assert total is not None
    return Whole(total)
