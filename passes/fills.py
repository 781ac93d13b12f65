"""Values of one number, which read nothing of the tensor whose shape they have.

    before                                    after
    row = select(scores: [B, T, T], 0, 0)     ones([T, T])
    ones_like(row)

A mask is often shaped after the first row of the batch. Where no size is the batch's, the value is a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from passes.functionalize import is_effect
from roo_rewrite.capture import Captured

aten = torch.ops.aten

_PLAIN: dict[Any, Any] = {
    aten.ones_like.default: aten.ones.default,
    aten.zeros_like.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_zeros.default: aten.zeros.default,
    aten.full_like.default: aten.full.default,
    aten.new_full.default: aten.full.default,
}

_AT: dict[Any, int] = {aten.full_like.default: 1, aten.new_full.default: 2}


def plain_fill(captured: Captured, node: Node) -> Node | None:
    """The value made from its sizes alone; None where one of them is not known in the trace."""
    value, number = node.meta["val"], _number(node)
    known = all(isinstance(s, int) for s in value.shape) and value.layout == torch.strided
    if not known or isinstance(number, Node) or is_effect(node):
        return None
    target = _PLAIN[node.target]
    args = (list(value.shape), number) if target is aten.full.default else (list(value.shape),)
    with captured.graph.inserting_before(node):
        new = captured.graph.call_function(target, args, {"dtype": value.dtype, "device": value.device})
    new.meta = dict(node.meta)
    return new


def _number(node: Node) -> Any:
    return node.args[_AT[node.target]] if node.target in _AT else None


FILLS: dict[Any, Callable[[Captured, Node], Node | None]] = dict.fromkeys(_PLAIN, plain_fill)
