"""Writes a graph over ATen node by node, as `torch.export` would leave it, a hundred times faster.

An op is run on two batches of meta tensors; a size that differs is a multiple of the batch. The symbolic values of the
trace are made from that. The graph runs in eager as a module of its own (`model`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from roo_rewrite.rules.law import operator as overload

F64 = torch.float64
OTHER = 103  # rows of the second batch


class UnusableError(Exception):
    """A step cannot be recorded: it fails, or holds for some batches only."""


@dataclass(frozen=True)
class Size:
    """A size that depends on the batch: `times` the rows "B", or the values "N" of the jagged pair, and some more."""

    times: int
    of: str = "B"
    more: int = 0

    def __mul__(self, other: int) -> Size:
        return Size(self.times * other, self.of, self.more * other)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Value:
    """What is known of a node's tensor."""

    shape: tuple[int | Size, ...]
    stride: tuple[int | Size, ...]
    dtype: torch.dtype

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)


def val(node: Node) -> Value:
    """The value of a node that holds a tensor. Raises UnusableError for a list."""
    found = node.meta["value"]
    if not isinstance(found, Value):
        raise UnusableError("no tensor")
    return found


def sides(node: Node) -> frozenset[str]:
    """The inputs a node depends on."""
    found: frozenset[str] = node.meta["sides"]
    return found


class Recorder:
    """The graph so far; nodes are its values."""

    def __init__(self, batch: int, generator: torch.Generator) -> None:
        """batch: the rows of the trace, a number that no other size is a multiple of."""
        self.batch, self.generator = batch, generator
        self.sizes = {"B": (batch, OTHER), "N": (2 * batch + 9, 2 * OTHER + 5)}
        self.graph = Graph()
        self.tensors: dict[str, Tensor] = {}
        self.inputs: list[Node] = []
        self._known: dict[int, Node] = {}
        self._sized: dict[Size, Node] = {}

    # -- values from outside

    def input(self, name: str, shape: Sequence[int], dtype: torch.dtype, ragged: bool = False) -> Node:
        """A placeholder `[B, *shape]`, or `[N, *shape]` where ragged."""
        node = self.graph.placeholder(name)
        rows = self.sizes["N" if ragged else "B"]
        node.meta["sides"] = frozenset([name])
        self.inputs.append(node)
        return self._add(node, tuple(torch.empty((n, *shape), dtype=dtype, device="meta") for n in rows))

    def tensor(self, value: Tensor, kind: str = "constant") -> Node:
        """A value known beforehand; kind: "parameter", "buffer" or "constant"."""
        name = f"{kind}_{len(self.tensors)}"
        self.tensors[name] = nn.Parameter(value) if kind == "parameter" else value
        made = value.to("meta")
        return self._add(self.graph.get_attr(name), (made, made))

    def weight(self, *shape: int) -> Node:
        """A parameter whose products keep the scale."""
        drawn = torch.randn(shape, generator=self.generator, dtype=F64)
        return self.tensor(drawn / max(shape[-1] if shape else 1, 1) ** 0.5, "parameter")

    # -- calls

    def __call__(self, op: str, *args: Any, **kwargs: Any) -> Any:
        """The node of a call, or its nodes where there are several results. Raises UnusableError."""
        target = overload(op if op.count(".") == 2 else f"aten.{op}")
        return self.call(target, *args, **kwargs)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As `__call__`, of an overload."""
        args, kwargs = pytree.tree_map(self._node, (args, kwargs))
        schema = getattr(target, "_schema", None)
        makes = schema is not None and not any(isinstance(a.type, torch.TensorType) for a in schema.arguments)
        device = {"device": "meta"} if makes and any(a.name == "device" for a in schema.arguments) else {}
        made = []
        for at in (0, 1):
            given = torch.fx.map_arg((args, kwargs), lambda n, at=at: n.meta["meta"][at])
            try:
                with torch.no_grad():
                    made.append(target(*given[0], **given[1], **device))
            except Exception as e:  # whatever the op says of its operands
                raise UnusableError(f"{target}: {type(e).__name__}: {e}") from e
        node = self.graph.call_function(target, args, kwargs)
        if not isinstance(made[0], (list, tuple)):
            return self._add(node, tuple(made))
        if len(made[0]) != len(made[1]):
            raise UnusableError("as many results as rows")
        self._add(node, tuple(made))
        return [self._add(self.graph.call_function(operator.getitem, (node, i)), p) for i, p in enumerate(zip(*made))]

    def _add(self, node: Node, made: tuple[Any, ...]) -> Node:
        node.meta["meta"] = made
        if "sides" not in node.meta:
            node.meta["sides"] = frozenset().union(*(sides(n) for n in node.all_input_nodes))
        one, two = made
        if isinstance(one, Tensor):
            if one.ndim != two.ndim or one.dtype != two.dtype:
                raise UnusableError("another number of dims")
            node.meta["value"] = Value(*self.fitted(one, two), one.dtype)
            self._known[id(one)] = node
        else:
            node.meta["value"] = made if isinstance(one, (list, tuple)) else self._fit(one, two)
        return node

    def fitted(self, one: Tensor, two: Tensor) -> tuple[tuple[int | Size, ...], tuple[int | Size, ...]]:
        """Shape and strides of a value, from its two batches."""
        shape = tuple(map(self._fit, one.shape, two.shape))
        try:
            return shape, tuple(map(self._fit, one.stride(), two.stride()))
        except UnusableError:  # a diagonal, say
            one, two = (torch.empty(t.shape, device="meta") for t in (one, two))
            return shape, tuple(map(self._fit, one.stride(), two.stride()))

    def _fit(self, one: int, two: int) -> int | Size:
        if one == two:
            if one in (self.batch, OTHER):
                raise UnusableError("a size that only looks like the batch")
            return one
        for name, (small, large) in self.sizes.items():
            for more in (0, -1, 1):
                times, left = divmod(one - more, small)
                if not left and times * large + more == two:
                    return Size(times, name, more)
        raise UnusableError(f"size {one} or {two}")

    def _node(self, value: Any) -> Any:
        """An argument as the graph holds it: traced values and sizes as nodes, other tensors as constants."""
        if isinstance(value, Size):
            return self.size(value)
        if isinstance(value, Tensor) and value.is_meta:
            if id(value) not in self._known:
                raise UnusableError("a value that no node made")
            return self._known[id(value)]
        if isinstance(value, int) and value in (self.batch, OTHER):
            raise UnusableError("a number that is the batch of the trace")
        return self.tensor(value.detach().clone()) if isinstance(value, Tensor) else value

    def size(self, size: Size) -> Node:
        """A node whose value is the size."""
        if size not in self._sized:
            if size.more:
                self._sized[size] = self.call(operator.add, self.size(Size(size.times, size.of)), size.more)
            elif size.times > 1:
                self._sized[size] = self.call(operator.mul, self.size(Size(1, size.of)), size.times)
            else:
                like = next(n for n in self.inputs if val(n).shape[0] == size)
                self._sized[size] = self.call(torch.ops.aten.sym_size.int, like, 0)
        return self._sized[size]

    # -- taking back

    def mark(self) -> int:
        """What `undo` goes back to."""
        return len(self.graph.nodes)

    def undo(self, mark: int) -> None:
        """Takes back what came after the mark."""
        gone = list(self.graph.nodes)[mark:]
        for node in reversed(gone):
            self.graph.erase_node(node)
            self._known.pop(id(node.meta.get("meta", [None])[0]), None)
        self._sized = {s: n for s, n in self._sized.items() if n not in set(gone)}
