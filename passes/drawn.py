"""Random numbers are drawn in the order of the original.

A draw over a tensor goes through its entries as they lie in memory. A value that a pass made in another way may lie
there in another order than the traced one, and equal seeds would give other masks.

    before                       after
    dropout(x)                   dropout(contiguous(x))
    dropout(x)   traced as x.mT  dropout(contiguous(x.mT).mT)

Both are free where x lies as it should.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

from roo_rewrite.facts import META

aten = torch.ops.aten


def in_order(graph: Graph) -> None:
    """Puts the operands of random ops in the traced order, in place."""
    for node in list(graph.nodes):
        order = drawn_order(node)
        if order is None:
            continue
        x = node.all_input_nodes[0]
        with graph.inserting_before(node):
            if order != sorted(order):
                x = _made(graph, node, aten.permute.default, x, order)
            x = _made(graph, node, aten.contiguous.default, x)
            if order != sorted(order):
                x = _made(graph, node, aten.permute.default, x, [order.index(d) for d in range(len(order))])
        node.replace_input_with(node.all_input_nodes[0], x)


def ordered(graph: Graph) -> Graph:
    """A copy that draws in the order of the original."""
    copied = Graph()
    copied.output(copied.graph_copy(graph, {}))
    in_order(copied)
    return copied


def draws(node: Node) -> bool:
    """Whether a node draws random numbers, as it is called here."""
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    named = {a.name: a.default_value for a in node.target._schema.arguments}
    named.update(zip(named, node.args))
    named.update(node.kwargs)
    if "dropout_p" in named:
        return bool(named["dropout_p"])
    return not (named.get("train") is False or named.get("p") == 0)


def drawn_order(node: Node) -> list[int] | None:
    """The dims of what is drawn, outermost first; None where nothing is drawn over an operand of the same shape."""
    value = node.meta.get("val")
    operands = node.all_input_nodes
    if not draws(node) or not isinstance(value, Tensor) or len(operands) != 1 or value.ndim < 2:
        return None
    operand = operands[0].meta.get("val")
    if not isinstance(operand, Tensor) or operand.ndim != value.ndim:
        return None
    sizes = [*value.shape, *value.stride()]
    if not all(isinstance(s, int) or s.node.has_hint() for s in sizes):
        return None
    known = [s if isinstance(s, int) else int(s.node.hint) for s in sizes]
    shape, stride = known[: value.ndim], known[value.ndim :]
    strides = torch.empty_like(torch.empty_strided(shape, stride, device="meta")).stride()
    return sorted(range(value.ndim), key=lambda d: -strides[d])


def _made(graph: Graph, node: Node, target: OpOverload, *args: object) -> Node:
    """A call that stands on the side of `node`."""
    made = graph.call_function(target, args)  # type: ignore[arg-type]
    made.meta = {k: v for k, v in node.meta.items() if k != META}
    return made
