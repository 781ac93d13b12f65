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

from roo_rewrite.owners import share_owners

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
    aten.abs.default: torch.abs,
    aten.addmm.default: torch.addmm,
    aten.amax.default: torch.amax,
    aten.baddbmm.default: torch.baddbmm,
    aten.batch_norm.default: torch.batch_norm,
    aten.bmm.default: torch.bmm,
    aten.cat.default: torch.cat,
    aten.clamp_min.default: torch.clamp_min,
    aten.conv1d.default: torch.conv1d,
    aten.conv2d.default: torch.conv2d,
    aten.detach.default: torch.detach,
    aten.dropout.default: torch.dropout,
    aten.embedding.default: torch.embedding,
    aten.eq.Scalar: torch.eq,
    aten.exp.default: torch.exp,
    aten.expand.default: Tensor.expand,
    aten.flatten.using_ints: torch.flatten,
    aten.gelu.default: functional.gelu,
    aten.index_select.default: torch.index_select,
    aten.layer_norm.default: torch.layer_norm,
    aten.leaky_relu.default: functional.leaky_relu,
    aten.linalg_vector_norm.default: torch.linalg.vector_norm,
    aten.linear.default: functional.linear,
    aten.log.default: torch.log,
    aten.masked_fill.Scalar: torch.masked_fill,
    aten.matmul.default: torch.matmul,
    aten.maximum.default: torch.maximum,
    aten.mean.dim: torch.mean,
    aten.minimum.default: torch.minimum,
    aten.mm.default: torch.mm,
    aten.ne.Scalar: torch.ne,
    aten.neg.default: torch.neg,
    aten.permute.default: torch.permute,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.relu.default: torch.relu,
    aten.relu_.default: torch.relu_,
    aten.reshape.default: torch.reshape,
    aten.rsqrt.default: torch.rsqrt,
    aten.select.int: torch.select,
    aten.sigmoid.default: torch.sigmoid,
    aten.sigmoid_.default: torch.sigmoid_,
    aten.softmax.int: torch.softmax,
    aten.split_with_sizes.default: torch.split_with_sizes,
    aten.sqrt.default: torch.sqrt,
    aten.square.default: torch.square,
    aten.squeeze.dim: torch.squeeze,
    aten.squeeze.dims: torch.squeeze,
    aten.stack.default: torch.stack,
    aten.sum.dim_IntList: torch.sum,
    aten.t.default: torch.t,
    aten.tanh.default: torch.tanh,
    aten.tanh_.default: torch.tanh_,
    aten.to.device: Tensor.to,
    aten.to.dtype: Tensor.to,
    aten.transpose.int: torch.transpose,
    aten.unbind.int: torch.unbind,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.where.self: torch.where,
}
# Of counts and sizes; these run their overloads too.
_SIZES = {aten.sym_size.int: Tensor.size, aten.repeat_interleave.Tensor: torch.repeat_interleave}


def with_entries(graph: Graph) -> Graph:
    """A copy of a graph that calls torch's functions."""
    copied = Graph()
    copied.output(copied.graph_copy(graph, {}))
    for node in copied.nodes:
        if node.target in _SIZES:
            node.target = _SIZES[node.target]
        elif node.op == "call_function" and node.args and _is_tensor(node.args[0]):
            _enter(node)
    share_owners(copied)
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
