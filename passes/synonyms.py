"""Ops with another name and other defaults, said as the op that every later pass knows.

hsplit(x, 4), tensor_split(x, [8, 16])   split_with_sizes(x, sizes, dim)
inner(x, matrix), mv(x, vector)          linear(x, matrix), matmul(x, vector)
subtract, divide, negative, ...          sub, div, neg, ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from passes.traced import called
from roo_rewrite.capture import Captured
from roo_rewrite.facts import AUTOCAST

aten = torch.ops.aten
Synonym = Callable[[Captured, Node], Node | None]


def _said(captured: Captured, node: Node, target: Any, *args: Any) -> Node:
    with captured.graph.inserting_before(node):
        new = called(captured.graph, target, *args)
    new.meta = {**node.meta, **new.meta}
    return new


def _ndim(node: Any) -> int:
    return int(node.meta["val"].ndim)


def _renamed(target: Any) -> Synonym:
    """The same arguments, the same defaults."""

    def say(captured: Captured, node: Node) -> Node | None:
        if node.kwargs or AUTOCAST in node.meta:
            return None
        return _said(captured, node, target, *node.args)

    return say


def _cut(dim: int | None) -> Synonym:
    """A split by sizes, of a dim whose size and cuts are numbers; dim None: an argument."""

    def say(captured: Captured, node: Node) -> Node | None:
        x: Any
        cuts: Any
        x, cuts, *rest = node.args
        at = dim if dim is not None else rest[0] if rest else node.kwargs.get("dim", 0)
        assert isinstance(at, int)
        if _ndim(x) <= at:
            return None
        total = x.meta["val"].shape[at]
        if not isinstance(total, int):
            return None
        ends = cuts if isinstance(cuts, Sequence) else list(range(total // cuts, total, total // cuts))
        bounds = [0, *ends, total]
        if any(not isinstance(b, int) for b in bounds) or bounds != sorted(bounds):
            return None
        sizes = [b - a for a, b in zip(bounds, bounds[1:])]
        return _said(captured, node, aten.split_with_sizes.default, x, sizes, at)

    return say


def _inner(captured: Captured, node: Node) -> Node | None:
    """A linear map by a matrix of rows, or the products with a vector."""
    x, y = node.args
    if AUTOCAST in node.meta or _ndim(x) < 2 or _ndim(y) not in (1, 2):
        return None
    return _said(captured, node, aten.linear.default if _ndim(y) == 2 else aten.matmul.default, x, y)


def _addmv(captured: Captured, node: Node) -> Node | None:
    if node.kwargs or AUTOCAST in node.meta:
        return None
    bias, x, vector = node.args
    return _said(captured, node, aten.add.Tensor, bias, _said(captured, node, aten.matmul.default, x, vector))


def _flipped(dim: int) -> Synonym:
    return lambda captured, node: _said(captured, node, aten.flip.default, node.args[0], [dim])


SYNONYMS: dict[Any, Synonym] = {
    aten.tensor_split.indices: _cut(None),
    aten.hsplit.array: _cut(1),
    aten.hsplit.int: _cut(1),
    aten.dsplit.array: _cut(2),
    aten.dsplit.int: _cut(2),
    aten.inner.default: _inner,
    aten.mv.default: _renamed(aten.matmul.default),
    aten.addmv.default: _addmv,
    aten.fliplr.default: _flipped(1),
    aten.broadcast_to.default: _renamed(aten.expand.default),
    aten.multiply.Tensor: _renamed(aten.mul.Tensor),
    aten.divide.Tensor: _renamed(aten.div.Tensor),
    aten.true_divide.Tensor: _renamed(aten.div.Tensor),
    aten.subtract.Tensor: _renamed(aten.sub.Tensor),
    aten.negative.default: _renamed(aten.neg.default),
}
