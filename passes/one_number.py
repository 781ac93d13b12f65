"""Operands that are one number everywhere, of many times the batch's size, are made without it.

    before                                      after
    low = ones([2 * B, T, T]) * -1e9            low = ones([1, 1, 1]) * -1e9
    where(m: [2 * B, T, 1], low, scores)        where(m, low, scores)

Where heads stand in front of the batch or behind it the size of a constant does not say which. One number fits both.
Only where the other operands have the shape of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from passes.functionalize import mutated
from passes.traced import traced
from roo_rewrite.capture import Captured
from roo_rewrite.facts import AUTOCAST, EFFECT
from roo_rewrite.guards import BATCH

aten = torch.ops.aten
NUMBERS: dict[Any, Callable[[Node], Any]] = {
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), lambda n: 1),
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), lambda n: 0),
    **dict.fromkeys((aten.full.default, aten.full_like.default), lambda n: n.args[1]),
    aten.new_full.default: lambda n: n.args[2],
}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.detach.default}


def one_number(captured: Captured) -> None:
    """Rewrites the captured graph in place."""
    small: dict[Node, Node | None] = {}
    for node in list(captured.graph.nodes):
        if not _pointwise(node):
            continue
        for source in node.all_input_nodes:
            if _many_rows(captured, source) and _spared(captured, node, source):
                made = _small(captured, source, small)
                if made is not None:
                    node.replace_input_with(source, made)


def _many_rows(captured: Captured, node: Node) -> bool:
    """Whether some dim is the batch several times."""
    value = node.meta.get("val")
    sizes = [captured.expr(s) for s in value.shape] if isinstance(value, Tensor) else []
    return any(BATCH in s.free_symbols and s != BATCH for s in sizes)


def _spared(captured: Captured, node: Node, source: Node) -> bool:
    """Whether the other operands of a pointwise op have the shape of its result without `source`."""
    value = node.meta["val"]
    others = [n.meta["val"] for n in node.all_input_nodes if n is not source and isinstance(n.meta.get("val"), Tensor)]
    if not isinstance(value, Tensor) or source.meta["val"].ndim > max((o.ndim for o in others), default=0):
        return False
    for back in range(1, value.ndim + 1):
        sizes = {captured.expr(o.shape[-back]) for o in others if o.ndim >= back}
        if captured.expr(value.shape[-back]) not in sizes:
            return False
    return True


def _small(captured: Captured, node: Node, small: dict[Node, Node | None]) -> Node | None:
    """The same number with size 1 in every dim; None where the value is more than that."""
    if node not in small:
        small[node] = _made(captured, node, small)
    return small[node]


def _made(captured: Captured, node: Node, small: dict[Node, Node | None]) -> Node | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.ndim or EFFECT in node.meta or AUTOCAST in node.meta:
        return None
    if any(node in mutated(u) for u in node.users):
        return None
    if node.target in NUMBERS:
        number = NUMBERS[node.target](node)
        made = None if isinstance(number, Node) else ([1] * value.ndim, number)
        return made and put(captured, node, aten.full.default, made, {"dtype": value.dtype, "device": value.device})
    if not _pointwise(node) and node.target not in _CASTS:
        return None
    operands = {n: _small(captured, n, small) for n in node.all_input_nodes}
    if not operands or any(made is None for made in operands.values()):
        return None
    return put(captured, node, node.target, *torch.fx.map_arg((node.args, node.kwargs), lambda n: operands[n]))


def put(captured: Captured, node: Node, target: Any, args: Any, kwargs: Any) -> Node:
    """A call beside `node`, in its name."""
    with captured.graph.inserting_before(node):
        made = captured.graph.call_function(target, tuple(args), kwargs)
    value = traced(target, *torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"]))
    mode = node.meta["val"].fake_mode
    made.meta = {
        **node.meta,
        "val": value if isinstance(value, FakeTensor) else mode.from_tensor(value, static_shapes=True),
    }
    return made


def _pointwise(node: Node) -> bool:
    """Whether an op treats every entry alike, and draws nothing."""
    tags = node.target.tags if isinstance(node.target, OpOverload) else ()
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags and EFFECT not in node.meta
