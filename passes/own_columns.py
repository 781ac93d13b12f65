"""The columns that a mask is made of, read off the tensor they came with.

    before                              after
    row = cat([user, item], 1)          row = cat([user, item], 1)
    n = row[:, 3:4]                     n = user[:, 3:4]
    mask = n.squeeze(1) > 0             mask = n.squeeze(1) > 0

What a mask depends on tells whether rows may be kept by it (`kept_regions`), before anything is split. Other slices are
left to the split.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from passes.traced import called
from roo_rewrite.ops.kept import kept_rows

aten = torch.ops.aten


def own_columns(graph: Graph) -> None:
    """Rewrites the slices that masks of kept rows are made of, in place."""
    above, stack = set[Node](), [n.args[1] for n in graph.nodes if n.target is kept_rows]
    while stack:
        node: Any = stack.pop()
        if node not in above:
            above.add(node)
            stack += node.all_input_nodes
    for node in list(graph.nodes):
        made = _of_part(graph, node) if node in above else None
        if made is not None:
            node.replace_all_uses_with(made)
            graph.erase_node(node)


def _of_part(graph: Graph, node: Node) -> Node | None:
    """A slice of a concatenation that lies in one of its parts, as a slice of that."""
    if node.target is not aten.slice.Tensor or len(node.args) != 4 or node.kwargs:
        return None
    joined, dim, start, stop = _args(node)
    if (
        joined.target is not aten.cat.default
        or joined.kwargs
        or not isinstance(start, int)
        or not isinstance(stop, int)
    ):
        return None
    value, parts, along = joined.meta["val"], _args(joined)[0], (*_args(joined), 0)[1]
    if dim % value.ndim != along % value.ndim:
        return None
    at = 0
    for part in parts:
        known = part.meta["val"]
        width = known.shape[along] if known.ndim == value.ndim else None
        if not isinstance(width, int) or known.dtype != value.dtype:
            return None
        if at <= start < stop <= at + width:
            with graph.inserting_before(node):
                return called(graph, aten.slice.Tensor, part, dim, start - at, stop - at)
        at += width
    return None


def _args(node: Node) -> tuple[Any, ...]:
    return node.args
