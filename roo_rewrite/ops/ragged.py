"""Row arithmetic on jagged pairs: `values [N, ...]` with `lengths [B]` or offsets."""

from __future__ import annotations

import torch
from torch import Tensor


def offsets_of(lengths: Tensor) -> Tensor:
    """`lengths [B]` -> offsets `[B + 1]`, int64, starting at 0."""
    return torch.cat([lengths.new_zeros(1, dtype=torch.long), lengths.cumsum(0, dtype=torch.long)])


def segment_positions(starts: Tensor, lengths: Tensor, total: int | torch.SymInt | None = None) -> Tensor:
    """Positions `[starts[i], starts[i] + lengths[i])` for each i, one after the other."""
    rows = torch.repeat_interleave(lengths, output_size=total)
    begins = starts - (lengths.cumsum(0) - lengths)
    return begins.index_select(0, rows) + torch.arange(rows.shape[0], device=rows.device)


def select_ragged(values: Tensor, lengths: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `rows` of the jagged pair: the values of each chosen row, in order, and its length."""
    starts = lengths.cumsum(0, dtype=torch.long) - lengths
    chosen = lengths.index_select(0, rows)
    positions = segment_positions(starts.index_select(0, rows), chosen)
    return values.index_select(0, positions), chosen
