"""Rows sorted, worked on and put back in their order: the order is not there.

    before                              after
    v, o = sort(lengths, 0, True)       h = relu(linear(x, W))
    h = relu(linear(x[o], W))           y = h
    y = h[argsort(o)]

    f(x[o])[argsort(o)] = f(x)          where f treats every row by itself

`x[o]` and `h[argsort(o)]` become `sorted_rows(x, o)` and `unsorted_rows(h, o)`, which `annotate` takes for x and h;
`settle` drops those between which that is proved (`kept_regions`), and writes the others as they were.

Lengths that a sort or `topk` of the whole batch has put in descending order need not be asked whether they are.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from roo_rewrite.capture import Captured
from roo_rewrite.facts import RowIndex, annotation
from roo_rewrite.guards import BATCH
from roo_rewrite.nodes import replaced
from roo_rewrite.ops.kept import sorted_rows, unsorted_rows

aten = torch.ops.aten
_COPIES = (
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.detach.default,
    aten.alias.default,
)
_SORTS = (aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)


def sorts(graph: Graph) -> bool:
    """Whether there is anything for `find` to look at."""
    return any(node.target in (*_SORTS, aten.topk.default) for node in graph.nodes)


def find(captured: Captured) -> bool:
    """Marks rows that are sorted and put back, on the annotated graph, in place. False where there are none."""
    graph, orders = captured.graph, dict[Node, Node]()
    for node in list(graph.nodes):
        if node.target is torch.ops.roo.descending.default and _is_sorted(captured, node.args[0]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    picks = [(n, *p) for n in graph.nodes if (p := _pick(n)) is not None]
    for _, _, index in picks:
        order = _undone(captured, index)
        if order is not None:
            orders[index] = order
    wanted = set(orders.values())
    marked = [(n, x, orders.get(i), i) for n, x, i in picks if i in orders or i in wanted]
    for node, x, undone, index in marked:
        replaced(graph, node, sorted_rows if undone is None else unsorted_rows, x, undone or index)
    for order in wanted:
        _mark_keys(graph, order)
    return bool(marked)


def settle(graph: Graph, unproved: Collection[Node]) -> None:
    """Drops the marks but those of the orders `unproved`, which become picks again."""
    for node in list(graph.nodes):
        if node.target not in (sorted_rows, unsorted_rows):
            continue
        x, order = node.args
        assert isinstance(x, Node)
        assert isinstance(order, Node)
        if order not in unproved:
            node.replace_all_uses_with(x)
            graph.erase_node(node)
            continue
        index = order
        if node.target is unsorted_rows:
            with graph.inserting_before(node):
                index = graph.call_function(aten.argsort.default, (order,))
            index.meta = dict(order.meta)
        replaced(graph, node, aten.index_select.default, x, 0, index)
    graph.eliminate_dead_code()


def _mark_keys(graph: Graph, order: Node) -> None:
    """The sorted keys of an order are its keys, sorted."""
    source, known = order.args[0], {n: i for i, n in enumerate(graph.nodes)}
    if not isinstance(source, Node) or order.args[1:] != (1,):
        return
    for user in list(source.users):
        if user.args[1:] == (0,) and all(known[n] > known[order] for n in user.users):
            with graph.inserting_after(order):
                made = graph.call_function(sorted_rows, (source.args[0], order))
            made.meta = dict(user.meta)
            user.replace_all_uses_with(made)


def _pick(node: Node) -> tuple[Node, Node] | None:
    """(x, index) of a node that takes rows of x."""
    args: Any = node.args
    if node.target is aten.index_select.default and args[1] == 0:
        found = (args[0], args[2])
    elif node.target is aten.index.Tensor and len(args[1]) == 1:
        found = (args[0], args[1][0])
    else:
        return None
    return (found[0], _copied(found[1])) if isinstance(found[1], Node) and _ids(found[1]) else None


def _copied(node: Node) -> Node:
    """What a node is a copy of."""
    while node.target in _COPIES and isinstance(node.args[0], Node) and _ids(node) and _ids(node.args[0]):
        node = node.args[0]
    return node


def _ids(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 1 and value.dtype == torch.int64


def _permutation(captured: Captured, node: Node) -> tuple[Node, bool] | None:
    """(keys, descending) of a node that is the order of a vector of the batch's rows."""
    source: Any = node
    if node.args[1:] == (1,) and isinstance(node.args[0], Node):
        source = node.args[0]
    found = _sort(captured, source)
    plain = source is node
    return found if found and plain == (source.target in _SORTS[2:]) else None


def _sort(captured: Captured, node: Any) -> tuple[Node, bool] | None:
    """(keys, descending) of a sort of a whole vector of the batch's rows."""
    if not isinstance(node, Node) or node.target not in (*_SORTS, aten.topk.default):
        return None
    given: dict[str, Any] = {a.name: a.default_value for a in node.target._schema.arguments}
    given |= dict(zip(given, node.args)) | dict(node.kwargs)
    keys = given["self"]
    size = keys.meta["val"].shape
    if len(size) != 1 or captured.expr(size[0]) != BATCH:
        return None
    if node.target is not aten.topk.default:
        return keys, bool(given["descending"])
    k = given["k"].meta["val"] if isinstance(given["k"], Node) else given["k"]
    return (keys, bool(given["largest"])) if given["sorted"] and captured.expr(k) == BATCH else None


def _undone(captured: Captured, index: Node) -> Node | None:
    """The order that a vector puts back: `index[order[i]] = i`."""
    found = _permutation(captured, index)
    if found is not None:
        keys, descending = _copied(found[0]), found[1]
        return keys if not descending and _permutation(captured, keys) is not None else None
    args: Any = index.args
    if index.target is aten.index_put.default and len(args[1]) == 1 and len(args) == 3:
        order, numbers = args[1][0], args[2]
    elif index.target is aten.scatter.src and args[1] in (0, -1):
        order, numbers = args[2], args[3]
    else:
        return None
    order = _copied(order)
    rows = annotation(numbers).batching == RowIndex(0)
    return order if rows and _permutation(captured, order) is not None else None


def _is_sorted(captured: Captured, lengths: Any) -> bool:
    """Whether a vector is known to be in descending order."""
    lengths = _copied(lengths)
    found = _sort(captured, lengths.args[0]) if lengths.args[1:] == (0,) else None
    return found is not None and found[1]
