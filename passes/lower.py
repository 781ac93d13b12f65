"""Picks one implementation of each jagged operator.

    before                                  after, on CPU
    rows = request_of(counts, I)            rows = repeat_interleave(counts, output_size=I)
    e = jagged_broadcast(h, rows, 0)        e = index_select(h, 0, rows)

Measured (`tools/bench/ops.py`): `index_select` with sorted ids is the fastest broadcast on CPU, and its
backward (`index_add`) within 1.5x of the fastest segment sum. A batch of rows merged with a neighbour
keeps the operator, which unmerges it.

Postcondition: no `jagged_broadcast` of plain rows is left.
"""

from __future__ import annotations

import torch
from torch.fx import Graph

from passes.fuse import fuse
from passes.hoist import COUNTS, SIDE
from passes.mixed_rate import Layouts, mixed_rate
from roo_rewrite.ops.broadcast import jagged_broadcast, request_of

aten = torch.ops.aten


def lower(graph: Graph) -> None:
    """Lowers the hoisted graph in place."""
    layouts = Layouts(graph, next(n for n in graph.nodes if n.op == "placeholder" and n.name == COUNTS))
    mixed_rate(graph, layouts)
    fuse(graph, layouts)
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
    graph.lint()
