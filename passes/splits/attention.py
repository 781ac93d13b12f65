"""Attention over history and target.

    softmax(q [k_h, k_t]' + mask) [v_h, v_t]
      rows of the history, target banned    =  softmax(q_h k_h' + mask_hh) v_h          per request
      rows of the target                    =  two groups of scores, one softmax, two weighted sums

Which keys a query may see is read from the mask: see `splits.masks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from passes.forms import (
    Blocks,
    Form,
    Whole,
    dtype_of,
    hint,
    is_static,
    provenance,
    same_size,
)
from passes.split import Application, Splitter, handles
from passes.splits.blocks import cut_form
from passes.splits.masks import LOW, known, ranged
from passes.splits.scores import note
from roo_rewrite.facts import Provenance

aten = torch.ops.aten


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
    may, some = _visible(s, mask, q, k)
    if not some:
        return None
    parts, start, moved = [], 0, 0
    plan = []
    for size in sizes:
        rows = (start, start + size)
        seen = _seen(may, rows, k.sizes)
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


def _visible(s: Splitter, mask: Any, q: Form, k: Form) -> tuple[Tensor, bool]:
    """Where a query may see a key, [..., Lq, Lk]; and whether none is known to be blind.

    Where what is banned is low, but not minus infinity, each must be known to see one: else the banned count after all.
    """
    sizes = hint(q.shape[-2]), hint(k.shape[-2])
    if mask is None or isinstance(mask, Form):
        found = None if mask is None else ranged(s, mask)
        if found is None:
            return torch.ones(sizes, dtype=torch.bool), True
        low, high = (f.expand(*f.shape[:-2], *sizes) for f in found)
        truth = isinstance(mask, Form) and dtype_of(mask) == torch.bool
        may = high == 1 if truth else high > LOW
        weightless = truth or bool((high[~may] == float("-inf")).all())
        return may, bool((may if weightless else low > LOW).any(-1).all())
    may = mask if mask.dtype == torch.bool else mask > LOW
    return may, bool(may.any(-1).all())


def _seen(may: Tensor, rows: tuple[int, int], sizes: Sequence[int]) -> list[int] | None:
    """Key blocks that some of the query rows may see; None where there is none."""
    out, start = [], 0
    for j, size in enumerate(sizes):
        if bool(may[..., rows[0] : rows[1], start : start + size].any()):
            out.append(j)
        start += size
    return out or None


def _pays(s: Splitter, q: Form, k: Blocks, plan: Sequence[tuple[Form, tuple[int, int], list[int]]]) -> bool:
    price, width = s.price, hint(q.shape[-1])
    scores = (*q.shape[:-1], k.shape[-2])
    before = 2 * price.product(scores, width, Provenance.IMPRESSION) + 2 * price.move(k.shape)
    after = price.start(6)
    for part, rows, seen in plan:
        side = max([provenance(part), *(provenance(k.parts[j]) for j in seen)])
        keys = sum(k.sizes[j] for j in seen)
        after += 2 * price.product((*q.shape[:-2], rows[1] - rows[0], keys), width, side)
    return s.take(f"attention: {len(plan)} query blocks, {len(k.parts)} key blocks", before, after)


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
