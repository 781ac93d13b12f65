"""The values of nodes that depend on nothing: masks, index vectors, positions."""

from __future__ import annotations

import operator
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
    memo: dict[Node, Any] = {}
    value = _value(captured, node, memo)
    if isinstance(value, Tensor):
        read = [n for n, v in memo.items() if n.op == "get_attr" and v is not None]
        captured.assumed.update({str(n.target): memo[n].clone() for n in read if not _literal(n)})
        return value
    return None


def _literal(node: Node) -> bool:
    return str(node.target).startswith("_roo.")


def _value(captured: Captured, node: Node, memo: dict[Node, Any]) -> Any:
    if node not in memo:
        memo[node] = None
        memo[node] = _compute(captured, node, memo)
    return memo[node]


def _compute(captured: Captured, node: Node, memo: dict[Node, Any]) -> Any:
    """A tensor, or the list of an op with several results; None where it is not known."""
    value = node.meta.get("val")
    if EFFECT in node.meta:
        return None
    if node.op == "get_attr":
        return _attribute(captured, str(node.target))
    if node.target is operator.getitem:
        several, place = node.args
        known = _value(captured, several, memo) if isinstance(several, Node) else None
        return None if known is None else known[place]
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    made = value if isinstance(value, (tuple, list)) else [value]
    if not all(isinstance(t, Tensor) and _small(t) for t in made):
        return None
    if node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    given: dict[Node, Any] = {}
    for source in node.all_input_nodes:
        given[source] = _argument(captured, source, memo)
        if given[source] is None:
            return None
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), given.__getitem__)
    with torch.no_grad():
        return node.target(*args, **kwargs)


def _small(tensor: Tensor) -> bool:
    return all(isinstance(s, int) for s in tensor.shape) and tensor.numel() <= _LIMIT


def _attribute(captured: Captured, name: str) -> Tensor | None:
    if name.startswith("_roo."):
        return captured.constants.get(name.removeprefix("_roo."))
    frozen = {n: p for n, p in captured.model.named_parameters() if not p.is_floating_point()}
    found = {**frozen, **dict(captured.model.named_buffers())}.get(name)
    return found if found is not None and found.numel() <= _LIMIT else None


def _argument(captured: Captured, node: Node, memo: dict[Node, Any]) -> Any:
    if node.target is getattr:
        return torch.device("cpu")
    return _value(captured, node, memo)
