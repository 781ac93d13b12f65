"""A size that data decides must not become a number by what it meets in the trace.

n = lengths.max().item()                     u0, any number
states = rnn(items[:, :n])                   a leaf: in the trace as wide as it was when the model was run, 6
cat([states, target.expand(-1, n, -1)], -1)  meets it: u0 = 6, and `n` is 6 in every batch
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from roo_rewrite.errors import CaptureError

_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


def not_fixed(graph: Graph) -> None:
    """Raises CaptureError where the trace took a number for a size that the inputs' values decide."""
    given = set[Node]()
    for node in graph.nodes:
        if (node.op == "placeholder") or not given.isdisjoint(node.all_input_nodes):
            given.add(node)
        if node in given and any(_number(size) for size in _decided(node)):
            raise CaptureError(
                f"the trace takes a size that data decides ({node.name}) for the number it has in the example; "
                "keep the model's widths apart from what a leaf gives, or pad to a fixed width"
            )


def _decided(node: Node) -> Iterator[Any]:
    """The numbers and sizes that data decides."""
    if not any(tag in getattr(node.target, "tags", ()) for tag in _VALUES):
        return
    for value in pytree.tree_leaves(node.meta.get("val")):
        yield from value.shape if isinstance(value, Tensor) else [value]


def _number(size: Any) -> bool:
    return isinstance(size, SymInt) and size.node.maybe_as_int() is not None
