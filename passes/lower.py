"""Picks one implementation of each jagged operator.

    before                                  after, on CPU
    rows = request_of(counts, I)            rows = repeat_interleave(counts, output_size=I)
    e = jagged_broadcast(h, rows, 0)        e = index_select(h, 0, rows)

Measured (`tools/bench/ops.py`): `index_select` with sorted ids is the fastest broadcast on CPU, and its
backward (`index_add`) within 1.5x of the fastest segment sum. A batch of rows merged with a neighbour
keeps the operator, which unmerges it. A thousand outer products as one `mul` run 6x as fast as by `bmm`, and a matrix
of weights times a batch 1.5x to 5x as fast as by `matmul` (`ops.conv`).

Postcondition: no `jagged_broadcast` of plain rows is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from passes.drawn import in_order
from passes.fuse import fuse
from passes.lookups import together
from passes.mixed_rate import Layouts, mixed_rate
from passes.one_split import one_split
from passes.tidy import scaled_terms, tidy
from roo_rewrite.facts import AUTOCAST, COUNTS, SIDE
from roo_rewrite.ops.broadcast import jagged_broadcast, request_of
from roo_rewrite.ops.conv import WIDE, pointwise_conv, weight_times

aten = torch.ops.aten


def lower(graph: Graph) -> None:
    """Lowers the hoisted graph in place."""
    tidy(graph)
    together(graph)
    layouts = Layouts(graph, next(n for n in graph.nodes if n.op == "placeholder" and n.name == COUNTS))
    mixed_rate(graph, layouts)
    for node in list(graph.nodes):
        target = next((target for target, fits in _FASTER.items() if fits(node)), None)
        if target is None:
            continue
        with graph.inserting_before(node):
            new = graph.call_function(target, node.args[:3])
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    fuse(graph, layouts)
    scaled_terms(graph)
    one_split(graph)
    for node in list(graph.nodes):
        if node.target is jagged_broadcast and node.args[3:] == (1, 1):
            x, rows, dim, *_ = node.args
            with graph.inserting_before(node):
                new = graph.call_function(aten.index_select.default, (x, dim, rows))
        elif node.target is request_of:
            counts, rows = node.args
            with graph.inserting_before(node):
                new = graph.call_function(aten.repeat_interleave.Tensor, (counts,), {"output_size": rows})
        else:
            continue
        new.meta = dict(node.meta)
        new.meta[SIDE] = node.meta[SIDE]
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    in_order(graph)
    graph.lint()


def _is_pointwise(node: Node) -> bool:
    """A conv1d on CPU whose window is one entry, over a batch."""
    if node.target is not aten.conv1d.default or AUTOCAST in node.meta or node.kwargs:
        return False
    x, weight = (a.meta["val"] for a in node.args[:2])  # type: ignore[union-attr]
    # stride, padding, dilation, groups
    plain = all(given == usual for given, usual in zip(node.args[3:], ([1], [0], [1], 1)))
    return bool(plain and x.ndim == 3 and weight.shape[2] == 1 and x.device.type == "cpu" and x.dtype == weight.dtype)


def _is_outer(node: Node) -> bool:
    """A product of matrices `[..., n, 1]` and `[..., 1, m]`: of two entries each, none to be summed."""
    if node.target not in (aten.matmul.default, aten.bmm.default) or AUTOCAST in node.meta:
        return False
    x, y = (a.meta["val"] for a in node.args)  # type: ignore[union-attr]
    return x.ndim == y.ndim > 1 and type(x.shape[-1]) is int and x.shape[-1] == 1 and x.dtype == y.dtype


def _is_weight_times(node: Node) -> bool:
    """A matmul on CPU of a matrix without a batch and a batch of matrices, of rows that are worth a copy."""
    if node.target is not aten.matmul.default or AUTOCAST in node.meta:
        return False
    w, x = (a.meta["val"] for a in node.args)  # type: ignore[union-attr]
    static = all(type(n) is int for n in (*w.shape, *x.shape[1:]))
    return bool(w.ndim == 2 and x.ndim == 3 and static and x.shape[2] >= WIDE and w.device.type == "cpu")


_FASTER: dict[Callable[..., Any], Callable[[Node], bool]] = {
    pointwise_conv: _is_pointwise,
    aten.mul.Tensor: _is_outer,
    weight_times: _is_weight_times,
}
