"""Sums and activations are written into a buffer that is there already, broadcasts are read where they lie.

    before                                        after
    e = jagged_broadcast(a, rows, 0)              s = jagged_apply("add", q, a, layout)
    p = linear(k, W)                              t = linear_onto(s, k, W)
    y = relu(add(e, add(q, p)))                   y = relu_(t)
    z = add(mul(v, r), b)                         z = addcmul(b, v, r)

Called by `lower`. Postcondition: an op in place writes into a value made for it alone: a fresh tensor with one
reader on its own side, which no backward needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.fx import Graph, Node

from passes.functionalize import keeps
from passes.mixed_rate import Layouts, is_broadcast
from roo_rewrite.facts import AUTOCAST, SIDE
from roo_rewrite.facts import META as ANNOTATION
from roo_rewrite.ops.accumulate import linear_onto
from roo_rewrite.ops.broadcast import jagged_broadcast
from roo_rewrite.ops.conv import pointwise_conv, weight_times
from roo_rewrite.ops.mixed_rate import jagged_apply

aten = torch.ops.aten

# Ops whose result is new memory that their backward does not read.
FRESH = {
    aten.linear.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.addcmul.default,
    aten.addcmul_.default,
    aten.baddbmm.default,
    aten.add.Tensor,
    aten.add_.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.layer_norm.default,
    jagged_broadcast,
    jagged_apply,
    linear_onto,
    pointwise_conv,
    weight_times,
}
# Ops whose backward reads their result, not their operand.
IN_PLACE = {
    aten.relu.default: aten.relu_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.tanh.default: aten.tanh_.default,
}
_APPLIED = {aten.add.Tensor: "add", aten.mul.Tensor: "mul"}


def fuse(graph: Graph, layouts: Layouts) -> None:
    """Rewrites a hoisted graph in place."""
    for node in list(graph.nodes):
        if _is_sum(node) and not _is_inner(node):
            _sum(graph, node)
    graph.eliminate_dead_code(is_impure_node=keeps)
    for node in list(graph.nodes):
        _apply(graph, node, layouts)
    for node in list(graph.nodes):
        _in_place(graph, node)


def is_own(value: Any, reader: Node) -> bool:
    """Whether `reader` may write its result into `value`."""
    return isinstance(value, Node) and list(value.users) == [reader] and _is_fresh(value, reader)


def _is_fresh(value: Node, like: Node) -> bool:
    """Whether a value is new memory of the side, shape and dtype of another."""
    return (
        value.target in FRESH
        and not (value.target is jagged_broadcast and value.args[3:] != (1, 1))  # a view for autograd
        and value.meta[SIDE] is like.meta[SIDE]
        and not any(AUTOCAST in n.meta for n in (value, like))
        and _same(value, like)
    )


def _same(a: Node, b: Node) -> bool:
    """Whether two nodes have the same traced shape and dtype."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.dtype != y.dtype:
        return False
    return [str(s) for s in x.shape] == [str(s) for s in y.shape]


def _is_sum(node: Node) -> bool:
    """A plain sum of two tensors."""
    return (
        node.target is aten.add.Tensor
        and len(node.args) == 2
        and not node.kwargs
        and AUTOCAST not in node.meta
        and all(isinstance(a, Node) and isinstance(a.meta.get("val"), Tensor) for a in node.args)
    )


def _terms(node: Node) -> Iterator[Node]:
    """The terms of a sum, those of sums read nowhere else in their place."""
    for term in node.args:
        assert isinstance(term, Node)
        if _is_inner(term):
            yield from _terms(term)
        else:
            yield term


def _is_inner(node: Node) -> bool:
    """Whether a sum is a term of another and read nowhere else."""
    (user, *others) = [*node.users, None]
    return user is not None and others == [None] and _is_sum(node) and _is_sum(user) and is_own(node, user)


def _is_product(node: Node, root: Node) -> bool:
    """Whether a term can be computed onto the others."""
    if node.target is not aten.linear.default or len(node.users) > 1 or not _is_fresh(node, root):
        return False
    dtypes = {n.meta["val"].dtype for n in (node, *node.args[:2])}  # type: ignore[union-attr]
    return len(dtypes) == 1 and len(node.meta["val"].shape) > 1


