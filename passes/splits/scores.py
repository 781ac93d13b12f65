"""Scores of attention in which entries of the request see those of the impression: what a mask would forbid."""

from __future__ import annotations

import torch
from torch import Tensor

from passes.forms import Blocks, Deferred, Filled, is_static, provenance
from passes.split import Splitter
from passes.splits.views import cells_of
from roo_rewrite.facts import Provenance


def note(s: Splitter, visible: Tensor, forbidden: Tensor) -> None:
    """Notes for the node at hand what would be visible without `forbidden`, where that leaves every row something."""
    left = visible & ~forbidden
    if s.builder.origin is not None and bool((visible & forbidden).any()) and bool(left.any(-1).all()):
        s.unmasked.setdefault(s.builder.origin, left)


def note_scores(s: Splitter, x: Blocks) -> None:
    """As `note`, for scores [..., rows, columns] in cells: rows and columns of the request are those of its cells."""
    origin = s.builder.origin
    sizes = x.shape[-2:]
    if origin is None or not all(is_static(n) for n in sizes) or tuple(origin.meta["val"].shape[-2:]) != tuple(sizes):
        return
    visible, mixed = torch.ones(*sizes, dtype=torch.bool), torch.zeros(*sizes, dtype=torch.bool)
    rows, columns = torch.zeros(sizes[0], 1, dtype=torch.bool), torch.zeros(1, sizes[1], dtype=torch.bool)
    for corner, cell in cells_of(x, [0] * x.ndim):
        down, across = (slice(corner[d], corner[d] + int(cell.shape[d])) for d in (x.ndim - 2, x.ndim - 1))
        if isinstance(cell, (Filled, Deferred)):
            visible[down, across] = False
        elif provenance(cell) is Provenance.REQUEST:
            rows[down], columns[:, across] = True, True
        else:
            mixed[down, across] = True
    note(s, visible, mixed & rows & ~columns)
