"""Lookups of one table whose rows are then put side by side are one: its gradient is made once.

    cat([embedding(W, i), embedding(W, j)], 1)        embedding(W, cat([i, j], 1))        i, j: [B, n]

`split` takes a lookup apart by side; where the cut brings both back together, nothing is gained by two.
Called by `lower`.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.fx import Graph, Node

from passes.functionalize import mutated
from passes.tidy import plain
from passes.traced import called
from roo_rewrite.facts import SIDE

aten = torch.ops.aten


def together(graph: Graph) -> None:
    """Joins such lookups of a hoisted graph in place."""
    written = {n for node in graph.nodes for n in mutated(node)}
    for node in list(graph.nodes):
        if node.target is aten.cat.default and plain(node) and node not in written:
            _joined(graph, node, written)


def _joined(graph: Graph, node: Node, written: set[Node]) -> None:
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    dim %= node.meta["val"].ndim
    parts: list[Any] = []
    for key, group in itertools.groupby(node.args[0], lambda part: _table(part, node, dim, written)):  # type: ignore
        run = list(group)
        parts += [_one(graph, node, run, dim)] if key is not None and len(run) > 1 else run
    if len(parts) == 1:
        node.replace_all_uses_with(parts[0])
        graph.erase_node(node)
    else:
        node.args = (parts, *node.args[1:])


def _table(part: Node, node: Node, dim: int, written: set[Node]) -> Any:
    """What two lookups must share to be one; None of another value, and of one that something else reads."""
    if part.target is not aten.embedding.default or not plain(part) or list(part.users) != [node]:
        return None
    table, index, *rest = part.args
    if table in written or dim == part.meta["val"].ndim - 1 or any(rest[1:2]) or part.kwargs.get("scale_grad_by_freq"):
        return None
    assert isinstance(index, Node)
    return table, tuple(rest), tuple(part.kwargs.items()), part.meta[SIDE], index.meta["val"].dtype


def _one(graph: Graph, node: Node, run: list[Node], dim: int) -> Node:
    first = run[0]
    with graph.inserting_before(node):
        index = called(graph, aten.cat.default, [part.args[1] for part in run], dim)
        made = called(graph, aten.embedding.default, first.args[0], index, *first.args[2:])
    made.kwargs = first.kwargs
    for new in (index, made):
        new.meta = {**first.meta, **new.meta}
    return made