def _is_scaled(node: Node, root: Node) -> bool:
    """Whether a term is a product, entry by entry, that can be taken onto the others; those with a broadcast stay."""
    if node.target is not aten.mul.Tensor or len(node.users) > 1 or not _is_fresh(node, root) or node.kwargs:
        return False
    values = [a.meta.get("val") if isinstance(a, Node) and not is_broadcast(a) else None for a in node.args]
    like = root.meta["val"]
    return like.is_floating_point() and all(
        isinstance(v, Tensor) and v.dtype == like.dtype and v.device == like.device for v in values
    )


def _sum(graph: Graph, root: Node) -> None:
    """sum(terms) + linear(x, W) + v * r: the other terms first, then the products onto them."""
    terms = list(_terms(root))
    products = [t for t in terms if _is_product(t, root)]
    scaled = [t for t in terms if _is_scaled(t, root)]
    biased = [p for p in products if len(p.args) > 2]
    rest = [t for t in terms if t not in (*products, *scaled)]
    if not rest and not products:
        rest, scaled = scaled[:1], scaled[1:]
    if not (products or scaled) or len(biased) > 1 or len(set(terms)) < len(terms):
        return
    with graph.inserting_before(root):
        total = _total(graph, rest) if rest and not biased else None
        if total is None or (products and not _is_free(total, root)):
            first = (biased or products)[0]
            products.remove(first)
            total = _total(graph, [first, *rest])
        for product in products:
            total = _made(graph.call_function(linear_onto, (total, *product.args[:2])), root)
        for term in scaled:
            onto = aten.addcmul_.default if _is_free(total, root) else aten.addcmul.default
            total = _made(graph.call_function(onto, (total, *term.args)), root)
    _replace_with(graph, root, total)


def _is_free(total: Node, root: Node) -> bool:
    """Whether the terms that are left may be written into the sum of the others."""
    return len(total.users) < 2 and _is_fresh(total, root)


def _total(graph: Graph, terms: list[Node]) -> Node:
    """The sum of terms, broadcasts last, where they need not be carried out."""
    first, *others = sorted(terms, key=is_broadcast)
    for term in others:
        made = graph.call_function(aten.add.Tensor, (first, term))
        made.meta = {k: v for k, v in first.meta.items() if k not in ("val", ANNOTATION)}
        with first.meta["val"].fake_mode:
            made.meta["val"] = first.meta["val"] + term.meta["val"]
        first = made
    return first


def _apply(graph: Graph, node: Node, layouts: Layouts) -> None:
    """x op E y, read off y, where nothing else reads E y."""
    if node.target not in _APPLIED or len(node.args) != 2 or node.kwargs:
        return
    x, y = _operands(node)
    if not is_broadcast(y) or is_broadcast(x) or not isinstance(x, Node) or list(y.users) != [node]:
        return
    if not isinstance(x.meta.get("val"), Tensor):  # a number of rows
        return
    shapes = [tuple(n.meta["val"].shape) for n in (x, y, node)]
    if len({len(s) for s in shapes}) > 1 or str(shapes[0][0]) != str(shapes[2][0]):
        return
    with graph.inserting_before(node):
        args = (_APPLIED[node.target], x, y.args[0], layouts.of(y.args[1]))
        made = _made(graph.call_function(jagged_apply, args), node)
    _replace_with(graph, node, made)
    graph.erase_node(y)


def _in_place(graph: Graph, node: Node) -> None:
    if node.target in IN_PLACE and is_own(node.args[0], node):
        target, args = IN_PLACE[node.target], node.args
    elif _is_sum(node) and not any(map(is_broadcast, node.args)) and any(is_own(n, node) for n in node.args):
        x, y = node.args
        target, args = aten.add_.Tensor, (x, y) if is_own(x, node) else (y, x)
    else:
        return
    with graph.inserting_before(node):
        made = _made(graph.call_function(target, args), node)
    _replace_with(graph, node, made)


def _operands(node: Node) -> list[Any]:
    """The two operands, a broadcast last."""
    return sorted(node.args, key=is_broadcast)


def _made(new: Node, like: Node) -> Node:
    new.meta = dict(like.meta)
    return new


def _replace_with(graph: Graph, node: Node, new: Node) -> None:
    node.replace_all_uses_with(new)
    graph.erase_node(node)
