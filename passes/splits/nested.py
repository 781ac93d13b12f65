"""Reshapes whose cuts fall inside of a dim: entries on one side of a cut are one part, the entry it goes through is
cut again along the next dim.

[B, 10, 20] cut at 6  ->  view [B, 2, 10, 10]  =  cat[x[:, :5], cat[x[:, 5:6], x[:, 6:]] along dim 2] along dim 1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from passes.forms import Blocks, Form, Whole, is_mixed, is_static, same_shape
from passes.split import Splitter
from passes.splits.blocks import pick_form, running
from passes.splits.scaled import runs_of

_MANY = 3  # runs of one side: more are as many pieces, each of them small


def nested(s: Splitter, x: Blocks, shape: tuple[Any, ...]) -> Blocks | None:
    """`x` in another shape, of the same dims before its cut; None where a part of it would be a single row's."""
    lead, sizes = x.shape[: x.dim], shape[x.dim :]
    inner = x.shape[x.dim :]
    if not same_shape(shape[: x.dim], lead) or not all(is_static(n) for n in (*sizes, *inner)) or not is_mixed(x):
        return None
    if math.prod(sizes) != math.prod(inner):
        return None
    runs = [Whole(node) for node, _ in runs_of(s, x)]
    if not 1 < len(runs) <= _MANY:
        return None
    each = math.prod(inner[1:])
    ends = [end * each for end in running([int(r.shape[x.dim]) for r in runs])]
    flat = [_flat(s, run, x.dim) for run in runs]
    made = _cut(s, flat, ends, 0, lead, sizes)
    return made if isinstance(made, Blocks) else None


def _flat(s: Splitter, form: Form, dim: int) -> Form:
    from passes.splits.views import reshaped

    return reshaped(s, form, (*form.shape[:dim], math.prod(form.shape[dim:])))


def _cut(
    s: Splitter, flat: Sequence[Form], ends: Sequence[int], start: int, lead: tuple[Any, ...], sizes: tuple[int, ...]
) -> Form:
    """Entries from `start` on, as many as `sizes` hold, of flat parts that end at `ends`, as [*lead, *sizes]."""
    from passes.splits.views import reshaped

    each, parts, at = math.prod(sizes[1:]), list[Form](), 0
    while at < sizes[0]:
        first = start + at * each
        owner = next(i for i, end in enumerate(ends) if end > first)
        count = min((ends[owner] - first) // each, sizes[0] - at)
        if count:
            begin = first - (ends[owner - 1] if owner else 0)
            picked = pick_form(s, flat[owner], flat[owner].ndim - 1, range(begin, begin + count * each))
            parts.append(reshaped(s, picked, (*lead, count, *sizes[1:])))
        else:
            parts.append(_cut(s, flat, ends, first, (*lead, 1), sizes[1:]))
        at += count or 1
    return parts[0] if len(parts) == 1 else Blocks(len(lead), tuple(parts))
