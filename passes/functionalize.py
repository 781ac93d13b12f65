"""In-place ops become values.

    before                                   after
    y = mul(x, 2)                            y = mul(x, 2)
    s = select(y, 1, 0)                      s = select(y, 1, 0)
    fill_(s, 0.)                             f = fill(s, 0.)
    z = sum(y)                               y1 = select_scatter(y, f, 1, 0)
                                             z = sum(y1)

Postcondition: no node writes into a value that another node made. What still writes (into a buffer,
under `no_grad` into a value that has a gradient, or through a view that has no inverse here) is marked, with
everything that shares its storage, as an effect in `node.meta["roo_effect"]`: such nodes keep their order
and stay at impression level.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
import torch.fx
from torch._ops import OpOverload
from torch.fx import Graph, Node

from passes.traced import traced
from roo_rewrite.facts import EFFECT
from roo_rewrite.ops.norm import weighted_batch_norm

aten = torch.ops.aten

# In-place ops that change the shape of the tensor object only: views by another name.
_RESHAPING = {"unsqueeze_", "squeeze_", "t_", "transpose_", "detach_", "swapaxes_", "swapdims_"}
# Ops that update running statistics in training.
_UPDATING = {aten.batch_norm.default, aten.instance_norm.default, weighted_batch_norm}
# Views that their schema does not call so.
_SILENT_VIEWS = {aten.meshgrid.default, aten.meshgrid.indexing, aten.broadcast_tensors.default}
# Ops that return their operand itself where it already is what they ask for; `type_as` without a word in its schema.
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default}
_UNLESS_IT_IS = {*_CASTS, aten.contiguous.default}


def functionalize(graph: Graph) -> None:
    """Replaces in-place ops of `graph`, in order. The graph is changed in place."""
    bases: dict[Node, Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function":
            _visit(graph, node, bases)
    _statistics(graph)
    _own_inputs(graph)
    graph.eliminate_dead_code(is_impure_node=keeps)
    graph.lint()


def is_effect(node: Node) -> bool:
    """Whether a node must be kept although nothing reads it."""
    return node.op in ("placeholder", "output") or EFFECT in node.meta


def keeps(node: Node) -> bool:
    """Whether dead code elimination must leave a node: effects, and what moves the random state along."""
    tags = node.target.tags if isinstance(node.target, OpOverload) else ()
    updates = node.target in _UPDATING
    return is_effect(node) or torch.Tag.nondeterministic_seeded in tags or updates


def _visit(graph: Graph, node: Node, bases: dict[Node, Node]) -> None:
    source = viewed(node)
    if source is not None:
        bases[node] = bases.get(source, source)
    written = mutated(node)
    if not written:
        return
    name = _name(node)
    if name in _RESHAPING:
        _rename(graph, node, written[0], bases)
        return
    target = written[0]
    base = bases.get(target, target)
    family = [n for n, b in bases.items() if b is base]
    if len(written) == 1 and base.op != "get_attr" and _replace(graph, node, target, base, family, bases):
        return
    for one in written:
        base = bases.get(one, one)
        reason = "writes into a buffer" if base.op == "get_attr" else f"{name} writes through a view"
        for shared in (base, node, *(n for n, b in bases.items() if b is base)):
            shared.meta[EFFECT] = reason
    bases[node] = bases.get(target, target)


def _name(node: Node) -> str:
    assert isinstance(node.target, OpOverload)
    return node.target._schema.name.split("::")[1]


def viewed(node: Node) -> Node | None:
    """The node whose storage this node's result shares, by the op's schema; None for a fresh value."""
    if node.target is operator.getitem:
        source = node.args[0]
        return source if isinstance(source, Node) and viewed(source) is not None else None
    if not isinstance(node.target, OpOverload):
        return None
    if node.target in _SILENT_VIEWS:
        return node.all_input_nodes[0]
    if node.target in _UNLESS_IT_IS:
        return None if _copies(node) else node.all_input_nodes[0]
    for argument, value in zip(node.target._schema.arguments, node.args):
        alias = argument.alias_info
        if alias is not None and not alias.is_write and isinstance(value, Node):
            return value
    return None


def _copies(node: Node) -> bool:
    """Whether an op that returns its operand where it can has to copy here."""
    before, after = node.all_input_nodes[0].meta["val"], node.meta["val"]
    same = (before.dtype, before.device, before.stride()) == (after.dtype, after.device, after.stride())
    return not same or _asked(node, "copy")


def _asked(node: Node, flag: str) -> bool:
    assert isinstance(node.target, OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    return bool({**dict(zip(names, node.args)), **node.kwargs}.get(flag, False))


def mutated(node: Node) -> list[Node]:
    """The values an op writes into; none for ops that only update running statistics."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return []
    found = []
    for i, argument in enumerate(node.target._schema.arguments):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Node)]
    return found


