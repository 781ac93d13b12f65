"""What a node costs: FLOPs and bytes of one batch row, and the time they take.

Device constants are measured on the machines the project runs on (`tools/bench/ops.py`), rounded; only
their ratios matter to a cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from roo_rewrite.capture import Captured
from roo_rewrite.rules.matmul import spelled_out

aten = torch.ops.aten


@dataclass(frozen=True)
class Device:
    """Throughput of a device: ns to start an op, bytes/ns of memory, and of matrix products.

    product: of many rows. It reads and writes at a rate of its own, beside its FLOPs: one of few columns is no faster
    than that. matrix: of each small product in a batch of them, which adds ns for each matrix.
    run_ns: copying adds this for each stretch of memory, however short; an entry of a transposed value is one.
    """

    start_ns: float
    bytes_per_ns: float
    product_flops_per_ns: float
    product_bytes_per_ns: float
    matrix_ns: float
    matrix_flops_per_ns: float
    matrix_bytes_per_ns: float
    run_ns: float


CPU = Device(
    start_ns=2_000.0,
    bytes_per_ns=30.0,
    product_flops_per_ns=90.0,
    product_bytes_per_ns=10.0,
    matrix_ns=70.0,
    matrix_flops_per_ns=45.0,
    matrix_bytes_per_ns=20.0,
    run_ns=1.0,
)
CUDA = Device(
    start_ns=6_000.0,
    bytes_per_ns=2_500.0,
    product_flops_per_ns=200_000.0,
    product_bytes_per_ns=2_500.0,
    matrix_ns=0.0,
    matrix_flops_per_ns=200_000.0,
    matrix_bytes_per_ns=2_500.0,
    run_ns=0.0,
)
NOMINAL_IMPRESSIONS = 4096


@dataclass(frozen=True)
class Cost:
    """Of one run of a node on the traced batch: multiply-adds counted as 2 FLOPs, bytes read and written."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def device_of(captured: Captured) -> Device:
    """The device the trace ran on."""
    tensors = (n.meta.get("val") for n in captured.graph.nodes)
    kinds = {t.device.type for t in tensors if isinstance(t, Tensor)}
    return CUDA if "cuda" in kinds else CPU


def numel(tensor: Tensor) -> int:
    """Entries of a traced tensor, sizes known only at run time taken as 1."""
    return math.prod(_size(s) for s in tensor.shape)


def _size(size: int | torch.SymInt) -> int:
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else 1
    return int(size)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a node's traced value."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors(v)


def nbytes(value: Any) -> int:
    """Bytes of a node's traced value."""
    return sum(numel(t) * t.element_size() for t in tensors(value))


_FREE = {"getitem", "getattr", "sym_size"}


def cost(node: Node) -> Cost:
    """Cost of a node at the traced batch. Views cost nothing; a lookup costs what it reads and writes."""
    if node.op != "call_function":
        return Cost(0.0, 0.0)
    written = nbytes(node.meta.get("val"))
    if not isinstance(node.target, OpOverload) or is_view(node) or _is_off(node):
        return Cost(0.0, 0.0)
    read = sum(nbytes(n.meta.get("val")) for n in node.all_input_nodes if _is_read(node, n))
    return Cost(flops(node), float(read + written))


def time(node: Node, device: Device) -> float:
    """Nanoseconds of a node at the traced batch: of a product, its FLOPs and what it moves; else the larger of both."""
    found = cost(node)
    if node.target in _PRODUCTS:
        return found.flops / device.product_flops_per_ns + found.bytes / device.product_bytes_per_ns
    return max(found.flops / device.product_flops_per_ns, found.bytes / device.bytes_per_ns)


def runs(tensor: Tensor) -> float:
    """Stretches of memory a tensor lies in, one after the other: 1 where it is contiguous or has no strides, 0 where it
    is empty.
    """
    together = 1
    strides = tensor.stride() if tensor.layout is torch.strided else ()
    if not numel(tensor):
        return 0.0
    for size, stride in zip(reversed(tensor.shape), reversed(strides)):
        if _size(size) != 1 and _size(stride) != together:
            return numel(tensor) / together
        together *= _size(size)
    return 1.0


