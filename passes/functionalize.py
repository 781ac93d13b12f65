"""In-place ops become values.

    before                                   after
    y = mul(x, 2)                            y = mul(x, 2)
    s = select(y, 1, 0)                      s = select(y, 1, 0)
    fill_(s, 0.)                             f = fill(s, 0.)
    z = sum(y)                               y1 = select_scatter(y, f, 1, 0)
                                             z = sum(y1)

Postcondition: no node writes into a value that another node made. What still writes (into a buffer, or
through a view that has no inverse here) is marked, with everything that shares its storage, as an
effect in `node.meta["roo_effect"]`: such nodes keep their order and stay at impression level.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx
from torch._ops import OpOverload
from torch.fx import Graph, Node

EFFECT = "roo_effect"
aten = torch.ops.aten

# In-place ops that change the shape of the tensor object only: views by another name.
_RESHAPING = {"unsqueeze_", "squeeze_", "t_", "transpose_", "detach_", "swapaxes_", "swapdims_"}


def functionalize(graph: Graph) -> None:
    """Replaces in-place ops of `graph`, in order. The graph is changed in place."""
    bases: dict[Node, Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function":
            _visit(graph, node, bases)
    graph.eliminate_dead_code(is_impure_node=is_effect)
    graph.lint()


def is_effect(node: Node) -> bool:
    """Whether a node must be kept although nothing reads it."""
    return node.op in ("placeholder", "output") or EFFECT in node.meta


def _visit(graph: Graph, node: Node, bases: dict[Node, Node]) -> None:
    source = viewed(node)
    if source is not None:
        bases[node] = bases.get(source, source)
    target = mutated(node)
    if target is None:
        return
    name = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
    if name in _RESHAPING:
        _rename(graph, node, target, bases)
        return
    base = bases.get(target, target)
    family = [n for n, b in bases.items() if b is base]
    functional = _functional(node)
    if (
        base.op == "get_attr"
        or functional is None
        or not _replace(graph, node, target, base, family, bases, functional)
    ):
        reason = "writes into a buffer" if base.op == "get_attr" else f"{name} writes through a view"
        for shared in (base, node, *family):
            shared.meta[EFFECT] = reason
        bases[node] = base


def viewed(node: Node) -> Node | None:
    """The node whose storage this node's result shares, by the op's schema; None for a fresh value."""
    if node.target is operator.getitem:
        source = node.args[0]
        return source if isinstance(source, Node) and viewed(source) is not None else None
    if not isinstance(node.target, OpOverload):
        return None
    for argument, value in zip(node.target._schema.arguments, node.args):
        alias = argument.alias_info
        if alias is not None and not alias.is_write and isinstance(value, Node):
            return value
    return None


def mutated(node: Node) -> Node | None:
    """The value an in-place op writes into; None for other ops, and for ops that update running statistics."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return None
    first = node.target._schema.arguments[0]
    if first.alias_info is not None and first.alias_info.is_write and isinstance(node.args[0], Node):
        return node.args[0]
    return None


def _functional(node: Node) -> OpOverload | None:
    assert isinstance(node.target, OpOverload)
    name = node.target._schema.name.split("::")[1]
    if not name.endswith("_"):
        return None
    packet = getattr(aten, name[:-1], None)
    overload = node.target._overloadname
    found = getattr(packet, overload, None) if packet is not None else None
    return found if isinstance(found, OpOverload) and not found._schema.is_mutable else None


def _rename(graph: Graph, node: Node, target: Node, bases: dict[Node, Node]) -> None:
    """x.unsqueeze_(0): from here on x means unsqueeze(x, 0)."""
    functional = _functional(node)
    assert functional is not None
    with graph.inserting_before(node):
        new = _call(graph, functional, node.args, node.kwargs, node)
    bases[new] = bases.get(target, target)
    node.replace_all_uses_with(new)
    _later_uses(target, node, new)
    graph.erase_node(node)


def _replace(
    graph: Graph,
    node: Node,
    target: Node,
    base: Node,
    family: list[Node],
    bases: dict[Node, Node],
    functional: OpOverload,
) -> bool:
    """Carries the new contents of `target` through to its base and to every other view of it."""
    with graph.inserting_before(node):
        new = _call(graph, functional, node.args, node.kwargs, node)
        new = _same_dtype(graph, new, target, node)
        fresh = _to_base(graph, target, new, base, node)
        if fresh is None:
            graph.erase_node(new)
            return False
        current = {base: fresh, target: new}
        for view in family:
            source = viewed(view)
            if view is target or not any(user > node for user in view.users):
                continue
            if source is None or source not in current or view.target is operator.getitem:
                return False
            again = [current.get(a, a) if isinstance(a, Node) else a for a in view.args]
            current[view] = _call(graph, view.target, tuple(again), view.kwargs, view)
    node.replace_all_uses_with(new)
    for old, now in current.items():
        _later_uses(old, node, now)
        if old is not base:
            bases.pop(old, None)
            bases[now] = fresh
    graph.erase_node(node)
    return True


def _to_base(graph: Graph, view: Node, new: Node, base: Node, like: Node) -> Node | None:
    """The base with `new` in the place of `view`; None where the view has no inverse here."""
    while view is not base:
        source = viewed(view)
        if source is None or not isinstance(view.target, OpOverload):
            return None
        args, x = view.args, source
        match str(view.target):
            case "aten.slice.Tensor":
                inverse = _call(graph, aten.slice_scatter.default, (x, new, *args[1:]), {}, x)
            case "aten.select.int":
                inverse = _call(graph, aten.select_scatter.default, (x, new, *args[1:]), {}, x)
            case "aten.unsqueeze.default":
                inverse = _call(graph, aten.squeeze.dim, (new, args[1]), {}, x)
            case "aten.transpose.int":
                inverse = _call(graph, aten.transpose.int, (new, args[1], args[2]), {}, x)
            case "aten.alias.default" | "aten.detach.default" | "aten.to.dtype" | "aten.contiguous.default":
                inverse = new
            case _:
                return None
        view, new = source, inverse
    return new


def _same_dtype(graph: Graph, new: Node, target: Node, like: Node) -> Node:
    """In place the dtype of the target is kept; out of place the operands decide."""
    want = target.meta["val"].dtype
    others = [a.meta["val"] for a in like.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
    if all(o.dtype == want for o in others):
        return new
    return _call(graph, aten.to.dtype, (new, want), {}, target)


def _call(graph: Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Node) -> Node:
    new = graph.call_function(target, args, kwargs)
    new.meta = {k: v for k, v in like.meta.items() if k != EFFECT}
    return new


def _later_uses(old: Node, since: Node, new: Node) -> None:
    for user in list(old.users):
        if user > since and user is not new:
            user.replace_input_with(old, new)
