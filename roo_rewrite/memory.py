"""Which nodes of a traced graph may share memory, and which are written in place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import torch.fx
from torch.fx import Node

_ONLY_MARKS = torch.ops.aten.detach_.default  # changes no entry


def behind(nodes: Collection[Node]) -> set[Node]:
    """The nodes and all that they are made of."""
    return _reached(nodes, lambda node: node.all_input_nodes)


def sharing(nodes: Collection[Node]) -> set[Node]:
    """The nodes, and those they may share memory with among all that they are made of."""
    return _reached(nodes, _shared)


def writes(node: Node) -> bool:
    """Whether the node is an op that writes into an operand."""
    return isinstance(node.target, torch._ops.OpOverload) and (
        node.target._schema.is_mutable and node.target is not _ONLY_MARKS
    )


def written(node: Node) -> set[Node]:
    """The nodes whose memory a writing node may write."""
    return sharing(_arguments(node, lambda a: a.alias_info is not None and a.alias_info.is_write))


def all_written(nodes: Iterable[Node]) -> set[Node]:
    """The nodes whose memory any of these may write."""
    return set[Node]().union(*(written(n) for n in nodes if writes(n)))


def _reached(nodes: Collection[Node], further: Callable[[Node], Collection[Node]]) -> set[Node]:
    found, left = set[Node](), list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += further(node)
    return found


def _shared(node: Node) -> list[Node]:
    """The operands that the node may be a view of. One kernel of ATen says so in its schema, a composition need not."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return node.all_input_nodes
    if any(r.alias_info is not None for r in target._schema.returns):
        return _arguments(node, lambda a: a.alias_info is not None)
    return node.all_input_nodes if target._can_decompose() else []


def _arguments(node: Node, which: Callable[[Any], bool]) -> list[Node]:
    """The operands of an op for the arguments that `which` picks."""
    schema: Any = node.target
    given = dict(zip((a.name for a in schema._schema.arguments), node.args, strict=False)) | node.kwargs
    picked = [given[a.name] for a in schema._schema.arguments if a.name in given and which(a)]
    found: list[Node] = []
    torch.fx.map_arg(picked, found.append)
    return found
