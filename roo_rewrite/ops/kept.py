"""Rows that a mask keeps, with the others filled in; entries that it marks; rows sorted and put back."""

from __future__ import annotations

import torch
from torch import Tensor


class FewRowsError(RuntimeError):
    """A mask keeps fewer than two rows of a batch, or not one entry of each row, which no trace has seen."""


def kept_rows(x: Tensor, mask: Tensor) -> Tensor:
    """x `[B, ...]` with the first row that mask `[B]` keeps in the place of each that it does not."""
    return x.index_select(0, _source(mask, mask))


def marked_entries(x: Tensor, mask: Tensor) -> Tensor:
    """The entry of each row of x `[B, T, ...]` that mask `[B, T]` marks: `x[mask]`.

    Raises FewRowsError where it does not mark one of each row.
    """
    if not bool((mask.sum(1) == 1).all()):
        raise FewRowsError("a mask does not mark one entry of each row of this batch; run the original on it")
    at = mask.to(torch.int8).argmax(1).view(-1, *[1] * (x.ndim - 1))
    return x.gather(1, at.expand(-1, 1, *x.shape[2:])).squeeze(1)


def some_rows(x: Tensor, mask: Tensor) -> Tensor:
    """x of any shape, of a batch of which mask `[B]` keeps a row. Raises FewRowsError where it keeps none."""
    if not bool(mask.any()):
        raise FewRowsError("a mask keeps no row of this batch; run the original on it")
    return x


def sorted_rows(x: Tensor, order: Tensor) -> Tensor:
    """The rows of x `[B, ...]` in an order: int64 `[B]`, every row once."""
    return x.index_select(0, order)


def unsorted_rows(x: Tensor, order: Tensor) -> Tensor:
    """The rows of x `[B, ...]`, which are in this order, put back."""
    return x.index_select(0, order.argsort())


def kept_source(mask: Tensor, num_impressions: Tensor | None = None) -> Tensor:
    """The row that `kept_rows` takes for each: int64 `[B]`. Raises FewRowsError where it keeps one or none of several.

    num_impressions: `[B]` where the rows are requests: then impressions are counted, and the row that fills in for
    others is one that has some, so that it is the one their impressions would take.
    """
    if num_impressions is None:
        num_impressions = torch.ones_like(mask, dtype=torch.long)
    if int((num_impressions * mask).sum()) < 2 <= int(num_impressions.sum()):
        raise FewRowsError("a mask keeps fewer than two impressions of this batch; run the original on it")
    return _source(mask, mask & (num_impressions > 0))


def _source(mask: Tensor, seen: Tensor) -> Tensor:
    best = mask.to(torch.int8) + seen.to(torch.int8)
    first = torch.cat([best, best.new_zeros(1)]).argmax()  # of no rows too
    return torch.where(mask, torch.arange(mask.shape[0], device=mask.device), first)
