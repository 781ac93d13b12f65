"""Products of an impression-level and a request-level tensor, the latter never copied per impression.

    jagged_einsum("bqd,bkd->bqk", q, K)  =  einsum("bqd,bkd->bqk", q, E K)      q: I rows, K: R rows

Impressions are laid out in a block per request: a plain view where requests are even, else padded, in
buckets of similar size so that padding never more than doubles the work. On the design machine a padded
product was 100x faster than one on gathered keys (`tools/bench/ops.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bucket:
    """Requests of similar size: their numbers (None: all), the width they are padded to, where each slot is
    read from, and which slots are real."""

    requests: Tensor | None
    width: int
    gather: Tensor
    keep: Tensor


@dataclass(frozen=True)
class Layout:
    """How the impressions of a batch lie: `rows` is the request of each. even: the count all requests share."""

    rows: Tensor
    even: int | None = None
    buckets: tuple[Bucket, ...] = ()
    order: Tensor | None = None


def jagged_layout(num_impressions: Tensor, rows: Tensor) -> Layout:
    """The layout of counts `[R]`, whose impressions belong to requests `rows [I]` (sorted).

    While compiling or exporting, where counts are not known, it is the plain gather.
    """
    if torch.compiler.is_compiling() or not num_impressions.numel() or not rows.shape[0]:
        return Layout(rows)
    total, requests, width = rows.shape[0], num_impressions.shape[0], int(num_impressions.max())
    if width * requests == total:
        return Layout(rows, even=width)
    if requests * width <= 2 * total:
        return Layout(rows, buckets=(_bucket(num_impressions, None, total),))
    bits = torch.frexp(num_impressions.to(torch.float64)).exponent
    taken = num_impressions > 0
    members = [((bits == b) & taken).nonzero().flatten() for b in torch.unique(bits[taken]).tolist()]
    buckets = tuple(_bucket(num_impressions, m, total) for m in members)
    order = torch.argsort(torch.cat([b.gather.index_select(0, b.keep) for b in buckets]))
    return Layout(rows, buckets=buckets, order=order)


def _bucket(counts: Tensor, requests: Tensor | None, total: int) -> Bucket:
    starts = counts.cumsum(0) - counts
    if requests is not None:
        starts, counts = starts.index_select(0, requests), counts.index_select(0, requests)
    width = int(counts.max())
    slot = torch.arange(width, device=counts.device)
    real = (slot < counts.unsqueeze(1)).flatten()
    gather = (starts.unsqueeze(1) + slot).clamp_(max=total - 1).flatten()
    return Bucket(requests, width, gather, real.nonzero().flatten())


def jagged_einsum(equation: str, x: Tensor, y: Tensor, layout: Layout) -> Tensor:
    """`einsum(equation, x, E y)`: the first letter of both operands and of the result is the batch.

    x: I rows; y: R rows; result: I rows. Differentiable in both.
    """
    left, out = equation.split("->")
    first, second = left.split(",")
    if layout.even is None and not layout.buckets:
        return torch.einsum(equation, x, y.index_select(0, layout.rows))
    # Z is the place of an impression within its request.
    padded = f"{first[0]}Z{first[1:]},{second}->{out[0]}Z{out[1:]}"
    if layout.even is not None:
        blocks = x.reshape(-1, layout.even, *x.shape[1:])
        return torch.einsum(padded, blocks, y).flatten(0, 1)
    parts = []
    for bucket in layout.buckets:
        right = y if bucket.requests is None else y.index_select(0, bucket.requests)
        blocks = x.index_select(0, bucket.gather).reshape(-1, bucket.width, *x.shape[1:])
        parts.append(torch.einsum(padded, blocks, right).flatten(0, 1).index_select(0, bucket.keep))
    return parts[0] if layout.order is None else torch.cat(parts).index_select(0, layout.order)
