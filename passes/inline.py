"""Wrapping ops and autocast regions: bodies in the place of their calls.

    before                                             after
    wrap_with_set_grad_enabled(False, body, x)         the body, on detach(x)
    wrap_with_autocast("cpu", bfloat16, ..., body, x)  the body, its nodes marked with the autocast
    wrap_with_autocast("cuda", ..., body, x on a CPU)  the body, which that autocast does not reach
    wrap_with_autocast(..., enabled=False, body, x)    the body, where no autocast is on around the call
    a marked op whose casts are known                  the op on operands that are cast (`autocast_casts`)

Postcondition: no wrapping ops; a mark says that autocast may change what its node returns.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from passes.autocast_casts import write_casts
from passes.functionalize import mutated
from roo_rewrite.errors import CaptureError
from roo_rewrite.facts import AUTOCAST

aten = torch.ops.aten


def inline(graph: Graph, owner: nn.Module) -> None:
    """Puts the bodies of wrapping ops, submodules of `owner`, in the place of their calls."""
    for region in _bodies(graph, owner):
        write_casts(graph, region)
    _drop_idle_autocast(graph)


def _bodies(graph: Graph, owner: nn.Module) -> list[list[Node]]:
    """Puts the bodies of wrapping ops in the place of their calls, innermost included. The nodes of each."""
    hops, regions = torch.ops.higher_order, list[list[Node]]()
    for node in list(graph.nodes):
        if node.target is hops.wrap_with_set_grad_enabled:
            enabled, body, *args = node.args
            mark = node.meta.get(AUTOCAST)
            regions.append(_splice(graph, owner, node, body, args, detach=not enabled, autocast=mark))
        elif node.target is hops.wrap_with_autocast:
            device, dtype, enabled, cache, body, *args = node.args
            region = (device, dtype, enabled, cache) if _has_tensors_on(device, owner, body, args) else None
            regions.append(_splice(graph, owner, node, body, args, detach=False, autocast=region))
        elif isinstance(node.target, torch._ops.HigherOrderOperator) and _has_bodies(node, owner):
            raise CaptureError(
                f"forward calls torch's {node.target}, whose bodies are not followed; where it chooses between "
                "two, compute both and use torch.where"
            )
    return regions


def _has_bodies(node: Node, owner: nn.Module) -> bool:
    known = dict(owner.named_children())
    return any(n.op == "get_attr" and n.target in known for n in node.all_input_nodes)


def _has_tensors_on(device: Any, owner: nn.Module, body: Node, args: list[Any]) -> bool:
    """Whether autocast of that kind of device can change anything in `body`."""
    graph: Any = owner.get_submodule(str(body.target)).graph
    values = pytree.tree_leaves([n.meta.get("val") for n in (*graph.nodes, *args) if isinstance(n, Node)])
    return any(isinstance(v, Tensor) and v.device.type == device for v in values)


def _drop_idle_autocast(graph: Graph) -> None:
    """Turning autocast off where nothing has turned it on is nothing."""
    for node in graph.nodes:
        device, _, enabled, _ = node.meta.get(AUTOCAST, (None, None, True, None))
        if not enabled and not torch.is_autocast_enabled(device):
            del node.meta[AUTOCAST]


def _splice(
    graph: Graph, owner: nn.Module, node: Node, body: Node, args: list[Any], detach: bool, autocast: Any
) -> list[Node]:
    """The nodes that were put in the place of the call."""
    module = owner.get_submodule(str(body.target))
    assert isinstance(module, GraphModule)
    _bodies(module.graph, module)
    mapping: dict[Node, Any] = {}
    outer: dict[Node, Any] = {}
    stock = iter(args)
    result: Any = None
    with graph.inserting_before(node):
        for inner in module.graph.nodes:
            if inner.op == "placeholder":
                value = outer[inner] = next(stock)
                floating = isinstance(value, Node) and _floating(value)
                if detach and floating:
                    detached = graph.call_function(aten.detach.default, (value,))
                    detached.meta = dict(value.meta)
                    value = detached
                mapping[inner] = value
            elif inner.op == "output":
                result = torch.fx.map_arg(inner.args[0], lambda n: outer.get(_written(n), mapping[n]))
            else:
                copied = graph.node_copy(inner, lambda n: mapping[n])
                copied.meta = dict(inner.meta)
                if autocast is not None and AUTOCAST not in copied.meta:
                    copied.meta[AUTOCAST] = autocast
                mapping[inner] = copied
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(result[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    if not body.users:
        graph.erase_node(body)
    return [n for n in mapping.values() if AUTOCAST in n.meta]


def _written(node: Node) -> Node:
    """The value that an in-place op writes into and returns, or the node itself."""
    while targets := mutated(node):
        node = targets[0]
    return node


def _floating(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
