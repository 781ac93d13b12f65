"""The values of nodes that depend on nothing: masks, index vectors, positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.fx import Node

from roo_rewrite.capture import Captured
from roo_rewrite.facts import EFFECT

_LIMIT = 1 << 22


def evaluate(captured: Captured, node: Node) -> Tensor | None:
    """The value of `node` where literals, buffers and factory ops alone make it; None where it depends on more.

    A buffer, or a parameter of integers, may change: what was read of it is noted in `captured.assumed`, which
    each call holds it against.
    """
    memo: dict[Node, Tensor | None] = {}
    value = _value(captured, node, memo)
    if value is not None:
        read = [n for n, v in memo.items() if n.op == "get_attr" and v is not None]
        captured.assumed.update({str(n.target): memo[n].clone() for n in read if not _literal(n)})  # type: ignore[union-attr]
    return value


def _literal(node: Node) -> bool:
    return str(node.target).startswith("_roo.")


def _value(captured: Captured, node: Node, memo: dict[Node, Tensor | None]) -> Tensor | None:
    if node not in memo:
        memo[node] = None
        memo[node] = _compute(captured, node, memo)
    return memo[node]


def _compute(captured: Captured, node: Node, memo: dict[Node, Tensor | None]) -> Tensor | None:
    value = node.meta.get("val")
    if EFFECT in node.meta:
        return None
    if node.op == "get_attr":
        return _attribute(captured, str(node.target))
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if not isinstance(value, Tensor) or any(not isinstance(s, int) for s in value.shape) or value.numel() > _LIMIT:
        return None
    if node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    known: dict[Node, Any] = {}
    for source in node.all_input_nodes:
        found = _argument(captured, source, memo)
        if found is None:
            return None
        known[source] = found
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), known.__getitem__)
    with torch.no_grad():
        made = node.target(*args, **kwargs)
    return made if isinstance(made, Tensor) else None


def _attribute(captured: Captured, name: str) -> Tensor | None:
    if name.startswith("_roo."):
        return captured.constants.get(name.removeprefix("_roo."))
    frozen = {n: p for n, p in captured.model.named_parameters() if not p.is_floating_point()}
    found = {**frozen, **dict(captured.model.named_buffers())}.get(name)
    return found if found is not None and found.numel() <= _LIMIT else None


def _argument(captured: Captured, node: Node, memo: dict[Node, Tensor | None]) -> object | None:
    if node.target is getattr:
        return torch.device("cpu")
    return _value(captured, node, memo)
