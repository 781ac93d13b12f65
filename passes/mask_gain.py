"""What one mask would gain: attention in which entries of the request look at those of the impression.

    before                                  with the mask, in thought
    w = softmax(s)           [B, 5, 5]      w = softmax(masked_fill(s, m, -inf))
                                            m: rows of the request, columns of the impression

Nothing is changed: the graph as it was before `split` is split and partitioned once more with the mask in it, and
the FLOPs are compared. A model so trained would be another model; the note is for whoever trains the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from passes.partition import Partition
from roo_rewrite.capture import Captured
from roo_rewrite.cost import cost
from roo_rewrite.places import place_of

aten = torch.ops.aten
_WORTH = 1.05


def mask_gain(
    captured: Captured,
    before: Graph,
    visible: Mapping[Node, Tensor],
    plan: Partition,
    analyse: Callable[[Captured], Partition],
) -> str | None:
    """One line, where a mask would gain 5% or more.

    before: the graph before `split`; visible: of its attention nodes, what each row would still see, `[L, L]`.
    analyse: annotates, splits and partitions a graph.
    """
    if not visible:
        return None
    masked = replace(captured, graph=before, constants=dict(captured.constants), notes=[], assumed={})
    masked.graph = _masked(masked, before, {tuple(m.shape): m for m in visible.values()})
    other = analyse(masked)
    now, then = (_flops(c, p) for c, p in ((captured, plan), (masked, other)))
    if now < _WORTH * then:
        return None
    place = place_of(next(iter(visible)))
    where = f" ({place.file.rsplit('/', 1)[-1]}:{place.line})" if place.file else ""
    return (
        f"attention lets entries of the request see those of the impression{where}; under a mask that forbids it "
        f"(another model) {then:,.0f} FLOPs per impression would do, now {now:,.0f}"
    )


def _flops(captured: Captured, plan: Partition) -> float:
    """FLOPs per impression."""
    inside = set(plan.request)
    nodes = [n for n in captured.graph.nodes if n.op == "call_function"]
    return sum(cost(n).flops / (plan.fanout if n in inside else 1.0) for n in nodes) / captured.batch


def _masked(captured: Captured, before: Graph, masks: Mapping[tuple[int, ...], Tensor]) -> Graph:
    """A copy with the masks in every attention of their size, so that later layers keep apart what earlier ones do."""
    graph, made = Graph(), dict[Node, Node]()
    literals: dict[tuple[int, ...], tuple[Node, Node]] = {}
    mode = next(n.meta["val"].fake_mode for n in before.nodes if isinstance(n.meta.get("val"), FakeTensor))
    for shape, mask in masks.items():
        literals[shape] = tuple(_literal(captured, graph, mode, m) for m in (mask, ~mask))  # type: ignore[assignment]
    for node in before.nodes:
        if node.op == "output":
            graph.output(torch.fx.map_arg(node.args[0], made.__getitem__))
            continue
        size = _scores(node)
        found = None if size is None else literals.get(size)
        if found is not None and node.target is aten.softmax.int:
            filled = graph.call_function(aten.masked_fill.Scalar, (made[node.args[0]], found[1], float("-inf")))
            filled.meta = dict(node.args[0].meta)
            made[node.args[0]] = filled
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].meta = dict(node.meta)
        if found is not None and node.target is not aten.softmax.int:
            made[node].args = (*made[node].args[:3], found[0])
            made[node].kwargs = {k: v for k, v in made[node].kwargs.items() if k == "scale"}
    return graph


def _literal(captured: Captured, graph: Graph, mode: Any, value: Tensor) -> Node:
    name = f"constant_{len(captured.constants)}"
    captured.constants[name] = value
    made = graph.get_attr(f"_roo.{name}")
    made.meta["val"] = mode.from_tensor(value, static_shapes=True)
    return made


def _scores(node: Node) -> tuple[int, int] | None:
    """Rows and columns of the scores of an attention; None where they are not of fixed size."""
    sizes: tuple[Any, ...] = ()
    if (
        node.target is aten.softmax.int
        and node.meta["val"].ndim > 2
        and node.args[1] in (-1, node.meta["val"].ndim - 1)
    ):
        sizes = tuple(node.meta["val"].shape[-2:])
    elif node.target is aten.scaled_dot_product_attention.default:
        sizes = tuple(n.meta["val"].shape[-2] for n in node.args[:2])  # type: ignore[union-attr]
    return sizes if sizes and all(isinstance(s, int) for s in sizes) else None
