"""Bytes of each request of a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from roo_rewrite.data.batch import RequestBatch
from roo_rewrite.facts import Provenance
from roo_rewrite.inputs import lengths_of


def request_bytes(batch: RequestBatch) -> Tensor:
    """int64[R]: bytes of each request's rows in the tensors of the call, the labels and the weights.

    Lengths and offsets count as they are stored; ids and what all requests share do not count.
    """
    inputs = batch.layout.inputs
    tensors, _ = inputs.flatten(batch.args, batch.kwargs, Provenance.REQUEST)
    named = {a.name: (a, t) for a, t in zip(inputs.atoms, tensors)}
    values = {a.rows_in: t for a, t in named.values() if a.kind == "values"}
    total = torch.zeros_like(batch.num_impressions, dtype=torch.int64)
    for atom, tensor in named.values():
        if atom.kind == "shared":
            continue
        rows = torch.ones_like(batch.num_impressions)
        if atom.kind == "values":
            keeper, kept = named[atom.rows_in]
            rows = lengths_of(keeper, kept, values[keeper.name]).long()
        if atom.provenance is Provenance.IMPRESSION:
            rows = _per_request(rows, batch) if atom.kind == "values" else batch.num_impressions
        total += rows * _row_bytes(tensor)
    for tensor in pytree.tree_leaves((batch.labels, batch.weights)):
        if isinstance(tensor, Tensor):
            total += batch.num_impressions * _row_bytes(tensor)
    return total


def _row_bytes(tensor: Tensor) -> int:
    return int(tensor.element_size() * torch.Size(tensor.shape[1:]).numel())


def _per_request(rows: Tensor, batch: RequestBatch) -> Tensor:
    """int64[I] -> int64[R]: sums over the impressions of each request."""
    running = torch.cat([rows.new_zeros(1), rows.cumsum(0)])
    ends = batch.num_impressions.cumsum(0)
    return running[ends] - running[ends - batch.num_impressions]
