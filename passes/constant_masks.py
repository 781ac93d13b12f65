"""What a constant mask picks is picked by index: its size is then known.

    before                                     after
    masked_select(x: [B, 6, 6], m)             reshape(index_select(reshape(x, [-1, 36]), 1, at), [-1])
    index(x: [B, 6, 6], [None, m])             index(x, [None, rows, columns])
    nonzero(m)                                 a literal: [15, 2]

m: a mask [6, 6] that buffers and factory ops alone make. The trace has a size of its own for what such an op
picks, which nothing can be proved of; what follows is traced again with the true one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from passes.constants import evaluate
from passes.traced import traced
from roo_rewrite.capture import Captured

aten = torch.ops.aten


def constant_masks(captured: Captured) -> None:
    """Replaces the picks by constant masks in the captured graph, in place."""
    while _round(captured):
        pass


def _round(captured: Captured) -> bool:
    """One round; False where nothing came of it."""
    made: dict[Node, Any] = {}
    for node in list(captured.graph.nodes):
        replace = _PICKS.get(node.target)
        found = replace(captured, node) if replace is not None and _unknown(node.meta.get("val")) else None
        if found is not None:
            made[node] = found
    if len(made) < 2 or not _settle(captured, made):
        return any(_settle(captured, {node: found}) for node, found in made.items())
    return True  # together: what is made of two picks had two sizes of its own


def _settle(captured: Captured, made: dict[Node, Any]) -> bool:
    """Puts what was made in the place of these nodes; False where what follows does not take it."""
    values = _traced_again(captured, made)
    if values is None:
        return False
    for later, value in values.items():
        later.meta["val"] = value
    for node, found in made.items():
        _put(captured, node, found)
    return True


def _unknown(value: Any) -> bool:
    """Whether some size of a traced value is known at run time only."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(
        isinstance(s, SymInt) and not s.node.has_hint() for v in values if isinstance(v, Tensor) for s in v.shape
    )


def _call(captured: Captured, target: Any, *args: Any) -> Node:
    made = captured.graph.call_function(target, args)
    made.meta["val"] = traced(target, torch.fx.map_arg(args, lambda n: n.meta["val"]))
    return made


def _literal(captured: Captured, value: Tensor) -> Node:
    name = f"constant_{len(captured.constants)}"
    captured.constants[name] = value.contiguous()
    made = captured.graph.get_attr(f"_roo.{name}")
    made.meta["val"] = _mode(captured).from_tensor(value, static_shapes=True)
    return made


def _mode(captured: Captured) -> Any:
    values = (n.meta.get("val") for n in captured.graph.nodes)
    return next(v.fake_mode for v in values if isinstance(v, FakeTensor))


# -- the three ops; each returns the new value, or None where its mask is not constant


def _masked_select(captured: Captured, node: Node) -> Node | None:
    x, mask = node.args
    assert isinstance(x, Node)
    assert isinstance(mask, Node)
    value = _mask(captured, mask)
    if value is None:
        return None
    own = x.meta["val"].shape
    inner = list(value.shape)  # that of the broadcast, in the dims of the mask
    for dim, size in enumerate(own[max(len(own) - value.ndim, 0) :], max(value.ndim - len(own), 0)):
        inner[dim] = size if inner[dim] == 1 else inner[dim]
    if not value.ndim or any(not isinstance(s, int) for s in inner) or not math.prod(inner):
        return None
    at = value.expand(inner).flatten().nonzero().flatten()
    with captured.graph.inserting_before(node):
        if list(own[-len(inner) :]) != inner:
            x = _call(captured, aten.expand.default, x, [*[-1] * (len(own) - len(inner)), *inner])
        rows = _call(captured, aten.reshape.default, x, [-1, math.prod(inner)])
        picked = _call(captured, aten.index_select.default, rows, 1, _literal(captured, at))
        return _call(captured, aten.reshape.default, picked, [-1])


def _mask(captured: Captured, mask: Node) -> Tensor | None:
    """The value of a mask, without the dims over which it is only repeated."""
    while mask.target in (aten.expand.default, aten.expand_as.default):
        source = mask.args[0]
        assert isinstance(source, Node)
        mask = source
    value = evaluate(captured, mask)
    while value is not None and value.ndim and value.shape[0] == 1:
        value = value[0]
    return value if value is not None and value.dtype == torch.bool else None


def _index(captured: Captured, node: Node) -> Node | None:
    x, indices = node.args
    assert isinstance(indices, (list, tuple))
    masks = {i: evaluate(captured, i) for i in indices if isinstance(i, Node) and _is_mask(i)}
    if not masks or any(value is None for value in masks.values()):
        return None
    made: list[Any] = []
    with captured.graph.inserting_before(node):
        for index in indices:
            value = masks.get(index) if isinstance(index, Node) else None
            made += [index] if value is None else [_literal(captured, at) for at in value.nonzero(as_tuple=True)]
        return _call(captured, aten.index.Tensor, x, made)


def _is_mask(index: Node) -> bool:
    return index.meta["val"].dtype in (torch.bool, torch.uint8)


def _nonzero(captured: Captured, node: Node) -> Node | list[Node] | None:
    source = node.args[0]
    assert isinstance(source, Node)
    value = evaluate(captured, source)
    if value is None:
        return None
    with captured.graph.inserting_before(node):
        if node.target is aten.nonzero.default:
            return _literal(captured, value.nonzero())
        return [_literal(captured, at) for at in value.nonzero(as_tuple=True)]


_PICKS: dict[Any, Callable[[Captured, Node], Any]] = {
    aten.masked_select.default: _masked_select,
    aten.index.Tensor: _index,
    aten.nonzero.default: _nonzero,
    aten.nonzero_numpy.default: _nonzero,
}


# -- what follows


def _traced_again(captured: Captured, made: dict[Node, Any]) -> dict[Node, Any] | None:
    """The traced values of what depends on these nodes, had they those of what was made; None where one cannot be
    told."""
    new: dict[Node, Any] = {}

    def value(node: Node) -> Any:
        return new[node] if node in new else node.meta["val"]

    for later in captured.graph.nodes:
        if later in made:
            new[later] = torch.fx.map_arg(made[later], value)
        elif later.op == "call_function" and any(n in new for n in later.all_input_nodes):
            args, kwargs = torch.fx.map_arg((later.args, later.kwargs), value)
            try:
                new[later] = traced(later.target, args, kwargs)
            except Exception:  # whatever a kernel raises: what was traced stays
                return None
    return new


def _put(captured: Captured, node: Node, made: Node | list[Node]) -> None:
    """`made` in the place of `node`; a reshape of what was flattened is one of what it was flattened from."""
    if isinstance(made, list):
        for user in list(node.users):
            user.replace_all_uses_with(made[user.args[1]])  # type: ignore[index]
            captured.graph.erase_node(user)
        captured.graph.erase_node(node)
        return
    node.replace_all_uses_with(made)
    captured.graph.erase_node(node)
    if made.target is aten.reshape.default:
        for user in list(made.users):
            if user.target in (aten.reshape.default, aten.view.default):
                user.replace_input_with(made, made.args[0])  # type: ignore[arg-type]
