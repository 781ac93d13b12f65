"""Products over the columns of each row: convolutions of one entry, a matrix times a batch."""

from __future__ import annotations

import torch
from torch import Tensor

WIDE = 4  # entries of a row from which `weight_times` is worth its copy


def pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`conv1d(x, weight, bias)` for windows of one entry: x `[B, k, T]`, weight `[n, k, 1]` -> `[B, n, T]`.

    On CPU a batched product is as fast as the convolution or faster; the weight's gradient, one product for each row of
    the batch and their sum, is not.
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        return torch.conv1d(x, weight, bias)
    matrix = weight.squeeze(2)
    made = torch.bmm(matrix.expand(x.shape[0], *matrix.shape), x)
    return made if bias is None else made.add_(bias.unsqueeze(1))


def weight_times(weight: Tensor, x: Tensor) -> Tensor:
    """`weight @ x` for a batch: weight `[n, k]`, x `[B, k, T]` -> `[B, n, T]`.

    A matmul whose weight has a gradient copies x entry by entry. An einsum copies runs of T entries; a product for each
    row copies none, and pays where few entries come of many.
    """
    n, k = weight.shape
    if k >= 4 * n and n * k <= 1024:
        return torch.bmm(weight.expand(x.shape[0], n, k), x)
    return torch.einsum("nk,bkt->bnt", weight, x)
