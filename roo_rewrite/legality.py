"""What a legal graph is after each stage. A pass that leaves another is at fault, not the model."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from roo_rewrite.facts import EFFECT, META, SIDE, Annotation, CrossRow, Provenance, Replicated, Size
from roo_rewrite.ops.broadcast import jagged_broadcast, jagged_select, request_of

_CROSSING = (jagged_broadcast, jagged_select, request_of)


class IllegalGraph(Exception):  # noqa: N818 - a fault of a pass, never of the user
    """A graph that a pass must not leave behind."""


def normalized(graph: Graph) -> None:
    """No op that only wraps a body, and no op that writes, but for marked effects."""
    for node in _calls(graph):
        if node.target in (
            torch.ops.higher_order.wrap_with_set_grad_enabled,
            torch.ops.higher_order.wrap_with_autocast,
        ):
            raise IllegalGraph(f"{node} wraps a body")
        writes = isinstance(node.target, OpOverload) and node.target._schema.is_mutable
        if writes and EFFECT not in node.meta:
            raise IllegalGraph(f"{node} writes, and is not marked as an effect")


def annotated(graph: Graph) -> None:
    """Facts on every node; a request value has only request and constant inputs, none of them CrossRow or an effect."""
    for node in graph.nodes:
        if node.op == "output":
            continue
        known = node.meta.get(META)
        if not isinstance(known, Annotation):
            raise IllegalGraph(f"{node} has no annotation")
        if known.provenance is not Provenance.REQUEST:
            continue
        for source in node.all_input_nodes:
            fact = source.meta[META]
            if isinstance(fact.batching, Size):
                continue
            if fact.provenance is Provenance.IMPRESSION or isinstance(fact.batching, CrossRow):
                raise IllegalGraph(f"{node} is request-level, its input {source} is not")
        if EFFECT in node.meta:
            raise IllegalGraph(f"{node} is an effect and request-level")


def hoisted(graph: Graph) -> None:
    """A request node reads the request side alone; an impression node reads that side through a broadcast."""
    early = {n for n in graph.nodes if n.op != "output" and n.meta.get(SIDE) is not Provenance.IMPRESSION}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            if node in early and source not in early:
                raise IllegalGraph(f"{node} runs per request and reads {source}, which does not")
            if node not in early and source in early and not _may_read(node, source):
                raise IllegalGraph(f"{node} runs per impression and reads {source} without a broadcast")


def _may_read(node: Node, source: Node) -> bool:
    if node.target in _CROSSING or source.name == "num_impressions" or source.op == "get_attr":
        return True
    known: Any = source.meta.get(META)
    if known is None or not isinstance(source.meta.get("val"), torch.Tensor):
        return True  # a size or a device
    return isinstance(known.batching, Replicated)


def _calls(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op == "call_function"]