def _functional(node: Node) -> OpOverload | None:
    name = _name(node)
    assert isinstance(node.target, OpOverload)
    if not name.endswith("_") or node.target.namespace != "aten":
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


def _replace(graph: Graph, node: Node, target: Node, base: Node, family: list[Node], bases: dict[Node, Node]) -> bool:
    """Carries the new contents of `target` through to its base, and makes every view of it anew.

    Nodes of an attempt that fails are dead code.
    """
    with graph.inserting_before(node):
        new = _new_contents(graph, node, target)
        fresh = _to_base(graph, target, new, base) if new is not None else None
        if fresh is None:
            return False
        current = {base: fresh}
        for view in family:
            again = torch.fx.map_arg(view.args, lambda n: current.get(n, n))
            if viewed(view) not in current:
                return False
            current[view] = _call(graph, view.target, again, view.kwargs, view)
    node.replace_all_uses_with(current[target])
    for old, now in current.items():
        _later_uses(old, node, now)
        bases.pop(old, None)
        if now is not fresh:
            bases[now] = fresh
    graph.erase_node(node)
    return True


def _new_contents(graph: Graph, node: Node, target: Node) -> Node | None:
    """What the op would return if it did not write, in the dtype of its target."""
    value, args = target.meta["val"], node.args
    match _name(node):
        case "copy_":
            source = args[1].meta["val"] if isinstance(args[1], Node) else value
            wide: Any = args[1]
            if [str(n) for n in source.shape] != [str(n) for n in value.shape] or not isinstance(wide, Node):
                wide = _call(graph, aten.expand_as.default, (wide, target), {}, target)
            same = wide if source.dtype == value.dtype else _cast(graph, wide, value.dtype, target)
            return _call(graph, aten.clone.default, (same,), {}, target)
        case "zero_":
            return _call(graph, aten.zeros_like.default, (target,), {}, target)
        case "fill_" if not isinstance(args[1], Node):
            return _call(graph, aten.full_like.default, (target, args[1]), {}, target)
    functional = _functional(node)
    if functional is None:
        return None
    new = _call(graph, functional, args, node.kwargs, node)
    others = [a.meta["val"] for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
    return new if all(o.dtype == value.dtype for o in others) else _cast(graph, new, value.dtype, target)


def _cast(graph: Graph, new: Node, dtype: torch.dtype, like: Node) -> Node:
    return _call(graph, aten.to.dtype, (new, dtype), {}, like)


def _to_base(graph: Graph, view: Node, new: Node, base: Node) -> Node | None:
    """The base with `new` in the place of `view`; None where the view has no inverse here."""
    while view is not base:
        source = viewed(view)
        fresh = _inverse(graph, view, new, source) if source is not None else None
        if source is None or fresh is None:
            return None
        if source.target in _SPLITS:
            view, new = source, fresh
            source = viewed(view)
            assert source is not None
        view, new = source, fresh
    return new


_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default, aten.unbind.int}


def _inverse(graph: Graph, view: Node, new: Node, x: Node) -> Node | None:
    """x with `new` where `view` of it was."""
    args = view.args
    match str(view.target):
        case "aten.slice.Tensor":
            if _is_whole(x, *args[1:]):
                return new
            return _scattered(graph, aten.slice_scatter.default, x, new, *args[1:])
        case "aten.select.int":
            return _scattered(graph, aten.select_scatter.default, x, new, *args[1:])
        case "aten.diagonal.default":
            return _call(graph, aten.diagonal_scatter.default, (x, new, *args[1:]), {}, x)
        case "aten.unsqueeze.default":
            return _call(graph, aten.squeeze.dim, (new, args[1]), {}, x)
        case "aten.transpose.int":
            return _call(graph, aten.transpose.int, (new, args[1], args[2]), {}, x)
        case "aten.t.default":
            return _call(graph, aten.t.default, (new,), {}, x)
        case "aten.permute.default":
            ndim, order = len(args[1]), args[1]  # type: ignore[arg-type]
            back = sorted(range(ndim), key=lambda i: order[i] % ndim)  # type: ignore[index,operator]
            return _call(graph, aten.permute.default, (new, back), {}, x)
        case (
            "aten.view.default"
            | "aten.unflatten.int"
            | "aten.squeeze.default"
            | "aten.squeeze.dim"
            | "aten.squeeze.dims"
        ):
            return _call(graph, aten.reshape_as.default, (new, x), {}, x)
        case "aten.alias.default":
            return new
        case _ if view.target in _UNLESS_IT_IS:
            return new
        case "aten.detach.default" if not _has_history(x):
            return new
        case _ if view.target is operator.getitem:
            return _unsplit(graph, view, new, x)
    return None


