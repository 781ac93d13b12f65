"""hstack and kin as the concatenations they are, of operands with the dims they are short of.

hstack([u: [B, 4], x: [B, 4]])           cat([u, x], 1)
column_stack([a: [B], x: [B, 4]])        cat([unsqueeze(a, 1), x], 1)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from passes.traced import called
from roo_rewrite.capture import Captured

aten = torch.ops.aten
# The dims in front of which an operand of 0, 1 and 2 dims gets one of size 1, in turn.
_MISSING: dict[Any, tuple[tuple[int, ...], ...]] = {
    aten.hstack.default: ((0,),),
    aten.column_stack.default: ((0, 1), (1,)),
    aten.vstack.default: ((0, 0), (0,)),
    aten.row_stack.default: ((0, 0), (0,)),
    aten.dstack.default: ((0, 0, 2), (0, 2), (2,)),
}
_DIM: dict[Any, int] = {aten.hstack.default: 1, aten.column_stack.default: 1, aten.dstack.default: 2}


def stacked(captured: Captured, node: Node) -> Node:
    """Such an op as one cat."""
    missing, dim = _MISSING[node.target], _DIM.get(node.target, 0)
    parts: Any = node.args[0]
    with captured.graph.inserting_before(node):
        wide = []
        for part in parts:
            ndim = part.meta["val"].ndim
            for at in missing[ndim] if ndim < len(missing) else ():
                part = called(captured.graph, aten.unsqueeze.default, part, at)
            wide.append(part)
        new = called(captured.graph, aten.cat.default, wide, min(dim, wide[0].meta["val"].ndim - 1))
    new.meta = {**node.meta, **new.meta}
    return new


STACKS: dict[Any, Callable[[Captured, Node], Node | None]] = dict.fromkeys(_MISSING, stacked)
