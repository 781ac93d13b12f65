"""Looking up rows of a table, one by one or in bags."""

from __future__ import annotations

import torch

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, CrossRow, Offsets, Ragged, RowIndex, Rows, Several
from roo_rewrite.rules.index import picked
from roo_rewrite.rules.registry import Call, Operand, case, rule

_FREQUENCY = "gradients are scaled by how often an id occurs in the batch"


@rule(
    "aten.embedding.default",
    cases=[
        case("4 3", "i:B"),
        case("4 3", "i:B 2"),
        case("4 3", "i:2 B"),
        case("4 3", "i:B*2"),
        case("4 B", "i:2"),
        case("4 3", "i:B 2", call=lambda n, w, x: (w, x, 0)),
        case("4 3", "i:R"),
        case("B 3", "i:2", call=lambda n, w, x: (w, x), declines=True),
    ],
)
def embedding(call: Call) -> Batching:
    """Row `indices[...]` of the weight."""
    if call["scale_grad_by_freq"]:
        raise NotRowWise(_FREQUENCY)
    return picked(call.operand("weight"), 0, call.operand("indices"))


def _bags(n: int, *args: torch.Tensor) -> tuple[object, ...]:
    """Arguments of `embedding_bag.padding_idx`, mean with entry 0 left out."""
    weight, indices, offsets, *weights = args
    mode = 0 if weights else 1
    return (weight, indices, offsets, False, mode, False, weights[0] if weights else None, False, 0)


def _jagged_bags(n: int, *args: torch.Tensor) -> tuple[object, ...]:
    return (*_bags(n, *args)[:-2], True, None)


@rule(
    "aten.embedding_bag.padding_idx",
    special=(Offsets, Ragged, RowIndex),
    cases=[
        case("4 3", "i:B*2", "#B*2", call=_bags),
        case("4 3", "i:B", "#B", call=_bags),
        case("4 3", "i:B*2", "#B*2", "B*2", call=_bags),
        case("4 3", "i:B*2", "#B*2", "14", call=_bags, declines=True),
        case("4 3", "i:B*2", "#B", call=_bags, declines=True),
        case("4 B", "i:B*2", "#B*2", call=_bags, declines=True),
        case("4 3", "i:R", "offsets", call=_jagged_bags),
        case("4 3", "i:R", "offsets", "R", call=_jagged_bags),
        case("4 3", "i:R", "starts", call=_bags),
    ],
)
@rule(
    "aten.embedding_bag.default",
    "aten._embedding_bag.default",
    "aten._embedding_bag_forward_only.default",
    special=(Offsets, Ragged, RowIndex),
    cases=[
        case("4 3", "i:B*2", "#B*2"),
        case("4 3", "i:R", "starts"),
        case("4 3", "i:6", call=lambda n, w, x: (w, x, torch.zeros(max(n, 1), dtype=torch.long)), declines=True),
    ],
)
def embedding_bag(call: Call) -> Batching:
    """A bag of ids per row: as many for each, or those of a jagged pair. The other results are bookkeeping."""
    if call["scale_grad_by_freq"]:
        raise NotRowWise(_FREQUENCY)
    call.replicated("weight")
    indices, weights = call.operand("indices"), call["per_sample_weights"]
    if not _offsets_of(indices, call.operand("offsets"), call["include_last_offset"]):
        raise NotRowWise("the bags are not known to be the rows of the batch")
    if weights is not None and weights.batching != indices.batching:
        raise NotRowWise("per_sample_weights and indices have different batches")
    rest = CrossRow("bookkeeping of embedding_bag")
    return Several((Rows(0), *(rest for _ in call.out[1:])))


def _offsets_of(indices: Operand, offsets: Operand, total: bool) -> bool:
    """Whether the offsets are where each row of the batch begins in the indices."""
    kind, at = indices.batching, offsets.batching
    if isinstance(at, RowIndex) and indices.ndim == 1:
        return kind == Rows(0, 1, at.step) and not total
    return isinstance(kind, Ragged) and at == Offsets(kind.lengths, last=total)
