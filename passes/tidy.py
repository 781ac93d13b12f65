"""The same values in fewer calls: of a small batch, starting ops takes longer than their work.

    before                                        after
    reshape(unsqueeze(x: [B, k], 1), [B, k])      x
    cat([unsqueeze(x, 1), unsqueeze(y, 1)], 1)    stack([x, y], 1)
    s = stack([x, y], 1); c = cat([x, y], 1)      c = reshape(s, [-1, 2 * k])
    cat([t(x), t(y)], 2), of c = cat([x, y], 1)   t(c)                                      t: transpose(., 1, 2)
    add(x, mul(y, -0.5))                          add(x, y, alpha=-0.5)

A view that keeps entries in their order, row by row, is its operand in another shape. So are two concatenations of
the same parts, in their order, whose parts lie in memory as often: `outer` runs of each part's entries.
Called by `lower`. Postcondition: no such view has the shape of what it is a view of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from passes.forms import is_static, same_shape
from passes.functionalize import keeps, mutated
from passes.traced import traced
from roo_rewrite.facts import AUTOCAST, EFFECT, SIDE
from roo_rewrite.nodes import replaced

aten = torch.ops.aten

# Views of the entries in their order.
_IN_ORDER = {
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unflatten.int,
    aten.unsqueeze.default,
}
_SUMS = (aten.add.Tensor, aten.add_.Tensor)


def tidy(graph: Graph) -> None:
    """Rewrites the views and concatenations of a hoisted graph in place."""
    written = {n for node in graph.nodes for n in mutated(node)}
    for node in list(graph.nodes):
        if node.target in _IN_ORDER and plain(node):
            _unviewed(graph, node)
    graph.eliminate_dead_code(is_impure_node=keeps)
    made: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.target in (aten.cat.default, aten.stack.default) and plain(node):
            _concatenated(graph, node, made, written)
    graph.eliminate_dead_code(is_impure_node=keeps)


def plain(node: Node) -> bool:
    """A tensor that may be made in another way, wherever it is read."""
    effect = any(EFFECT in n.meta for n in (node, *node.all_input_nodes))
    return AUTOCAST not in node.meta and not effect and isinstance(node.meta.get("val"), Tensor)


def _origins(node: Node) -> list[Node]:
    """What a node is a view of in order, nearest first."""
    found = []
    while node.target in _IN_ORDER and plain(node):
        node = node.args[0]  # type: ignore[assignment]
        found.append(node)
    return found


def _unviewed(graph: Graph, node: Node) -> None:
    """A view in the shape of an origin is that origin."""
    for origin in _origins(node):
        same = same_shape(origin.meta["val"].shape, node.meta["val"].shape)
        if same and origin.meta[SIDE] is node.meta[SIDE]:
            node.replace_all_uses_with(origin)
            return


def _concatenated(graph: Graph, node: Node, made: dict[Any, Node], written: set[Node]) -> None:
    """A concatenation as a view of an earlier one, or as a stack."""
    parts: Any = node.args[0]
    shape = node.meta["val"].shape
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    dim, values = given % len(shape), [part.meta["val"] for part in parts]
    origins = [(_origins(part) or [part])[-1] for part in parts]
    if len(parts) < 2 or len({v.dtype for v in values}) > 1 or written & {node, *origins}:
        return
    whole = _transposed(node, dim, parts, made, written)
    if whole is not None:
        view = replaced(graph, node, aten.transpose.int, *whole)
        view.meta["val"] = traced(aten.transpose.int, (whole[0].meta["val"], *whole[1:]))
        return
    key = (node.meta[SIDE], _times(shape[:dim]), tuple(origins))
    flat = [int(s) if is_static(s) else -1 for s in shape]
    if key in made and flat.count(-1) < 2 and 0 not in flat:
        replaced(graph, node, aten.reshape.default, made[key], flat)
        return
    made.setdefault(key, node)
    inner = [p.args[0] for p in parts if _adds_dim(p, dim)]
    alike = all(same_shape(values[0].shape, v.shape) for v in values)
    if node.target is aten.cat.default and alike and len(inner) == len(parts):
        made[key] = replaced(graph, node, aten.stack.default, inner, dim)


def _transposed(
    node: Node, dim: int, parts: Sequence[Node], made: dict[Any, Node], written: set[Node]
) -> tuple[Node, int, int] | None:
    """The concatenation and the two dims that `node`, of its parts transposed, is the transpose by."""
    ndim = node.meta["val"].ndim
    if node.target is not aten.cat.default or any(p.target is not aten.transpose.int or not plain(p) for p in parts):
        return None
    swaps = {tuple(sorted(d % ndim for d in p.args[1:])) for p in parts}
    if len(swaps) > 1:
        return None
    a, b = swaps.pop()
    order = list(range(ndim))
    order[a], order[b] = b, a
    shape = [node.meta["val"].shape[d] for d in order]
    sources: list[Any] = [p.args[0] for p in parts]
    origins = tuple((_origins(x) or [x])[-1] for x in sources)
    found = made.get((node.meta[SIDE], _times(shape[: order[dim]]), origins))
    if found is None or found in written or not same_shape(found.meta["val"].shape, shape):
        return None
    return found, a, b


def _adds_dim(part: Node, dim: int) -> bool:
    return part.target is aten.unsqueeze.default and plain(part) and part.args[1] % part.meta["val"].ndim == dim


def _times(sizes: Sequence[Any]) -> tuple[int, tuple[str, ...]]:
    """A product of traced sizes."""
    return math.prod(s for s in sizes if is_static(s)), tuple(str(s) for s in sizes if not is_static(s))


def scaled_terms(graph: Graph) -> None:
    """A sum takes the number that scales its second term."""
    for node in list(graph.nodes):
        if node.target not in _SUMS or len(node.args) != 2 or node.kwargs or not plain(node):
            continue
        x, y = node.args
        pairs = [(x, y)] if node.target is aten.add_.Tensor else [(x, y), (y, x)]
        for kept, scaled in pairs:
            if _is_scaled(scaled, node) and isinstance(kept, Node) and kept is not scaled:
                inner, factor = scaled.args
                node.args, node.kwargs = (kept, inner), {"alpha": factor}
                break
    graph.eliminate_dead_code(is_impure_node=keeps)


def _is_scaled(term: Any, total: Node) -> bool:
    """Whether a term is a tensor times a number, read by the sum alone."""
    if not isinstance(term, Node) or term.target is not aten.mul.Tensor or list(term.users) != [total]:
        return False
    x, factor = term.args
    values = [n.meta.get("val") for n in (*total.all_input_nodes, x) if isinstance(n, Node)]
    like = total.meta["val"]
    return (
        plain(term)
        and isinstance(x, Node)
        and isinstance(factor, (int, float))
        and like.is_floating_point()
        and all(isinstance(v, Tensor) and v.dtype == like.dtype for v in values)
    )
