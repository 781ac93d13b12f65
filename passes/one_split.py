"""Slices of one value that do not overlap are taken by one split.

    before                        after
    a = slice(x, 1, 0, 4)         parts = split_with_sizes(x, [4, 2, 2], 1)
    c = slice(x, 1, 6, 8)         a, c = parts[0], parts[2]

The gradient of each slice is as large as the value, and they are added up; that of a split is one concatenation.
Called by `lower`. Postcondition: a value has at most one slice of a dim on a side, or some that overlap.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from passes.functionalize import mutated
from passes.traced import traced
from roo_rewrite.facts import EFFECT, SIDE
from roo_rewrite.facts import META as ANNOTATION

aten = torch.ops.aten
Span = tuple[int, int]


def one_split(graph: Graph) -> None:
    """Rewrites a hoisted graph in place."""
    found: dict[Any, list[tuple[Span, Node]]] = {}
    for node in graph.nodes:
        if node.target is aten.slice.Tensor and EFFECT not in node.meta:
            dim, span = _span(node)
            if span is not None:
                found.setdefault((node.args[0], dim, node.meta[SIDE]), []).append((span, node))
    for (_, dim, _), slices in found.items():
        source: Any = slices[0][1].args[0]  # a part by now, where it was a slice
        spans = sorted({span for span, _ in slices})
        apart = all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))
        if len(spans) > 1 and apart and not any(source in mutated(user) for user in source.users):
            _split(graph, source, dim, spans, slices)


def _span(node: Node) -> tuple[int, Span | None]:
    """The dim of a slice and the range of it, if both are static and the range has entries."""
    given: tuple[Any, ...] = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    x, dim, start, end, step = given
    value = x.meta.get("val") if isinstance(x, Node) else None
    if not isinstance(value, Tensor) or step != 1 or node.kwargs or not isinstance(dim, int):
        return 0, None
    size = value.shape[dim]
    if not all(isinstance(n, (int, type(None))) for n in (start, end)) or not isinstance(size, int):
        return 0, None
    taken = range(size)[start:end]
    return dim % value.ndim, (taken.start, taken.stop) if len(taken) else None


def _split(graph: Graph, source: Node, dim: int, spans: Sequence[Span], slices: Sequence[tuple[Span, Node]]) -> None:
    """One split at every end of a span; what lies between spans is a part nobody reads."""
    size = int(source.meta["val"].shape[dim])
    ends = sorted({0, size, *(end for span in spans for end in span)})
    sizes = [b - a for a, b in zip(ends, ends[1:])]
    first = slices[0][1]
    with graph.inserting_before(first):
        parts = graph.call_function(aten.split_with_sizes.default, (source, sizes, dim))
        parts.meta = {k: v for k, v in first.meta.items() if k != ANNOTATION}
        parts.meta["val"] = traced(aten.split_with_sizes.default, (source.meta["val"], sizes, dim))
    for span, node in slices:
        with graph.inserting_before(node):
            part = graph.call_function(operator.getitem, (parts, ends.index(span[0])))
        part.meta = dict(node.meta)
        node.replace_all_uses_with(part)
        graph.erase_node(node)
