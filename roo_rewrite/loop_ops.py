"""What a loop over packed steps does, as ops while it is traced: see `loops`. `passes.packed_loops` writes them out.

mask: `[B, T]` of the entries that are there. own: the mask of the packing that entries are of. source: numbers of rows,
whose size is that of the rows meant. at, of: steps.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("roo::step_sources", mutates_args=())
def sources_op(mask: Tensor) -> list[Tensor]:
    """Stands for the numbers of all entries, then of the rows of each step, while tracing; it is never run."""
    raise RuntimeError("roo::step_sources exists only while tracing")


@sources_op.register_fake
def _sources(mask: Tensor) -> list[Tensor]:
    made = torch.library.get_ctx()
    return [mask.new_empty((made.new_dynamic_size(min=0),), dtype=torch.long) for _ in range(1 + int(mask.shape[1]))]


@torch.library.custom_op("roo::packed_data", mutates_args=())
def data_op(steps: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """Stands for the entries of steps `[B, T, ...]` that mask has, packed, while tracing; it is never run."""
    raise RuntimeError("roo::packed_data exists only while tracing")


@data_op.register_fake
def _data(steps: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    return steps.new_empty((*source.shape, *steps.shape[2:]))


@torch.library.custom_op("roo::padded_data", mutates_args=())
def padded_op(data: Tensor, mask: Tensor, own: Tensor) -> Tensor:
    """Stands for packed entries, padded again, while tracing; it is never run. own: the mask they were packed by."""
    raise RuntimeError("roo::padded_data exists only while tracing")


@padded_op.register_fake
def _padded(data: Tensor, mask: Tensor, own: Tensor) -> Tensor:
    return data.new_empty((*mask.shape, *data.shape[1:]))


@torch.library.custom_op("roo::step_rows", mutates_args=())
def step_op(data: Tensor, mask: Tensor, own: Tensor, source: Tensor, at: int) -> Tensor:
    """Stands for the rows of packed entries at a step while tracing; it is never run."""
    raise RuntimeError("roo::step_rows exists only while tracing")


@step_op.register_fake
def _step(data: Tensor, mask: Tensor, own: Tensor, source: Tensor, at: int) -> Tensor:
    return data.new_empty((*source.shape, *data.shape[1:]))


@torch.library.custom_op("roo::put_step", mutates_args=())
def put_step_op(data: Tensor, values: Tensor, mask: Tensor, own: Tensor, at: int) -> Tensor:
    """Stands for packed entries with a step written over while tracing; it is never run."""
    raise RuntimeError("roo::put_step exists only while tracing")


@put_step_op.register_fake
def _put_step(data: Tensor, values: Tensor, mask: Tensor, own: Tensor, at: int) -> Tensor:
    return torch.empty_like(data)


@torch.library.custom_op("roo::first_rows", mutates_args=())
def first_op(x: Tensor, mask: Tensor, source: Tensor, at: int) -> Tensor:
    """Stands for those rows of an earlier step that have this one, too, while tracing; it is never run."""
    raise RuntimeError("roo::first_rows exists only while tracing")


@first_op.register_fake
def _first(x: Tensor, mask: Tensor, source: Tensor, at: int) -> Tensor:
    return x.new_empty((*source.shape, *x.shape[1:]))


@torch.library.custom_op("roo::put_first_rows", mutates_args=())
def put_first_op(out: Tensor, values: Tensor, mask: Tensor, at: int, of: int) -> Tensor:
    """Stands for rows of step `of`, those that have step `at` written over, while tracing; it is never run."""
    raise RuntimeError("roo::put_first_rows exists only while tracing")


@put_first_op.register_fake
def _put_first(out: Tensor, values: Tensor, mask: Tensor, at: int, of: int) -> Tensor:
    return torch.empty_like(out)


@torch.library.custom_op("roo::in_order", mutates_args=())
def order_op(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """Stands for all rows, sorted by length, while tracing; it is never run."""
    raise RuntimeError("roo::in_order exists only while tracing")


@order_op.register_fake
def _in_order(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    return x.new_empty((*source.shape, *x.shape[1:]))


@torch.library.custom_op("roo::in_place", mutates_args=())
def place_op(x: Tensor, mask: Tensor) -> Tensor:
    """Stands for rows sorted by length, put back, while tracing; it is never run."""
    raise RuntimeError("roo::in_place exists only while tracing")


@place_op.register_fake
def _in_place(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty((*mask.shape[:1], *x.shape[1:]))


@torch.library.custom_op("roo::packed_index", mutates_args=())
def index_op(like: Tensor) -> Tensor:
    """Stands for the order of rows sorted by length, or their places, while tracing; it is never run."""
    raise RuntimeError("roo::packed_index exists only while tracing")


@index_op.register_fake
def _index(like: Tensor) -> Tensor:
    return like.new_empty(like.shape[:1], dtype=torch.long)
