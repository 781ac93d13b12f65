"""Products of an impression-level and a request-level tensor, the latter never copied per impression.

    jagged_einsum("bqd,bkd->bqk", q, K)  =  einsum("bqd,bkd->bqk", q, E K)      q: I rows, K: R rows

Impressions are laid out in a block per request: a plain view where requests are even, else padded, in
buckets of similar size so that padding never more than doubles the work. On the design machine a padded
product was 100x faster than one on gathered keys (`tools/bench/ops.py`).
"""

from __future__ import annotations

import math
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


@dataclass
class Layout:
    """How the impressions of a batch lie.

    rows: the request of each. even: the count all requests share. counts: of each request; None: unknown, so that
    the only way is the plain gather.
    """

    rows: Tensor
    even: int | None = None
    counts: Tensor | None = None
    _made: tuple[tuple[Bucket, ...], Tensor | None] | None = None

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Requests of similar size, where they are not even."""
        return self._blocks()[0]

    @property
    def order(self) -> Tensor | None:
        """Where each impression lies in the buckets one after the other; None: in their order."""
        return self._blocks()[1]

    def _blocks(self) -> tuple[tuple[Bucket, ...], Tensor | None]:
        if self._made is None:
            self._made = ((), None) if self.counts is None or self.even is not None else _buckets(self.counts)
        return self._made


def jagged_layout(num_impressions: Tensor, rows: Tensor) -> Layout:
    """The layout of counts `[R]`, whose impressions belong to requests `rows [I]` (sorted).

    While compiling or exporting, where counts are not known, it is the plain gather.
    """
    if torch.compiler.is_compiling() or not num_impressions.numel() or not rows.shape[0]:
        return Layout(rows)
    width = int(num_impressions.max())
    return Layout(rows, width if width * num_impressions.shape[0] == rows.shape[0] else None, num_impressions)


def _buckets(counts: Tensor) -> tuple[tuple[Bucket, ...], Tensor | None]:
    total, requests, width = int(counts.sum()), counts.shape[0], int(counts.max())
    if requests * width <= 2 * total:
        return (_bucket(counts, None, total),), None
    bits = torch.frexp(counts.to(torch.float64)).exponent
    taken = counts > 0
    members = [((bits == b) & taken).nonzero().flatten() for b in torch.unique(bits[taken]).tolist()]
    buckets = tuple(_bucket(counts, m, total) for m in members)
    return buckets, torch.argsort(torch.cat([b.gather.index_select(0, b.keep) for b in buckets]))


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
        return batched_einsum(padded, blocks, y).flatten(0, 1)
    parts = []
    for bucket in layout.buckets:
        right = y if bucket.requests is None else y.index_select(0, bucket.requests)
        blocks = x.index_select(0, bucket.gather).reshape(-1, bucket.width, *x.shape[1:])
        parts.append(batched_einsum(padded, blocks, right).flatten(0, 1).index_select(0, bucket.keep))
    return parts[0] if layout.order is None else torch.cat(parts).index_select(0, layout.order)


def batched_einsum(equation: str, x: Tensor, y: Tensor) -> Tensor:
    """`einsum(equation, x, y)` as one `bmm` whose operands a BLAS can read.

    torch.einsum hands strided views to `bmm`, which then copies and multiplies matrix by matrix: 4x slower.
    """
    left, out = equation.split("->")
    first, second = left.split(",")
    shared = [c for c in first if c in second]
    batch, inner = [c for c in shared if c in out], [c for c in shared if c not in out]
    rows, columns = [c for c in first if c not in second], [c for c in second if c not in first]
    size = {**dict(zip(first, x.shape)), **dict(zip(second, y.shape))}
    equal = all(x.shape[first.index(c)] == y.shape[second.index(c)] for c in shared)
    if not equal or not all(c in out for c in (*rows, *columns)):
        return torch.einsum(equation, x, y)
    made = _product(_matrices(x, first, batch, rows, inner), _matrices(y, second, batch, inner, columns))
    order = [*batch, *rows, *columns]
    return made.reshape([size[c] for c in order]).permute([order.index(c) for c in out])


def _product(x: Tensor, y: Tensor) -> Tensor:
    """`bmm`; with few columns as (y' x')', which the BLAS of a CPU takes 1.2 to 3 times faster."""
    (_, m, k), n = x.shape, y.shape[2]
    if x.is_cuda or not 1 < n <= 10 or m < 16 or m * k * n < 400:
        return torch.bmm(x, y)
    return torch.bmm(y.transpose(1, 2), x.transpose(1, 2)).transpose(1, 2)


def _matrices(x: Tensor, letters: str, batch: list[str], rows: list[str], columns: list[str]) -> Tensor:
    """`[batch, rows, columns]`, copied where it does not lie in memory as matrices, by row or by column."""
    nearest = min(letters, key=lambda c: (x.stride(letters.index(c)), x.shape[letters.index(c)] == 1))
    if nearest in rows:
        return _matrices_by_row(x, letters, batch, columns, rows).transpose(1, 2)
    return _matrices_by_row(x, letters, batch, rows, columns)


def _matrices_by_row(x: Tensor, letters: str, batch: list[str], rows: list[str], columns: list[str]) -> Tensor:
    dims = [letters.index(c) for c in (*batch, *rows, *columns)]
    sizes = [math.prod(x.shape[letters.index(c)] for c in group) for group in (batch, rows, columns)]
    made = x.permute(dims).reshape(sizes)
    return made if made.stride(2) == 1 and made.stride(1) >= sizes[2] else made.contiguous()


def jagged_apply(op: str, x: Tensor, y: Tensor, layout: Layout) -> Tensor:
    """`torch.<op>(x, E y)` for `add` or `mul`, of two tensors of as many dims; even requests are never copied.

    x: I rows; y: R rows; result: I rows.
    """
    if layout.even is not None:
        blocks = getattr(torch, op)(x.reshape(-1, layout.even, *x.shape[1:]), y.unsqueeze(1))
        # Not a view for autograd: what follows may write into it.
        flat: Tensor = torch.ops.aten._unsafe_view.default(blocks.contiguous(), (x.shape[0], *blocks.shape[2:]))
        return flat
    wide = y.index_select(0, layout.rows)
    fits = wide.dtype == x.dtype and all(b in (1, a) for a, b in zip(wide.shape, x.shape))
    saved = op == "mul" and torch.is_grad_enabled()
    made: Tensor = getattr(torch, op)(wide, x) if saved or not fits else getattr(wide, f"{op}_")(x)
    return made
