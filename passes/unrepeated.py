"""A value without a batch, repeated for every row, is left to broadcast.

    before                                    after
    m = repeat(mask: [1, T, T], [B, 1, 1])    e = eq(mask, 0)
    e = eq(m, 0)                              masked_fill(scores, e, -inf)
    masked_fill(scores: [B, T, T], e, -inf)

Row by row it is the same: f(x, repeat(c)) = f(x, c), f pointwise, where x alone gives the result its shape. So a mask
repeated for heads that lie before the batch does not say that they lie behind it. A linear map of such a value, or of
one number in the shape of the batch, is one, and so is a lookup:

    linear(repeat(c), W) = expand(linear(c, W))        embedding(W, repeat(c)) = expand(embedding(W, c))
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from passes.drawn import draws
from passes.functionalize import is_effect, mutated
from passes.one_number import NUMBERS, put
from passes.traced import called, traced
from roo_rewrite.capture import Captured
from roo_rewrite.errors import NotRowWise
from roo_rewrite.guards import BATCH

aten = torch.ops.aten
_MAPS: dict[Any, int] = {aten.linear.default: 0, aten.embedding.default: 1}  # which operand is mapped


def unrepeated(captured: Captured) -> None:
    """Gives pointwise ops the values that were repeated, in place."""
    small: dict[Node, Node] = {}
    mapped: dict[Node, Node] = {}
    for node in list(captured.graph.nodes):
        if not isinstance(node.target, OpOverload) or is_effect(node):
            continue
        if node.target in (aten.repeat.default, aten.expand.default):
            source = _repeated(captured, node)
            if source is not None:
                small[node] = source
        elif node.target in _MAPS:
            found = _map(captured, node, small)
            if found is not None:
                small[node] = found
                mapped[node] = node.all_input_nodes[_MAPS[node.target]]
        elif torch.Tag.pointwise in node.target.tags and not draws(node) and not node.target._schema.is_mutable:
            _pointwise(captured, node, small)
            through = [n for n in node.all_input_nodes if n in mapped] if node in small else []
            if through:
                mapped[node] = through[0]
    for node in reversed(mapped):
        if node.users and not any(u.op == "output" for u in node.users):
            _expand(captured, node, small[node], mapped)


def _expand(captured: Captured, node: Node, value: Node, mapped: dict[Node, Node]) -> None:
    """Puts `value` in the place of `node`, repeated in name alone."""
    root = node
    while root in mapped:
        root = mapped[root]
    before = {captured.expr(s): d for d, s in reversed(list(enumerate(root.meta["val"].shape)))}
    shape = node.meta["val"].shape
    if not all(isinstance(s, int) or captured.expr(s) in before for s in shape):
        return
    with captured.graph.inserting_before(node):
        sizes = [
            s if isinstance(s, int) else called(captured.graph, aten.sym_size.int, root, before[captured.expr(s)])
            for s in shape
        ]
        made = called(captured.graph, aten.expand.default, value, sizes)
    made.meta = {**node.meta, **made.meta}
    node.replace_all_uses_with(made)
    captured.graph.erase_node(node)


def _repeated(captured: Captured, node: Node) -> Node | None:
    """The value without a batch that `node` repeats for every row of the batch; its own dims stay or have size 1."""
    x = node.args[0]
    assert isinstance(x, Node)
    before, after = _shape(captured, x), _shape(captured, node)
    if not before or any(s.has(BATCH) for s in before) or not any(s.has(BATCH) for s in after):
        return None
    grown = [a for b, a in zip([sympy.Integer(1)] * (len(after) - len(before)) + before, after) if b != 1 and a != b]
    return None if grown else x


def _number(captured: Captured, node: Node) -> Node | None:
    """One number in the shape of the batch, with size 1 there."""
    if node.target not in NUMBERS or any(node in mutated(u) for u in node.users):
        return None
    value, number = node.meta["val"], NUMBERS[node.target](node)
    batched = [s.has(BATCH) for s in _shape(captured, node)]
    known = any(batched) and all(b or isinstance(n, int) for b, n in zip(batched, value.shape))
    if isinstance(number, Node) or not known:
        return None
    sizes = [1 if b else n for b, n in zip(batched, value.shape)]
    return put(captured, node, aten.full.default, (sizes, number), {"dtype": value.dtype, "device": value.device})


def _map(captured: Captured, node: Node, small: dict[Node, Node]) -> Node | None:
    """A linear map or a lookup of a repeated value, by weights without a batch."""
    x = node.args[_MAPS[node.target]]
    weights = [n for n in node.all_input_nodes if n is not x]
    if not isinstance(x, Node) or any(s.has(BATCH) for w in weights for s in _shape(captured, w)):
        return None
    if node.target is aten.embedding.default and len(node.args) > 3 and node.args[3]:
        return None  # gradients are divided by how often an index occurs
    source = small.get(x) or _number(captured, x)
    known = {} if source is None else {x: source}
    value, full = _unrepeated_value(node, known) if known else None, node.meta["val"]
    if value is not None and (value.shape[-1], value.dtype) == (full.shape[-1], full.dtype):
        return _once(captured, node, value, known)
    return None


def _pointwise(captured: Captured, node: Node, small: dict[Node, Node]) -> None:
    operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    value = _unrepeated_value(node, small) if any(n in small for n in operands) else None
    if value is None or value.dtype != node.meta["val"].dtype:
        return
    if [captured.expr(s) for s in value.shape] == _shape(captured, node):
        for n in operands:
            if n in small:
                node.replace_input_with(n, small[n])
    elif all(n in small for n in operands):
        small[node] = _once(captured, node, value, small)


def _once(captured: Captured, node: Node, value: Tensor, small: dict[Node, Node]) -> Node:
    """The op on the values as they were before, beside the op itself."""
    with captured.graph.inserting_before(node):
        made = captured.graph.node_copy(node, lambda n: small.get(n, n))
    made.meta = {**node.meta, "val": value}
    return made


def _unrepeated_value(node: Node, small: dict[Node, Node]) -> Tensor | None:
    """What the op gives on the values as they were before; None where it does not take them."""
    args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: small.get(n, n).meta["val"])
    try:
        value = traced(node.target, args, kwargs)  # type: ignore[arg-type]
    except (NotRowWise, RuntimeError):
        return None
    return value if isinstance(value, Tensor) else None


def _shape(captured: Captured, node: Node) -> list[sympy.Expr]:
    return [captured.expr(s) for s in node.meta["val"].shape]
