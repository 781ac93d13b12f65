"""The jagged broadcast E: `E(a)[i] = a[request_of(i)]`. Everything else in this project moves it later."""

from __future__ import annotations

import torch
from torch import Tensor

from roo_rewrite.ops.ragged import segment_positions


def request_of(num_impressions: Tensor, rows: int) -> Tensor:
    """The request of each impression: counts `[R]` -> int64 `[I]`, sorted. `rows` is I, known without a sync."""
    return torch.repeat_interleave(num_impressions, output_size=rows)


def jagged_broadcast(x: Tensor, rows: Tensor, dim: int = 0, outer: int = 1, inner: int = 1) -> Tensor:
    """E along `dim`, which holds `outer * R * inner` entries: each request's block once per impression.

    x: any shape with R rows in `dim`; rows: int64 `[I]` from `request_of`. Differentiable: the gradient
    of a request row is the sum over its impressions.
    """
    if outer == 1 and inner == 1:
        return x.index_select(dim, rows)
    split = x.reshape(*x.shape[:dim], outer, x.shape[dim] // (outer * inner), inner, *x.shape[dim + 1 :])
    return split.index_select(dim + 1, rows).flatten(dim, dim + 2)


def jagged_select(values: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
    """E of the values of a jagged pair: `values [N, ...]` of `lengths [R]`, each row's span once per impression."""
    starts = lengths.cumsum(0) - lengths
    positions = segment_positions(starts.index_select(0, rows), lengths.index_select(0, rows))
    return values.index_select(0, positions)
