"""Entries that every row picks with its own number, written row by row.

    before                                                       after
    r = repeat_interleave(rows: [B], T)                          r = unsqueeze(rows, 1)
    index_put(x, [r, c: [B * T]], v: [B * T])                    index_put(x, [r, c as [B, T]], v as [B, T])
    index(x, [r, c])                                             flatten(index(x, [r, c as [B, T]]), 0, 1)

The rating matrix of an autoencoder is made so. With the batch in a dim of its own, a row is seen to write into itself.
The order in which entries are written stays.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from passes.traced import called, traced
from roo_rewrite.capture import Captured

aten = torch.ops.aten


def repeated_rows(captured: Captured) -> None:
    """Gives the index vectors of such picks and writes two dims, in place."""
    for node in list(captured.graph.nodes):
        if node.target in (aten.index_put.default, aten.index.Tensor):
            _by_row(captured, node)


def _by_row(captured: Captured, node: Node) -> None:
    indices: Any = node.args[1]
    repeated = [_repeated(captured, index) for index in indices]
    found = next((pair for pair in repeated if pair is not None), None)
    if found is None or any(pair is not None and pair[1] != found[1] for pair in repeated):
        return
    times, merged = found[1], captured.expr(_shape(indices[repeated.index(found)])[0])
    if not all(isinstance(i, Node) and _is_vector(captured, i, merged) for i in indices):
        return
    values = node.args[2] if node.target is aten.index_put.default else None
    if isinstance(values, Node) and not _is_one(values):
        first, *inner = _shape(values)
        whole = len(inner) == len(_shape(node.args[0])) - len(indices) and all(isinstance(s, int) for s in inner)
        if not whole or captured.expr(first) != merged:
            return
    with captured.graph.inserting_before(node):
        apart = [
            called(captured.graph, aten.unsqueeze.default, pair[0], 1) if pair else _apart(captured, i, times)
            for i, pair in zip(indices, repeated)
        ]
        node.args = (node.args[0], apart, *node.args[2:])
        if isinstance(values, Node) and not _is_one(values):
            node.args = (*node.args[:2], _apart(captured, values, times), *node.args[3:])
    if node.target is aten.index.Tensor:
        shape = node.meta["val"]
        node.meta["val"] = traced(aten.index.Tensor, torch.fx.map_arg(node.args, lambda n: n.meta["val"]))
        with captured.graph.inserting_after(node):
            flat = captured.graph.call_function(aten.flatten.using_ints, (node, 0, 1))
        flat.meta = {**node.meta, "val": shape}
        node.replace_all_uses_with(flat, delete_user_cb=lambda user: user is not flat)


def _repeated(captured: Captured, index: Any) -> tuple[Node, int] | None:
    """(rows, T) of an index vector that is each entry of `rows` T times in a row."""
    if not isinstance(index, Node) or not isinstance(index.args[0] if index.args else None, Node):
        return None
    source = index.args[0]
    assert isinstance(source, Node)
    rows: Any = None
    times: Any = None
    if index.target is aten.repeat_interleave.self_int:
        rows, times = source, index.args[1]
        if len(index.args) > 2 and index.args[2] not in (0, -1, None):
            return None
    elif index.target in (aten.reshape.default, aten.flatten.using_ints) and source.target is aten.expand.default:
        column: Any = source.args[0]
        if column.target is aten.unsqueeze.default and column.args[1] in (1, -1) and len(_shape(source)) == 2:
            rows, times = column.args[0], _shape(source)[1]
    vectors = isinstance(rows, Node) and len(_shape(rows)) == len(_shape(index)) == 1
    return (rows, times) if vectors and isinstance(times, int) and times > 0 else None


def _is_vector(captured: Captured, index: Node, size: sympy.Expr) -> bool:
    value = index.meta["val"]
    return value.ndim == 1 and value.dtype in (torch.int64, torch.int32) and captured.expr(value.shape[0]) == size


def _is_one(values: Node) -> bool:
    return all(isinstance(s, int) and s == 1 for s in _shape(values))


def _shape(node: Any) -> Any:
    return node.meta["val"].shape


def _apart(captured: Captured, vector: Node, times: int) -> Node:
    return called(captured.graph, aten.reshape.default, vector, [-1, times, *_shape(vector)[1:]])
