"""One way to say each thing, before anything is proved about it.

    before                                             after
    wrap_with_autocast(..., body, x)                   the body (see `inline`)
    add_(y, 1)                                         add(y, 1), later uses of y mean it
    squeeze(x: [B, 1])                                 squeeze(x, [1])
    matmul(W, x: [B, k, 1])                            unsqueeze(linear(squeeze(x, [2]), W), 2)
    slice(x, 0, 0, max), dropout(x, 0.5, False)        x
    to(input, device=its own)                          input
    cat([x[:, :0], y], 1)                              cat([y], 1)
    hstack([x, y])                                     cat([x, y], 1) (see `stacks`)
    masked_select(x, buffer)                           index_select (see `constant_masks`)
    index_put(x, [rows T times, c], v)                 by rows (see `repeated_rows`)
    where(m, ones([2 * B, 4]), x)                      ones([1, 1]) (see `one_number`)
    softmax(x - max(x), 1)                             softmax(x, 1) (see `shifted_softmax`)
    masked_fill(x, eq(repeat(m, [B, 1]), 0), -1)       masked_fill(x, eq(m, 0), -1) (see `unrepeated`)
    ones_like(x: [T, T])                               ones([T, T]) (see `fills`)
    permute_pooled_embs(x, [0, 2, 5], [1, 0], ..)      cat of slices (see `pooled_columns`)
    zeros([B, 3], device="cpu")                        zeros([B, 3], device=<device of the inputs>)

Postcondition: no higher-order ops that only wrap, no in-place ops but marked effects, no op that is the
identity, no device of the trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch.fx import Graph, Node

from passes.as_others import AS_OTHERS
from passes.constant_masks import constant_masks
from passes.fills import FILLS
from passes.functionalize import functionalize, is_effect, keeps, mutated
from passes.inline import inline
from passes.one_number import one_number
from passes.pooled_columns import pooled_columns
from passes.repeated_rows import repeated_rows
from passes.shifted_softmax import unshifted
from passes.stacks import STACKS
from passes.synonyms import SYNONYMS
from passes.traced import called
from passes.unrepeated import unrepeated
from roo_rewrite.capture import Captured
from roo_rewrite.facts import AUTOCAST
from roo_rewrite.guards import BATCH

aten = torch.ops.aten

_ASSERTS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten._assert_async.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
    torch._check,
)


def normalize(captured: Captured) -> None:
    """Normalizes the captured graph in place."""
    graph = captured.graph
    inline(graph, captured.bodies)
    _drop_asserts(graph)
    _drop_identities(captured)
    functionalize(graph)
    constant_masks(captured)
    pooled_columns(captured)
    for node in list(graph.nodes):
        if node.op == "call_function":
            _simplify(captured, node)
    unrepeated(captured)
    one_number(captured)
    repeated_rows(captured)
    _free_devices(captured)
    graph.eliminate_dead_code(is_impure_node=keeps)
    graph.lint()


def _drop_asserts(graph: Graph) -> None:
    """The trace's own checks; what they guard is kept as `Captured.accepts`."""
    for node in reversed(list(graph.nodes)):
        if node.target in _ASSERTS and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=_writes)


def _writes(node: Node) -> bool:
    return keeps(node) or bool(mutated(node))


def _drop_identities(captured: Captured) -> None:
    """Dropout that is off returns its very operand, which later in-place ops may write into."""
    for node in list(captured.graph.nodes):
        if node.target in (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default):
            _simplify(captured, node)


def _simplify(captured: Captured, node: Node) -> None:
    simplify = _SIMPLER.get(node.target)
    new = simplify(captured, node) if simplify is not None else None
    if new is not None:
        node.replace_all_uses_with(new)
        captured.graph.erase_node(node)


def _first(captured: Captured, node: Node) -> Node:
    assert isinstance(node.args[0], Node)
    return node.args[0]


def _lift(captured: Captured, node: Node) -> Node | None:
    """A literal tensor; its copy is only needed where something writes into it."""
    return _first(captured, node) if not is_effect(node) else None


def _dropout(captured: Captured, node: Node) -> Node | None:
    _, p, train = node.args
    return None if train and p else _first(captured, node)


def _slice(captured: Captured, node: Node) -> Node | None:
    """A slice that takes everything, by the symbols of its sizes."""
    x = _first(captured, node)
    same = [captured.expr(a) == captured.expr(b) for a, b in zip(x.meta["val"].shape, node.meta["val"].shape)]
    step = node.args[4] if len(node.args) > 4 else 1
    start = node.args[2] if len(node.args) > 2 else 0
    return x if all(same) and step == 1 and start in (0, None) else None


def _matmul(captured: Captured, node: Node) -> Node | None:
    """A matrix times columns is a linear map of rows: torch takes it row by row where the matrix needs no gradient."""
    matrix, x = node.args
    assert isinstance(matrix, Node)
    assert isinstance(x, Node)
    first, second = matrix.meta["val"], x.meta["val"]
    if AUTOCAST in node.meta or first.ndim != 2 or second.ndim < 3 or captured.expr(second.shape[-1]) != 1:
        return None
    last = second.ndim - 1
    with captured.graph.inserting_before(node):
        rows = _made(captured, node, aten.squeeze.dims, x, [last])
        product = _made(captured, node, aten.linear.default, rows, matrix)
        return _made(captured, node, aten.unsqueeze.default, product, last)


