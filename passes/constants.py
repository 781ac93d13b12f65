"""The values of nodes that depend on nothing: masks, index vectors, positions."""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor
from torch.fx import Node

from roo_rewrite.capture import Captured

_LIMIT = 1 << 22


def evaluate(captured: Captured, node: Node) -> Tensor | None:
    """The value of `node` where literals and factory ops alone make it; None where it depends on more.

    Parameters and buffers are not literals: they may change.
    """
    memo: dict[Node, Tensor | None] = {}
    return _value(captured, node, memo)


def _value(captured: Captured, node: Node, memo: dict[Node, Tensor | None]) -> Tensor | None:
    if node not in memo:
        memo[node] = None
        memo[node] = _compute(captured, node, memo)
    return memo[node]


def _compute(captured: Captured, node: Node, memo: dict[Node, Tensor | None]) -> Tensor | None:
    value = node.meta.get("val")
    if node.op == "get_attr":
        name = str(node.target)
        return captured.constants.get(name.removeprefix("_roo.")) if name.startswith("_roo.") else None
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if not isinstance(value, Tensor) or any(not isinstance(s, int) for s in value.shape) or value.numel() > _LIMIT:
        return None
    if node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    known: dict[Node, object] = {}
    for source in node.all_input_nodes:
        found = _argument(captured, source, memo)
        if found is None:
            return None
        known[source] = found
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), known.__getitem__)
    with torch.no_grad():
        made = node.target(*args, **kwargs)
    return made if isinstance(made, Tensor) else None


def _argument(captured: Captured, node: Node, memo: dict[Node, Tensor | None]) -> object | None:
    if node.target is getattr:
        return torch.device("cpu")
    return _value(captured, node, memo)
