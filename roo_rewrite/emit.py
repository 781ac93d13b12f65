"""Graph -> Python function. The emitted code reads parameters from the model by name, at every call.

One graph gives three functions: the whole, the request part (its output: what crosses), and the
impression part.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch.fx import Graph, Node

from roo_rewrite.entries import with_entries
from roo_rewrite.facts import AUTOCAST, COUNTS, SIDE, Provenance

aten = torch.ops.aten


@dataclass(frozen=True)
class Emitted:
    """The functions of one program, each called with the model first.

    whole: `(model, *atoms, num_impressions) -> tuple`; request: `(model, *request atoms) -> tuple of
    residuals`; impression: `(model, *residuals, *impression atoms, num_impressions) -> tuple`.
    residuals: their names. source: the Python text of the whole. parts: the graphs of request and impression.
    """

    whole: Callable[..., tuple[Any, ...]]
    request: Callable[..., tuple[Any, ...]]
    impression: Callable[..., tuple[Any, ...]]
    residuals: tuple[str, ...]
    source: str
    graph: Graph
    parts: tuple[Graph, Graph]


def emit(graph: Graph) -> Emitted:
    """Emits a hoisted, lowered graph. It is changed in place (autocast regions become explicit)."""
    parts = split_parts(graph)
    for part in (graph, parts[0], parts[1]):
        _explicit_autocast(part)
    whole, source = function(graph)
    return Emitted(whole, function(parts[0])[0], function(parts[1])[0], parts[2], source, graph, parts[:2])


def function(graph: Graph) -> tuple[Callable[..., tuple[Any, ...]], str]:
    """The graph as a Python function of the model and its placeholders, and its source."""
    quick = with_entries(graph)
    for node in quick.nodes:
        node.type = None
    code = quick.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<roo-rewrite>", "exec"), scope)
    made = scope["forward"]
    assert isinstance(made, types.FunctionType)
    return made, code.src


def runnable(graph: Graph, name: str) -> Callable[..., tuple[Any, ...]]:
    """A graph between two passes as a function of the model and its placeholders; the graph is left alone."""
    copied = Graph()
    copied.output(copied.graph_copy(graph, {}))
    rename(copied, name)
    _explicit_autocast(copied)
    return function(copied)[0]


def split_parts(graph: Graph) -> tuple[Graph, Graph, tuple[str, ...]]:
    """The request part, the impression part, and the names of the residuals between them."""
    nodes = list(graph.nodes)
    early = [n for n in nodes if n.op != "output" and n.meta[SIDE] is not Provenance.IMPRESSION]
    late = [n for n in nodes if n.op == "output" or n.meta[SIDE] is Provenance.IMPRESSION]
    counts = next(n for n in nodes if n.name == COUNTS)
    crossing = _unique(a for n in late for a in n.all_input_nodes if a in set(early) and a is not counts)
    needs_counts = any(counts in n.all_input_nodes for n in early)
    request, impression = Graph(), Graph()
    mapping: dict[Node, Node] = {}
    for node in early:
        if node.op == "placeholder" and node is counts and not needs_counts:
            mapping[node] = request.placeholder(COUNTS)
        else:
            mapping[node] = request.node_copy(node, mapping.__getitem__)
    request.output(tuple(mapping[n] for n in crossing))
    mapping = {n: impression.placeholder(n.name) for n in crossing}
    late_inputs = [n for n in nodes if n.op == "placeholder" and n.meta[SIDE] is Provenance.IMPRESSION]
    for node in (*late_inputs, counts):
        mapping[node] = impression.node_copy(node)
    for node in late:
        if node.op == "output":
            impression.output(torch.fx.map_arg(node.args[0], mapping.__getitem__))
        elif node.op != "placeholder":
            mapping[node] = impression.node_copy(node, mapping.__getitem__)
    return request, impression, tuple(n.name for n in crossing)


def _unique(nodes: Iterable[Node]) -> list[Node]:
    return list(dict.fromkeys(nodes))


def _explicit_autocast(graph: Graph) -> None:
    """Runs of nodes traced under one autocast setting are put between enter and exit."""
    open_with: Any = None
    entered: Node | None = None
    for node in list(graph.nodes):
        wanted = node.meta.get(AUTOCAST) if node.op == "call_function" else open_with if node.op != "output" else None
        if wanted == open_with:
            continue
        with graph.inserting_before(node):
            if entered is not None:
                graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))
            entered = graph.call_function(torch.amp.autocast_mode._enter_autocast, wanted) if wanted else None
        open_with = wanted


def rename(graph: Graph, name: str) -> None:
    """Constants and leaf calls of the trace are found under `_roo.<name>` of the model."""
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target).startswith("_roo."):
            node.target = f"_roo.{name}.{str(node.target).removeprefix('_roo.')}"
        if node.target is torch.ops.roo.leaf.default:
            tensors, site = node.args
            with graph.inserting_before(node):
                call = graph.call_module(f"_roo.{name}.leaf_{site}", tuple(tensors))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            graph.erase_node(node)