def traced_cost(captured: Captured) -> Cost:
    """Of one run of the model as it was traced, before any pass, on the traced batch."""
    assert isinstance(captured.bodies, torch.fx.GraphModule)
    return _module_cost(captured.bodies)


def _module_cost(owner: torch.fx.GraphModule) -> Cost:
    total = Cost(0.0, 0.0)
    for node in owner.graph.nodes:
        total += cost(node)
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        for body in (n for n in node.all_input_nodes if n.op == "get_attr"):
            module = owner.get_submodule(str(body.target))
            if isinstance(module, torch.fx.GraphModule):
                total += _module_cost(module)
    return total


def is_view(node: Node) -> bool:
    """Whether an op shows its operand's memory."""
    if not isinstance(node.target, OpOverload):
        return False
    first = node.target._schema.arguments[0].alias_info if node.target._schema.arguments else None
    return first is not None and not first.is_write


def _is_off(node: Node) -> bool:
    # Dropout outside training.
    return node.target in _DROPOUTS and not node.args[2]


_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)


def _is_read(node: Node, source: Node) -> bool:
    # A lookup reads the rows it picks, which is what it writes.
    return not (node.target in _LOOKUPS and source is node.args[0])


_LOOKUPS = {
    aten.embedding.default,
    aten.index_select.default,
    aten.embedding_bag.padding_idx,
    aten.embedding_bag.default,
}


def _operands(node: Node) -> list[Tensor]:
    """The traced tensors a node is called with, one as often as it is given."""
    found: list[Any] = []
    torch.fx.map_arg((node.args, node.kwargs), lambda n: found.append(n.meta.get("val")))
    return [v for v in found if isinstance(v, Tensor)]


_PRODUCTS = {
    aten.linear.default,
    aten.mm.default,
    aten.bmm.default,
    aten.matmul.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.einsum.default,
    aten.tensordot.default,
}


def flops(node: Node) -> float:
    """FLOPs of a node at the traced batch; a pointwise op counts one an entry."""
    out = sum(numel(t) for t in tensors(node.meta.get("val")))
    shapes = [[_size(s) for s in t.shape] for t in _operands(node)]
    match node.target:
        case aten.linear.default | aten.mm.default | aten.bmm.default | aten.matmul.default | aten.mv.default:
            return 2.0 * out * (shapes[0][-1] if shapes[0] else 1)
        case aten.addmm.default | aten.baddbmm.default:
            return 2.0 * out * shapes[1][-1]
        case aten.einsum.default:
            return _of_letters(str(node.args[0]), shapes)
        case aten.tensordot.default:
            return 2.0 * math.sqrt(float(out) * math.prod(math.prod(s) for s in shapes))
        case aten.conv1d.default | aten.conv2d.default:
            return 2.0 * out * math.prod(shapes[1][1:])
        case aten.scaled_dot_product_attention.default:
            return 4.0 * out * shapes[1][-2]
        case aten.gru.input | aten.lstm.input:
            steps = math.prod(shapes[0][:-1])
            weights = sum(math.prod(s) for s in shapes[2:] if len(s) == 2)
            return 2.0 * steps * weights
        case _ if node.target in _LOOKUPS:
            return 0.0
        case _:
            return float(out)


def _of_letters(equation: str, shapes: list[list[int]]) -> float:
    """FLOPs of an einsum, its operands taken one after the other as torch does: a letter counts once a product."""
    left, result = spelled_out(equation, [len(s) for s in shapes]).split("->")
    names = left.split(",")
    size = {c: n for letters, shape in zip(names, shapes) for c, n in zip(letters, shape) if n != 1}
    made, total = names[0], 0.0
    for i, letters in enumerate(names[1:], 2):
        total += 2.0 * math.prod(size.get(c, 1) for c in {*made, *letters})
        made = "".join(c for c in {*made, *letters} if c in result or any(c in later for later in names[i:]))
    return total
