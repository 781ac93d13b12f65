"""Which draw of random numbers may be moved.

A seed must give the same numbers before and after, so what draws stays in order. A draw whose size has nothing of the
batch in it (a sample for every item of a table) is the same for every row; where it is the first, it may come earlier
still, and run once per request.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from passes.drawn import draws
from roo_rewrite.facts import Provenance, Replicated, annotation


def first_draw(graph: Graph) -> Node | None:
    """The node that draws before all others; None where there is none, or another may draw before it."""
    nodes: list[Node] = list(graph.nodes)
    for node in nodes:
        if draws(node):
            return node
        if node.target is torch.ops.roo.leaf.default or isinstance(node.target, torch._ops.HigherOrderOperator):
            return None
    return None


def of_no_row(node: Node) -> bool:
    """Whether an annotated node draws as many numbers for every batch, whatever is in it."""
    known = [annotation(n) for n in node.all_input_nodes]
    values = [t for t in pytree.tree_leaves(node.meta["val"]) if isinstance(t, Tensor)]
    fixed = all(isinstance(s, int) for t in values for s in t.shape)
    return fixed and all(a.provenance is Provenance.CONSTANT and isinstance(a.batching, Replicated) for a in known)
