"""Pooled tables whose columns are put into another order, as a concatenation.

    before                                                     after
    permute_pooled_embs(x: [B, 5], [0, 2, 5], [1, 0], ..)      cat([x[:, 2:5], x[:, 0:2]], 1)

A TorchRec KeyedTensor regroups its keys so. As a concatenation each table stays on its side (see `split`).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.fx import Node

from passes.constants import evaluate
from passes.traced import called
from roo_rewrite.capture import Captured

aten = torch.ops.aten
_PERMUTED = ("fbgemm.permute_pooled_embs.default", "fbgemm.permute_pooled_embs_auto_grad.default")


def pooled_columns(captured: Captured) -> None:
    """Replaces such ops whose order is a constant, in place."""
    for node in list(captured.graph.nodes):
        if str(node.target) in _PERMUTED:
            _by_table(captured, node)


def _by_table(captured: Captured, node: Node) -> None:
    x, *lists = node.args[:3]
    assert isinstance(x, Node)
    offsets, order = (evaluate(captured, n) if isinstance(n, Node) else None for n in lists)
    if offsets is None or order is None or x.meta["val"].ndim != 2:
        return
    tables = list(pairwise(offsets.tolist()))
    with captured.graph.inserting_before(node):
        parts = [called(captured.graph, aten.slice.Tensor, x, 1, *tables[i]) for i in order.tolist()]
        joined = called(captured.graph, aten.cat.default, parts, 1)
    joined.meta = {**node.meta, "val": joined.meta["val"]}
    node.replace_all_uses_with(joined)
    captured.graph.erase_node(node)
