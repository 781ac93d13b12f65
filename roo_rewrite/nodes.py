"""Nodes of a graph, in the place of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node


def replaced(graph: Graph, node: Node, target: Callable[..., Any], *args: Any) -> Node:
    """A call in the place of a node, with its metadata; the node is gone."""
    with graph.inserting_before(node):
        made = graph.call_function(target, args)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    return made
