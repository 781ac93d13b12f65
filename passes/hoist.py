"""Splits the graph along a Partition: request nodes first, one jagged broadcast for each residual.

    before (I rows everywhere)          after
    u = placeholder                     u = placeholder               R rows
    x = placeholder                     x = placeholder               I rows
    h = linear(u, w)                    counts = placeholder
    y = cat([h, x], 1)                  h = linear(u, w)              R rows
                                        rows = request_of(counts, sym_size(x, 0))
                                        e = jagged_broadcast(h, rows, 0)
                                        y = cat([e, x], 1)

Postcondition (`legality.hoisted`): a request node reads request nodes, constants and nothing else; an
impression node reads the broadcast of a request node, never the node. `meta["roo_side"]` says which is which.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
import torch.fx
from torch.fx import Graph, Node

from passes.annotate import EXTREME, WEIGHTED
from passes.functionalize import keeps
from passes.partition import Partition
from roo_rewrite.capture import Captured
from roo_rewrite.facts import (
    COUNTS,
    SIDE,
    Lengths,
    Offsets,
    Provenance,
    Ragged,
    Replicated,
    Rows,
    Size,
    annotation,
    computed_lengths,
)
from roo_rewrite.guards import BATCH
from roo_rewrite.inputs import Inputs
from roo_rewrite.ops.broadcast import jagged_broadcast, jagged_select, request_of
from roo_rewrite.ops.extreme import rows_seen
from roo_rewrite.ops.kept import kept_rows, kept_source
from roo_rewrite.ops.norm import weighted_batch_norm

aten = torch.ops.aten


def hoist(captured: Captured, inputs: Inputs, plan: Partition) -> Graph:
    """The request-level graph: placeholders are the atoms and `num_impressions`, output a flat tuple."""
    return _Hoist(captured, inputs, plan).run()


class _Hoist:
    def __init__(self, captured: Captured, inputs: Inputs, plan: Partition):
        self.captured, self.inputs = captured, inputs
        self.inside = set(plan.request)
        self.residuals = plan.residuals
        self.graph = Graph()
        self.at_request: dict[Node, Any] = {}
        self.at_impression: dict[Node, Any] = {}
        self.sizes: dict[tuple[Provenance, sympy.Expr], Any] = {}
        self.sources: dict[tuple[Provenance, Node], Node] = {}
        self.side = Provenance.REQUEST
        self.request_of: Node | None = None

    def run(self) -> Graph:
        nodes = list(self.captured.graph.nodes)
        self._placeholders([n for n in nodes if n.op == "placeholder"])
        for node in nodes:
            if node in self.inside and node.op != "placeholder":
                self._request(node)
        self.side = Provenance.IMPRESSION
        self._broadcasts()
        for node in nodes:
            if node.op == "output":
                self._mark(self.graph.output(torch.fx.map_arg(node.args[0], self._impression)))
            elif node not in self.inside and node.op != "placeholder" and not _on_demand(node):
                self._impression(node)
        self.graph.eliminate_dead_code(is_impure_node=keeps)
        self.graph.lint()
        return self.graph

    def _mark(self, node: Node, like: Node | None = None) -> Node:
        if like is not None:
            node.meta = dict(like.meta)
        node.meta[SIDE] = self.side
        return node

    def _placeholders(self, nodes: list[Node]) -> None:
        for node, atom in zip(nodes, self.inputs.atoms):
            self.side = annotation(node).provenance
            copied = self._mark(self.graph.placeholder(identifier(atom.name)), node)
            shared = self.side is Provenance.CONSTANT
            if shared or self.side is Provenance.REQUEST:
                self.at_request[node] = copied
            if shared or self.side is Provenance.IMPRESSION:
                self.at_impression[node] = copied
        self.side = Provenance.REQUEST
        self.counts = self._mark(self.graph.placeholder(COUNTS))
        self.atoms = nodes

    # -- the request side

    def _request(self, node: Node) -> Any:
        """The node at R rows; constants and sizes are made on demand."""
        if node in self.at_request:
            return self.at_request[node]
        if isinstance(annotation(node).batching, Size):
            return self._size(node, Provenance.REQUEST)
        if node.target is getattr:
            made = self._device(node, Provenance.REQUEST)
        elif WEIGHTED in node.meta and node in self.inside:
            made = self._weighted(node)
        elif EXTREME in node.meta:
            made = self._extreme(node)
        elif node.target is kept_rows:
            made = self._kept(node, self._request)
        else:
            made = self.graph.node_copy(node, self._request)
        self.at_request[node] = self._mark(made, node)
        return made

    def _weighted(self, node: Node) -> Node:
        """Batch norm in training at R rows: every row counts as often as its request has impressions."""
        x, weight, bias, mean, var, _, momentum, eps, _ = node.args
        rows = node.meta[WEIGHTED]
        args = tuple(torch.fx.map_arg(a, self._request) for a in (x, weight, bias, mean, var, momentum, eps))
        return self.graph.call_function(weighted_batch_norm, (*args, self.counts, rows.outer, rows.inner))

    def _extreme(self, node: Node) -> Node:
        """max, min, any or all over the batch at R rows: those without impressions are not there."""
        x, rows = node.args[0], node.meta[EXTREME]
        assert isinstance(x, Node)
        largest = node.target in (aten.max.default, aten.any.default)
        seen = self.graph.call_function(rows_seen, (self._request(x), self.counts, largest, rows.outer, rows.inner))
        target: Any = node.target
        return self.graph.call_function(target, (self._mark(seen),))

    def _kept(self, node: Node, on_side: Callable[[Node], Any]) -> Node:
        """Rows that a mask keeps; which row each takes is found once a side."""
        x, mask = node.args
        assert isinstance(x, Node)
        assert isinstance(mask, Node)
        key = (self.side, mask)
        if key not in self.sources:
            counts = (self.counts,) if self.side is Provenance.REQUEST else ()
            self.sources[key] = self._mark(self.graph.call_function(kept_source, (on_side(mask), *counts)))
        return self.graph.call_function(aten.index_select.default, (on_side(x), 0, self.sources[key]))

    # -- the impression side

    def _impression(self, node: Node) -> Any:
        if node in self.at_impression:
            return self.at_impression[node]
        if isinstance(annotation(node).batching, Size):
            return self._size(node, Provenance.IMPRESSION)
        assert node not in self.inside, f"{node} is request-level and does not cross"
        if node.target is getattr:
            made = self._device(node, Provenance.IMPRESSION)
        elif node.target is kept_rows:
            made = self._kept(node, self._impression)
        else:
            made = self.graph.node_copy(node, self._impression)
        self.at_impression[node] = self._mark(made, node)
        return made

    def _device(self, node: Node, side: Provenance) -> Node:
        """The device of the inputs, read off one of this side so that nothing crosses for it."""
        known = self.at_request if side is Provenance.REQUEST else self.at_impression
        source = next((known[a] for a in self.atoms if a in known), self.counts)
        return self.graph.call_function(getattr, (source, "device"))

    def _broadcasts(self) -> None:
        for node in self.residuals:
            self._cross(node)

    def _cross(self, node: Node) -> None:
        """A request-level value, once for each impression."""
        batching, value = annotation(node).batching, self.at_request[node]
        if isinstance(batching, Replicated):
            self.at_impression[node] = value
            return
        rows = self._request_of()
        if isinstance(batching, Ragged):
            made = self.graph.call_function(jagged_select, (value, self._lengths(batching.lengths), rows))
        elif isinstance(batching, Offsets):
            made = self._offsets(batching, node.meta["val"].dtype, rows)
        else:
            assert isinstance(batching, Rows)
            place = (batching.dim, batching.outer, batching.inner)
            made = self.graph.call_function(jagged_broadcast, (value, rows, *place))
        self.at_impression[node] = self._mark(made, node)

    def _request_of(self) -> Node:
        """The request of each impression."""
        if self.request_of is None:
            self.request_of = self._mark(self.graph.call_function(request_of, (self.counts, self._impression_rows())))
        return self.request_of

    def _lengths(self, name: str) -> Node:
        """The lengths of a jagged pair at R rows, an input or computed."""
        before, self.side = self.side, Provenance.REQUEST
        for node in self.captured.graph.nodes:
            if annotation(node).batching == Lengths(lengths=name) or computed_lengths(node) == name:
                break
        made = self._request(node)
        self.side = before
        assert isinstance(made, Node)
        return made

    def _offsets(self, kind: Offsets, dtype: torch.dtype, rows: Node) -> Node:
        """The offsets at I rows, from the lengths."""
        call = self.graph.call_function
        lengths = self._mark(call(jagged_broadcast, (self._lengths(kind.lengths), rows, 0, 1, 1)))
        ends = self._mark(call(aten.cumsum.default, (lengths, 0), {"dtype": dtype}))
        if not kind.first:
            return ends
        offsets = self._mark(call(aten.constant_pad_nd.default, (ends, [1, 0])))
        return offsets if kind.last else self._mark(call(aten.slice.Tensor, (offsets, 0, 0, -1)))

    # -- sizes

    def _impression_rows(self) -> Any:
        """I, from an impression input where there is one; else the sum of the counts."""
        return self._rows(Provenance.IMPRESSION)

    def _rows(self, side: Provenance) -> Any:
        """The number of rows of a side, as a node (R is always the length of the counts)."""
        key = (side, BATCH)
        if key not in self.sizes:
            self.sizes[key] = self._new_rows(side)
        return self.sizes[key]

    def _new_rows(self, side: Provenance) -> Node:
        before, self.side = self.side, side
        if side is Provenance.REQUEST:
            made = self.graph.call_function(aten.sym_size.int, (self.counts, 0))
        else:
            keeper = next((a for a in self.atoms if _counts_impressions(a)), None)
            if keeper is not None:
                made = self.graph.call_function(aten.sym_size.int, (self.at_impression[keeper], 0))
            else:
                made = self.graph.call_function(total_impressions, (self.counts,))
        self._mark(made)
        self.side = before
        return made

    def _size(self, node: Node, side: Provenance) -> Any:
        """A size of the traced batch, with the rows of `side` in the place of the batch."""
        value = node.meta["val"]
        if not isinstance(value, torch.SymInt) or not _computable(self.captured.expr(value), self.captured.steady):
            return self._copied_size(node, side)
        expr = self.captured.expr(value)
        return self._copied_size(node, side) if expr in self.captured.steady else self._emit(expr, side)

    def _copied_size(self, node: Node, side: Provenance) -> Any:
        """A number known only at run time, or no plain integer: computed as in the original, on its side."""
        known = self.at_request if side is Provenance.REQUEST else self.at_impression
        if node not in known:
            if side is Provenance.IMPRESSION:
                for x in node.all_input_nodes:
                    self._measured(x)
            made = self.graph.node_copy(node, self._request if side is Provenance.REQUEST else self._impression)
            known[node] = self._mark(made, node)
        return known[node]

    def _measured(self, x: Node) -> None:
        """A request-level value that does not cross does so where the impression side needs its size."""
        if x in self.inside and x not in self.at_impression and not isinstance(annotation(x).batching, Size):
            self._cross(x)

    def _emit(self, expr: sympy.Expr, side: Provenance) -> Any:
        key = (side, expr)
        if expr.is_Integer:
            return int(expr)
        if expr == BATCH:
            return self._rows(side)
        if expr in self.captured.steady:
            return self._copied_size(self.captured.steady[expr], side)
        if key not in self.sizes:
            self.sizes[key] = self._mark(self._emit_new(expr, side))
        return self.sizes[key]

    def _emit_new(self, expr: sympy.Expr, side: Provenance) -> Node:
        parts = [self._emit(a, side) for a in expr.args]
        match type(expr).__name__:
            case "Add":
                return self._fold(operator.add, parts)
            case "Mul":
                return self._fold(operator.mul, parts)
            case "FloorDiv" | "CleanDiv":
                return self.graph.call_function(operator.floordiv, tuple(parts))
            case "Mod" | "PythonMod":
                return self.graph.call_function(operator.mod, tuple(parts))
            case "Min":
                return self._fold(torch.sym_min, parts)
            case "Max":
                return self._fold(torch.sym_max, parts)
            case name:
                assert name == "Pow", name
                return self._fold(operator.mul, [parts[0]] * int(expr.args[1]))

    def _fold(self, op: Any, parts: list[Any]) -> Node:
        made = parts[0]
        for part in parts[1:]:
            made = self._mark(self.graph.call_function(op, (made, part)))
        assert isinstance(made, Node)
        return made


def _computable(expr: sympy.Expr, steady: Mapping[sympy.Symbol, Node]) -> bool:
    """Whether `_emit_new` can write this size."""
    known = {
        "Symbol",
        "Integer",
        "Zero",
        "One",
        "NegativeOne",
        "Add",
        "Mul",
        "FloorDiv",
        "CleanDiv",
        "Mod",
        "PythonMod",
    }
    for part in sympy.preorder_traversal(expr):
        name = type(part).__name__
        power = name == "Pow" and part.args[1].is_Integer and part.args[1] > 0
        if not power and name not in known | {"Min", "Max"}:
            return False
    return bool(expr.free_symbols <= {BATCH, *steady})


def identifier(name: str) -> str:
    """An input's name as a Python name."""
    written = re.sub(r"\W", "_", name)
    return f"{written}_" if written in ("self", COUNTS) else written


def total_impressions(counts: torch.Tensor) -> int:
    """I where no input has I rows."""
    return int(counts.sum())


def _counts_impressions(atom: Node) -> bool:
    known = annotation(atom)
    return known.provenance is Provenance.IMPRESSION and isinstance(known.batching, Rows)


def _on_demand(node: Node) -> bool:
    """Constants and sizes are copied to the side that reads them, effects stay where they are."""
    known = annotation(node)
    return known.provenance is Provenance.CONSTANT or isinstance(known.batching, Size)
