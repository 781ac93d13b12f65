"""Ops that read nothing of their second operand but its shape or dtype are said without it.

    gates(user).view_as(fields)              reshape(gates(user), [-1, n, d])
    mask(user).type_as(scores)               to(mask(user), float32)

Otherwise the user's value would run once per impression for the sake of a shape. One size may be the batch's: it is
the one that is left to be found, -1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from passes.traced import called
from roo_rewrite.capture import Captured

aten = torch.ops.aten


def _operands(node: Node) -> tuple[Node, Any, Any]:
    x, other = node.args
    assert isinstance(x, Node)
    assert isinstance(other, Node)
    return x, x.meta["val"], other.meta["val"]


def _replaced(captured: Captured, node: Node, target: Any, *args: Any) -> Node:
    with captured.graph.inserting_before(node):
        new = called(captured.graph, target, *args)
    new.meta = {**node.meta, **new.meta}
    return new


def reshaped(captured: Captured, node: Node) -> Node | None:
    """A reshape whose only size that is not a number is found from the others."""
    x, _, other = _operands(node)
    sizes = [s if isinstance(s, int) else -1 for s in other.shape]
    if 0 in sizes or sizes.count(-1) > 1:
        return None
    return _replaced(captured, node, aten.reshape.default, x, sizes)


def expanded(captured: Captured, node: Node) -> Node | None:
    """An expand of dims of one entry; the others, the batch among them, are kept."""
    x, value, other = _operands(node)
    if value.ndim != other.ndim:
        return None
    kept = [captured.expr(a) == captured.expr(b) for a, b in zip(value.shape, other.shape)]
    if not all(same or isinstance(s, int) for same, s in zip(kept, other.shape)):
        return None
    return _replaced(captured, node, aten.expand.default, x, [-1 if k else s for k, s in zip(kept, other.shape)])


def cast(captured: Captured, node: Node) -> Node | None:
    """A cast to the dtype that the other has in the trace, which a program is made for."""
    if len(node.args) > 2 or node.kwargs:
        return None
    x, value, other = _operands(node)
    if value.device != other.device:
        return None
    return x if value.dtype == other.dtype else _replaced(captured, node, aten.to.dtype, x, other.dtype)


AS_OTHERS: dict[Any, Callable[[Captured, Node], Node | None]] = {
    aten.view_as.default: reshaped,
    aten.reshape_as.default: reshaped,
    aten.expand_as.default: expanded,
    aten.type_as.default: cast,
    aten.to.other: cast,
}
