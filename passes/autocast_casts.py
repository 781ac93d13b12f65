"""The casts of an autocast region, written out.

    before                                          after
    linear(x, w), marked ("cpu", bfloat16, ...)     linear(to(x, bfloat16), to(w, bfloat16))
    layer_norm(h, ...), marked                      layer_norm(h, ...), which autocast leaves alone
    cat([h, x]), marked                             cat([to(h, float32), x])

Autocast does one of three things to an op: it casts every float it takes, but float64, to its own type, or to float32,
or it casts nothing. Which, the op itself tells: it is run under autocast, and without on each choice of casts, until
two agree in every bit. An op that agrees with none (a recurrent net, whose products alone are cast), one that is not
ATen's or cannot be run on such samples keeps its mark. So do all where the caller's own autocast is on.

A parameter is cast once in a region, as autocast does.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from passes.traced import called
from roo_rewrite.calls import ambient
from roo_rewrite.facts import AUTOCAST
from roo_rewrite.ops.kept import kept_rows, marked_entries
from roo_rewrite.purity import random_kept

aten = torch.ops.aten
_JOINS = (aten.cat.default, aten.stack.default)  # torch promotes their operands; what is cast can be split
_LARGE = 1 << 20  # entries of a sample from which on it repeats its first row
_FREE_SIZE = 7  # of a dim that data decides


def write_casts(graph: Graph, region: Sequence[Node]) -> None:
    """Writes the casts of one region of `graph` out, op by op; what is left marked runs as it did."""
    if any(dtype is not None for dtype in ambient()):
        return
    parameters, known = dict[tuple[Node, torch.dtype], Node](), dict[Any, torch.dtype | bool]()
    for node in region:
        device, dtype, enabled, _ = node.meta.get(AUTOCAST, (None, None, False, None))
        if not enabled:
            continue
        to = _chosen(node, device, dtype or torch.get_autocast_dtype(device), known)
        if to is False:
            continue
        if isinstance(to, torch.dtype):
            _cast(graph, node, _Reached(device, to), parameters)
        del node.meta[AUTOCAST]


class _Reached:
    """Whether a tensor is one that autocast on a kind of device casts to `dtype`."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype

    def __call__(self, x: Any) -> bool:
        plain = isinstance(x, Tensor) and x.is_floating_point() and x.dtype is not torch.float64
        return plain and x.device.type == self.device and x.dtype is not self.dtype


def _chosen(node: Node, device: str, dtype: torch.dtype, known: dict[Any, torch.dtype | bool]) -> torch.dtype | bool:
    """What autocast casts the floats of an op to; True where to nothing, False where that cannot be told."""
    if node.target is operator.getitem:
        return AUTOCAST not in node.all_input_nodes[0].meta
    if node.target in (kept_rows, marked_entries):
        return True
    if not isinstance(node.target, OpOverload) or node.target.namespace != "aten":
        return False
    try:
        drawn = pytree.tree_map_only(Node, lambda n: _shape(n.meta.get("val")), (node.args, node.kwargs))
        key = (node.target, device, dtype, str(drawn))
        if key not in known:
            known[key] = _probed(node.target, drawn, device, dtype)
    except Exception:  # samples that the op does not take, sizes that data decides
        return False
    return known[key]


def _probed(op: Callable[..., Any], drawn: Any, device: str, dtype: torch.dtype) -> torch.dtype | bool:
    with torch.no_grad(), torch.autocast(device, dtype, cache_enabled=False):
        wanted = _run(op, drawn, lambda x: False)
    for to in (torch.float32, True, dtype) if op in _JOINS else (True, dtype, torch.float32):
        with contextlib.suppress(Exception), torch.no_grad():  # an op may not take what autocast does not give it
            if _same(_run(op, drawn, _Reached(device, to) if isinstance(to, torch.dtype) else lambda x: False), wanted):
                return to
    return False


def _run(op: Callable[..., Any], drawn: Any, reached: Any) -> list[Any]:
    """What an op gives on samples, and what it leaves of them."""
    with random_kept():
        torch.manual_seed(0)
        samples = pytree.tree_map_only(_Sample, lambda s: s.tensor(), drawn)
        args, kwargs = pytree.tree_map(lambda x: x.to(reached.dtype) if reached(x) else x, samples)
        made = op(*args, **kwargs)
    return pytree.tree_leaves((made, samples))


def _same(found: list[Any], wanted: list[Any]) -> bool:
    """Whether two runs agree in every bit."""
    if len(found) != len(wanted):
        return False
    for a, b in zip(found, wanted):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if a is not b and a != b:
                return False
        elif a.dtype is not b.dtype or a.shape != b.shape or not _equal(a, b):
            return False
    return True


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


class _Sample:
    """A tensor to be drawn: sizes, dtype, device."""

    def __init__(self, like: Tensor):
        self.shape = [_number(s) for s in like.shape]
        self.dtype, self.device = like.dtype, like.device

    def __repr__(self) -> str:
        return f"{self.shape} {self.dtype} {self.device}"

    def tensor(self) -> Tensor:
        """Floats in [0, 1), whole numbers and truths of 0 and 1: rows of a table, lengths and kin."""
        count = 1
        for size in self.shape:
            count *= size
        shape = [1, *self.shape[1:]] if count > _LARGE else self.shape
        made = torch.rand(shape, device=self.device)
        made = made if self.dtype.is_floating_point or self.dtype.is_complex else made.round()
        return made.to(self.dtype).expand(self.shape) if count > _LARGE else made.to(self.dtype)


def _shape(value: Any) -> Any:
    return pytree.tree_map(
        lambda v: _Sample(v) if isinstance(v, Tensor) else _number(v) if isinstance(v, torch.SymInt) else v, value
    )


def _number(size: int | torch.SymInt) -> int:
    if isinstance(size, int) or size.node.has_hint():
        return int(size if isinstance(size, int) else size.node.hint)
    if not size.node.expr.is_Symbol:
        raise ValueError(f"{size} is for data to say")
    return _FREE_SIZE


def _cast(graph: Graph, node: Node, reached: _Reached, parameters: dict[tuple[Node, torch.dtype], Node]) -> None:
    """Casts what reaches a node."""

    def casted(operand: Node) -> Node:
        if not reached(operand.meta.get("val")):
            return operand
        found = parameters.get((operand, reached.dtype))
        if found is None:
            with graph.inserting_before(node):
                found = called(graph, aten.to.dtype, operand, reached.dtype)
            found.meta.pop(AUTOCAST, None)
        if operand.op == "get_attr" and operand.meta["val"].requires_grad:
            parameters[operand, reached.dtype] = found
        return found

    node.args = torch.fx.map_arg(node.args, casted)
    node.kwargs = torch.fx.map_arg(node.kwargs, casted)
