"""Batch norm in training, at request level: each row counts as often as its request has impressions."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    num_impressions: Tensor,
    outer: int = 1,
    inner: int = 1,
) -> Tensor:
    """`batch_norm(E x)` before its broadcast: `E weighted_batch_norm(x) == batch_norm(E x)`.

    x: `[outer * R * inner, C, ...]`; num_impressions: `[R]`. Mean and variance are those over the I
    impressions, and so are the running statistics (unbiased over I), which are updated in place. As in
    torch, statistics of low-precision values are taken in float32.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    counts = num_impressions.repeat_interleave(inner).repeat(outer).to(exact.dtype)
    dims = [0, *range(2, x.ndim)]
    shape = [1, -1] + [1] * (x.ndim - 2)
    weights = counts.reshape([-1] + [1] * (x.ndim - 1))
    spatial = x[:, 0].numel() // max(x.shape[0], 1) if x.ndim > 2 else 1
    total = counts.sum() * spatial
    seen = exact.masked_fill(weights == 0, 0.0)  # 0 * NaN of a request without impressions would be NaN
    mean = (seen * weights).sum(dims) / total
    centred = seen - mean.view(shape)
    var = (centred * centred * weights).sum(dims) / total
    with torch.no_grad():
        if running_mean is not None and running_var is not None:
            unbiased = var * (total / (total - 1))
            running_mean.mul_(1 - momentum).add_(mean.detach().to(running_mean.dtype), alpha=momentum)
            running_var.mul_(1 - momentum).add_(unbiased.detach().to(running_var.dtype), alpha=momentum)
    y = centred * torch.rsqrt(var + eps).view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    return (y if bias is None else y + bias.view(shape)).to(x.dtype)
