"""The largest and smallest entries of a batch, at request level."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_seen(x: Tensor, num_impressions: Tensor, largest: bool, outer: int = 1, inner: int = 1) -> Tensor:
    """x with the rows of requests without impressions out of the way: `max(E x) == max(rows_seen(x, n, True))`.

    A maximum, minimum, any or all counts no entry twice, so that only those rows tell x from `E x`. x:
    `[outer * R * inner, ...]`, whole numbers or truth values; num_impressions: `[R]`; largest: for a maximum or any.
    Where no request has impressions it is x itself, and nothing reads the result.
    """
    seen = (num_impressions > 0).repeat_interleave(inner).repeat(outer)
    gone = ~(seen | ~seen.any()).reshape([-1] + [1] * (x.ndim - 1))
    if x.dtype == torch.bool:
        return x.masked_fill(gone, not largest)
    limits = torch.iinfo(x.dtype)
    return x.masked_fill(gone, limits.min if largest else limits.max)