def _take_along(captured: Captured, node: Node) -> Node | None:
    """Without a dim both are seen as vectors, which torch does by a view that other strides do not allow; of a vector
    it asks how long it is.
    """
    x, index = node.args[:2]
    if len(node.args) > 2 and node.args[2] is not None:
        return None
    with captured.graph.inserting_before(node):
        x, index = (_made(captured, node, aten.reshape.default, value, [-1]) for value in (x, index))
        return _made(captured, node, aten.index_select.default, x, 0, index)


def _made(captured: Captured, like: Node, target: Any, *args: Any) -> Node:
    new = called(captured.graph, target, *args)
    new.meta = {**like.meta, **new.meta}
    return new


def _squeeze(captured: Captured, node: Node) -> Node:
    """squeeze() drops the dims that are 1 for every batch, not the batch that happens to be 1."""
    x = _first(captured, node)
    ones = [i for i, s in enumerate(x.meta["val"].shape) if captured.expr(s) == 1]
    with captured.graph.inserting_before(node):
        new = captured.graph.call_function(aten.squeeze.dims, (x, ones))
    new.meta = dict(node.meta)
    return new


def _squeeze_dim(captured: Captured, node: Node) -> Node | None:
    """squeeze(x, d) of a dim that is not 1 does nothing; of the batch it would drop a batch of one."""
    x, dim = node.args
    assert isinstance(x, Node)
    kept = captured.expr(x.meta["val"].shape[dim]) != 1 if x.meta["val"].ndim else False
    return x if kept else None


def _same_dtype(captured: Captured, node: Node) -> Node | None:
    """A cast to the dtype and device it has."""
    x = _first(captured, node)
    a, b = x.meta["val"], node.meta["val"]
    return x if a.dtype == b.dtype and a.device == b.device and not _copies(node) else None


def _same_place(captured: Captured, node: Node) -> Node | None:
    """An input cast and moved to what it is: a program runs on inputs of one dtype and device."""
    x = _first(captured, node)
    a, b = x.meta["val"], node.meta["val"]
    options = {*node.kwargs.values(), *node.args[1:]} - {None, False, a.dtype, a.device, a.layout}
    return x if x.op == "placeholder" and a.dtype == b.dtype and a.device == b.device and not options else None


def _copies(node: Node) -> bool:
    """Whether a cast is asked for a tensor of its own, or for a layout."""
    options = {*node.kwargs.values(), *node.args[2:]}
    return bool(options - {None, False})


def _same(captured: Captured, node: Node) -> Node | None:
    """An expand or view to the very shape it has."""
    x = _first(captured, node)
    before, after = x.meta["val"].shape, node.meta["val"].shape
    unchanged = len(before) == len(after) and all(captured.expr(a) == captured.expr(b) for a, b in zip(before, after))
    return x if unchanged else None


def _view(captured: Captured, node: Node) -> Node:
    """A view as a reshape: the strides of the trace are not those of every batch."""
    same = _same(captured, node)
    if same is not None:
        return same
    with captured.graph.inserting_before(node):
        new = captured.graph.call_function(aten.reshape.default, node.args)
    new.meta = dict(node.meta)
    return new


def _cat(captured: Captured, node: Node) -> Node | None:
    """Parts without entries are left out: they would make a user's features depend on the item."""
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    out = node.meta["val"]
    assert isinstance(parts, (list, tuple))
    assert isinstance(dim, int)
    values = [(part, part.meta["val"]) for part in parts if isinstance(part, Node)]
    kept = [(part, v) for part, v in values if v.ndim != out.ndim or captured.expr(v.shape[dim]) != 0]
    if any(v.dtype == out.dtype for _, v in kept):
        node.args = ([part for part, _ in kept], *node.args[1:])
    return None


_SIMPLER: dict[Any, Callable[[Captured, Node], Node | None]] = {
    aten.lift_fresh_copy.default: _lift,
    aten.dropout.default: _dropout,
    aten.feature_dropout.default: _dropout,
    aten.alpha_dropout.default: _dropout,
    aten.cat.default: _cat,
    aten.matmul.default: _matmul,
    aten.slice.Tensor: _slice,
    aten.softmax.int: unshifted,
    aten.log_softmax.int: unshifted,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze_dim,
    aten.alias.default: _first,
    aten.to.device: _same_place,
    aten.to.dtype: _same_dtype,
    aten.take_along_dim.default: _take_along,
    aten.to.dtype_layout: _same_place,
    aten.expand.default: _same,
    aten.reshape.default: _same,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    **FILLS,
    **AS_OTHERS,
    **STACKS,
    **SYNONYMS,
}


def _free_devices(captured: Captured) -> None:
    """Where the trace ran on one device, that device means: the one the inputs are on."""
    graph = captured.graph
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    devices = {a for n in nodes for a in (*n.args, *n.kwargs.values()) if isinstance(a, torch.device)}
    inputs = [n for n in graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)]
    if not devices or not inputs or {n.meta["val"].device for n in inputs} != devices:
        return
    with graph.inserting_after([n for n in graph.nodes if n.op == "placeholder"][-1]):
        device = graph.call_function(getattr, (inputs[0], "device"))
    device.meta["val"] = next(iter(devices))
    for node in nodes:
        node.args = tuple(device if isinstance(a, torch.device) else a for a in node.args)
        node.kwargs = {k: device if isinstance(v, torch.device) else v for k, v in node.kwargs.items()}


__all__ = ["AUTOCAST", "BATCH", "normalize"]
