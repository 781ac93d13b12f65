"""What emitted code calls: torch's own functions, where they do what an overload of ATen does.

    torch.ops.aten.mul.Tensor(x, y)    ->    torch.mul(x, y)

The call of an overload is matched against its schema value by value and costs two to three microseconds more, which
is what a small op takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn import functional

aten = torch.ops.aten

# Called with the arguments of the overload, by place and by name, these run that overload.
ENTRIES: dict[Any, Any] = {
    aten.add.Tensor: torch.add,
    aten.add_.Tensor: Tensor.add_,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.addcmul.default: torch.addcmul,
    aten.addcmul_.default: Tensor.addcmul_,
    aten.bmm.default: torch.bmm,
    aten.cat.default: torch.cat,
    aten.clamp_min.default: torch.clamp_min,
    aten.embedding.default: torch.embedding,
    aten.exp.default: torch.exp,
    aten.flatten.using_ints: torch.flatten,
    aten.gelu.default: functional.gelu,
    aten.index_select.default: torch.index_select,
    aten.layer_norm.default: torch.layer_norm,
    aten.linalg_vector_norm.default: torch.linalg.vector_norm,
    aten.linear.default: functional.linear,
    aten.matmul.default: torch.matmul,
    aten.mean.dim: torch.mean,
    aten.mm.default: torch.mm,
    aten.permute.default: torch.permute,
    aten.relu.default: torch.relu,
    aten.relu_.default: torch.relu_,
    aten.reshape.default: torch.reshape,
    aten.rsqrt.default: torch.rsqrt,
    aten.sigmoid.default: torch.sigmoid,
    aten.sigmoid_.default: torch.sigmoid_,
    aten.softmax.int: torch.softmax,
    aten.square.default: torch.square,
    aten.squeeze.dim: torch.squeeze,
    aten.stack.default: torch.stack,
    aten.sum.dim_IntList: torch.sum,
    aten.t.default: torch.t,
    aten.tanh.default: torch.tanh,
    aten.tanh_.default: torch.tanh_,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
}


def with_entries(graph: Graph) -> Graph:
    """A copy of a graph that calls torch's functions."""
    copied = Graph()
    copied.output(copied.graph_copy(graph, {}))
    for node in copied.nodes:
        if node.op == "call_function" and node.args and _is_tensor(node.args[0]):
            _enter(node)
    return copied


def _is_tensor(value: Any) -> bool:
    """Whether an argument is a traced tensor or a list of them; overloads also take numbers for tensors."""
    if isinstance(value, (list, tuple)):
        return all(_is_tensor(v) for v in value)
    return isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor)


def _enter(node: Node) -> None:
    found = _narrow(node) if node.target is aten.slice.Tensor else None
    if found is not None:
        node.target, node.args, node.kwargs = torch.narrow, found, {}
    elif node.target in ENTRIES:
        node.target = ENTRIES[node.target]


def _narrow(node: Node) -> tuple[Any, ...] | None:
    """A slice of known place as the arguments of `narrow`; None where it has steps or its bounds are the batch's."""
    given: list[Any] = list(node.args)
    x, dim, start, end, step = given + [None, 0, None, None, 1][len(given) :]
    size = x.meta["val"].shape[dim]
    first, last = 0 if start is None else start, size if end is None else end
    if node.kwargs or step != 1 or not all(type(s) is int for s in (first, last, size)):
        return None
    return (x, dim, first, last - first) if 0 <= first <= last <= size else None