def _is_whole(x: Node, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1) -> bool:
    """Whether a slice is all of its dim, `x[:]`."""
    size = x.meta["val"].shape[dim]
    to_the_end = end is None or (isinstance(end, int) and end >= (size if isinstance(size, int) else sys.maxsize))
    return to_the_end and start in (None, 0) and step == 1


def _has_history(x: Node) -> bool:
    """Whether a gradient may flow through x: a write through detach(x) would leave it as it was."""
    made_of = [n for n in x.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return x.op != "call_function" or bool(x.target is not aten.detach.default and made_of)


def _unsplit(graph: Graph, view: Node, new: Node, split: Node) -> Node | None:
    """The source of a split with one of its parts replaced."""
    if split.target not in _SPLITS:
        return None
    x, index = split.args[0], view.args[1]
    assert isinstance(x, Node)
    assert isinstance(index, int)
    if split.target is aten.unbind.int:
        dim = split.args[1] if len(split.args) > 1 else 0
        return _scattered(graph, aten.select_scatter.default, x, new, dim, index)
    dim = split.args[2] if len(split.args) > 2 else 0
    sizes = [part.shape[dim] for part in split.meta["val"]]
    if not all(isinstance(s, int) for s in sizes):
        return None
    start = sum(sizes[:index])
    return _scattered(graph, aten.slice_scatter.default, x, new, dim, start, start + sizes[index])


def _scattered(graph: Graph, target: OpOverload, x: Node, new: Node, dim: Any = 0, *where: Any) -> Node:
    """`new` in a place of x along `dim`. Complex numbers go by their two parts: the op has no backward for them."""
    value = x.meta["val"]
    if not value.is_complex():
        return _call(graph, target, (x, new, dim, *where), {}, x)
    pairs = [_call(graph, aten.view_as_real.default, (v,), {}, v) for v in (x, new)]
    made = _call(graph, target, (*pairs, dim % value.ndim, *where), {}, x)
    for node, of in ((pairs[0], x), (pairs[1], new), (made, x)):
        node.meta["val"] = traced(aten.view_as_real.default, [of.meta["val"]])
    return _call(graph, aten.view_as_complex.default, (made,), {}, x)


def _statistics(graph: Graph) -> None:
    """Running statistics that more than one batch norm updates, or that others read, move in the order of the model."""
    for norm in [n for n in graph.nodes if n.target is aten.batch_norm.default and n.args[5]]:
        for buffer in norm.args[3:5]:
            if isinstance(buffer, Node) and len(buffer.users) > 1:
                for shared in (norm, buffer):
                    shared.meta[EFFECT] = "updates running statistics that others use"


def _own_inputs(graph: Graph) -> None:
    """What writes into an input writes into a copy of it; the caller's tensors are left alone."""
    written = [n for n in graph.nodes if n.op == "placeholder" and EFFECT in n.meta]
    for node in written:
        first = next(n for n in graph.nodes if n.op == "call_function")
        reason = node.meta.pop(EFFECT)
        with graph.inserting_before(first):
            own = _call(graph, aten.clone.default, (node,), {}, node)
        own.meta[EFFECT] = reason
        node.replace_all_uses_with(own, delete_user_cb=lambda user, own=own: user is not own)


def _call(graph: Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Node) -> Node:
    new = graph.call_function(target, args, kwargs)
    new.meta = {k: v for k, v in like.meta.items() if k != EFFECT}
    return new


def _later_uses(old: Node, since: Node, new: Node) -> None:
    for user in list(old.users):
        if user > since and user is not new:
            user.replace_input_with(old, new)
