"""Products with a broadcast operand are taken at the request's rate.

    before                                    after
    e = jagged_broadcast(K, rows, 0)          layout = jagged_layout(counts, rows)
    s = bmm(q, e)                             s = jagged_einsum("bik,bkj->bij", q, K, layout)

and so for matmul, einsum of two, attention, and a product summed over a dim. Called by `lower`.
Postcondition: no product reads a broadcast value it could read at R rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch.fx import Graph, Node

from passes.functionalize import keeps
from passes.traced import traced
from roo_rewrite.facts import SIDE, Provenance
from roo_rewrite.ops.broadcast import jagged_broadcast
from roo_rewrite.ops.mixed_rate import jagged_einsum, jagged_layout
from roo_rewrite.rules.matmul import spelled_out

aten = torch.ops.aten
_LETTERS = "bcdefgh"


class Layouts:
    """The layout of the impressions, made once where it is first asked for."""

    def __init__(self, graph: Graph, counts: Node):
        self.graph, self.counts = graph, counts
        self.made: dict[Node, Node] = {}

    def of(self, rows: Any) -> Node:
        """The node of the layout of `rows`, the request of each impression."""
        if rows not in self.made:
            with self.graph.inserting_after(rows):
                self.made[rows] = self.graph.call_function(jagged_layout, (self.counts, rows))
            self.made[rows].meta[SIDE] = Provenance.IMPRESSION
        return self.made[rows]


def mixed_rate(graph: Graph, layouts: Layouts) -> None:
    """Rewrites the products of a hoisted graph in place."""
    for node in list(graph.nodes):
        if node.target is aten.scaled_dot_product_attention.default and is_broadcast(node.args[1]):
            _unfold_attention(graph, node)
    for node in list(graph.nodes):
        found = product_of(node)
        if found is None:
            continue
        equation, x, y = found
        letters = equation.split("->")[0].split(",")[1]
        if not is_broadcast(y) or is_broadcast(x) or len(_shape(y)) != len(letters):
            continue
        _batch_first(y.args[0])
        layout = layouts.of(y.args[1])
        with graph.inserting_before(node):
            new = graph.call_function(jagged_einsum, (equation, _shaped(graph, x, equation), y.args[0], layout))
        _take_over(graph, node, _like(new, node))
    graph.eliminate_dead_code(is_impure_node=keeps)


def _batch_first(node: Any) -> None:
    """einsum("nhm,bmx->bnhx", W, u) as einsum("bmx,nhm->bnhx", u, W): its rows then lie as the batch reads them."""
    if node.target is not aten.einsum.default or len(node.args[1]) != 2:
        return
    left, arrow, out = node.args[0].partition("->")
    first, _, second = left.partition(",")
    if arrow and "." not in left and out[0] in second and out[0] not in first:
        node.args = (f"{second},{first}->{out}", node.args[1][::-1], *node.args[2:])


def at_request_rate(user: Node, node: Node) -> bool:
    """Whether `user` is a product that can read `node` at R rows, its other operand having I rows."""
    if user.target is aten.scaled_dot_product_attention.default:
        named = _attention_arguments(user)
        return node in (named["key"], named["value"]) and node is not named["query"] and _unfolds(named)
    found = written(user)
    if found is None or isinstance(_shape(node)[0], int):  # the batch lies in another dim
        return False
    (first, second, out), x, y = found
    if x is y or node not in (x, y) or not (first and second and out) or not first[0] == second[0] == out[0]:
        return False
    return len(_shape(node)) == len(first if node is x else second)


def is_broadcast(node: Any) -> bool:
    """Whether a node is the plain broadcast of rows in dim 0."""
    return isinstance(node, Node) and node.target is jagged_broadcast and node.args[2:] == (0, 1, 1)


def product_of(node: Node) -> tuple[str, Node, Node] | None:
    """A product as an einsum over the batch "b" of both operands: (equation, other operand, candidate for R rows).

    Of two operands the second is the one that is broadcast, if either is.
    """
    found = written(node)
    if found is None:
        return None
    (first, second, out), x, y = found
    if not first or not second or not out or first[0] != second[0] or out[0] != first[0]:
        return None
    return (f"{first},{second}->{out}", x, y) if not is_broadcast(x) else (f"{second},{first}->{out}", y, x)


def written(node: Node) -> tuple[tuple[str, str, str], Node, Node] | None:
    """Letters of both operands and the result of a product, and the operands."""
    shape = _shape
    match node.target:
        case aten.bmm.default:
            x, y = node.args[:2]
            return ("bik", "bkj", "bij"), x, y  # type: ignore[return-value]
        case aten.matmul.default:
            x, y = node.args[:2]
            lead = _LETTERS[: len(shape(x)) - 2]
            same = len(shape(x)) == len(shape(y)) and len(shape(x)) > 2
            if not same or any(str(a) != str(b) for a, b in zip(shape(x)[:-2], shape(y)[:-2])):
                return None
            return (f"{lead}ik", f"{lead}kj", f"{lead}ij"), x, y  # type: ignore[return-value]
        case aten.einsum.default:
            equation, operands = node.args[:2]
            if not isinstance(operands, (list, tuple)) or len(operands) != 2 or len(node.args) > 2:
                return None
            x, y = operands
            left, out = spelled_out(str(equation), [len(shape(x)), len(shape(y))]).split("->")
            first, second = left.split(",")
            repeated = any(len(set(t)) < len(t) for t in (first, second))
            return None if repeated or "Z" in left else ((first, second, out), x, y)  # type: ignore[return-value]
        case aten.sum.dim_IntList:
            return _summed(node)
    return None


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _summed(node: Node) -> tuple[tuple[str, str, str], Node, Node] | None:
    """sum(x * y, dims) where nothing else reads the product and both have all dims.

    Dots of vectors stay, many of them too: nothing of one operand is read twice, and they are faster so.
    """
    inner: Any = node.args[0]
    dims: Any = node.args[1]
    keepdim = len(node.args) > 2 and node.args[2]
    if not isinstance(inner, Node) or inner.target is not aten.mul.Tensor or len(inner.users) > 1 or keepdim:
        return None
    x, y = inner.args
    dtypes = {n.meta["val"].dtype if isinstance(n, Node) else None for n in (x, y, node)}
    if not dims or len(dtypes) > 1 or not node.meta["val"].is_floating_point():
        return None
    full = _shape(inner)
    if not all(isinstance(f, Node) and len(_shape(f)) == len(full) for f in (x, y)) or len(full) < 3:
        return None
    letters = "bijklmn"[: len(full)]
    gone = {d % len(full) for d in dims}
    if 0 in gone or len(full) > 7 or node.kwargs:
        return None
    names = ["".join(c for c, n in zip(letters, _shape(f)) if not (isinstance(n, int) and n == 1)) for f in (x, y)]
    sizes_one = [c for c, n in zip(letters, full) if isinstance(n, int) and n == 1]
    if sizes_one or names[0] == names[1]:
        return None
    out = "".join(c for d, c in enumerate(letters) if d not in gone)
    return (names[0], names[1], out), x, y  # type: ignore[return-value]


def _shaped(graph: Graph, x: Node, equation: str) -> Node:
    """The operand without the dims of size 1 that its letters leave out."""
    letters = equation.split(",")[0]
    shape = _shape(x)
    if len(shape) == len(letters):
        return x
    ones = [d for d, n in enumerate(shape) if isinstance(n, int) and n == 1]
    new = graph.call_function(aten.squeeze.dims, (x, ones))
    return _like(new, x)


def _like(new: Node, node: Node) -> Node:
    new.meta = dict(node.meta)
    return new


def _take_over(graph: Graph, node: Node, new: Node) -> None:
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _unfold_attention(graph: Graph, node: Node) -> None:
    """softmax(q k' * scale + mask) v, as two products, so that keys and values stay at R rows."""
    named = _attention_arguments(node)
    q, k, v, mask = (named[n] for n in ("query", "key", "value", "attn_mask"))
    if not _unfolds(named) or not is_broadcast(v):
        return
    lead = _LETTERS[: len(_shape(q)) - 2]
    scale = named["scale"] if named["scale"] is not None else float(_shape(q)[-1]) ** -0.5
    with graph.inserting_before(node):
        scaled = _make(graph, q, aten.mul.Tensor, q, scale)
        scores = _make(graph, None, aten.einsum.default, f"{lead}ik,{lead}jk->{lead}ij", [scaled, k])
        if mask is not None:
            scores = _masked(graph, scores, mask)
        # A row that sees nothing gets 0, as in the fused op.
        softmax = aten.softmax.int if mask is None else aten._safe_softmax.default
        weights = _make(graph, None, softmax, scores, -1)
        made = _make(graph, node, aten.einsum.default, f"{lead}ij,{lead}jk->{lead}ik", [weights, v])
    _take_over(graph, node, made)


def _unfolds(named: dict[str, Any]) -> bool:
    if named["dropout_p"] or named["is_causal"] or named["enable_gqa"]:
        return False
    q, k = _shape(named["query"]), _shape(named["key"])
    return len(q) > 2 and len(q) == len(k) and all(str(a) == str(b) for a, b in zip(q[:-2], k[:-2]))


def _masked(graph: Graph, scores: Node, mask: Node) -> Node:
    if mask.meta["val"].dtype == torch.bool:
        banned = _make(graph, None, aten.logical_not.default, mask)
        return _make(graph, None, aten.masked_fill.Scalar, scores, banned, float("-inf"))
    return _make(graph, None, aten.add.Tensor, scores, mask)


def _attention_arguments(node: Node) -> dict[str, Any]:
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip([a.name for a in schema], node.args))
    return {a.name: given.get(a.name, node.kwargs.get(a.name, a.default_value)) for a in schema}


def _make(graph: Graph, like: Node | None, target: Any, *args: Any) -> Node:
    """A new impression-level node with its traced value."""
    new = graph.call_function(target, args)
    values = torch.fx.map_arg(args, lambda n: n.meta["val"])
    new.meta["val"] = traced(target, values)
    new.meta.update({k: v for k, v in (like.meta if like is not None else {}).items() if k != "val"})
    new.meta[SIDE] = Provenance.IMPRESSION
    return new
