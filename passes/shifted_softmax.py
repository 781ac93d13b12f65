"""A softmax whose operand was made small first.

    before                              after
    softmax(x - max(x), d)              softmax(x, d)

A softmax stays as it is where all entries along its dim lose the same number: in exp(x - c) / sum exp(x - c) the
factor exp(-c) is above and below. Torch takes the maximum of each row off by itself. Written out, it is often that of
the whole batch, and then every row would wait for all others. Only a maximum of the operand itself: to take off another
number, 1e9 say, is to round.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from roo_rewrite.capture import Captured

aten = torch.ops.aten


def unshifted(captured: Captured, node: Node) -> None:
    """Gives a softmax, or its logarithm, the operand before its maximum was taken off, in place."""
    shifted, dim, *_ = node.args
    if not isinstance(shifted, Node) or shifted.target is not aten.sub.Tensor or shifted.kwargs:
        return
    x, c = shifted.args
    if not isinstance(x, Node) or not isinstance(c, Node) or not _is_maximum(_undetached(c), _undetached(x)):
        return
    value, shift = x.meta["val"], c.meta["val"]
    same_along = not shift.ndim or (shift.ndim == value.ndim and captured.expr(shift.shape[dim]) == 1)
    if same_along and value.dtype == shifted.meta["val"].dtype:
        node.args = (x, *node.args[1:])


def _is_maximum(c: Node, x: Node) -> bool:
    """Whether c is a maximum of x, over all of it or over some dims."""
    maxima = (aten.max.default, aten.amax.default, aten.max.dim)
    taken: Any = c.args[0] if c.args else None
    if isinstance(taken, Node) and taken.target is aten.max.dim and c.args[1] == 0:
        c, taken = taken, taken.args[0]
    return c.target in maxima and isinstance(taken, Node) and _undetached(taken) is x


def _undetached(node: Node) -> Node:
    while node.target is aten.detach.default:
        assert isinstance(node.args[0], Node)
        node = node.args[0]
    return node
