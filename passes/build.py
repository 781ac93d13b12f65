"""Builds nodes of the split graph, with their traced values, and carries forms out."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from passes.constants import evaluate
from passes.forms import (
    PROVENANCE,
    Blocks,
    Deferred,
    Expanded,
    Filled,
    Form,
    Picked,
    Sum,
    Whole,
    is_static,
    provenance,
)
from passes.traced import traced
from roo_rewrite.capture import Captured
from roo_rewrite.facts import META, CrossRow, Provenance, annotation

aten = torch.ops.aten


# What shows a literal, or a copy of it.
_SHOWS = {aten.detach.default, aten.reshape.default, aten.to.device, aten.to.dtype, aten.unsqueeze.default}
_MANY = 4
_FEW = 4  # slices that are copied faster than picked entry by entry


class Builder:
    """The graph under construction. Equal calls are built once."""

    def __init__(self, captured: Captured):
        self.captured = captured
        self.graph = Graph()
        self.known: dict[Any, Node] = {}
        self.origin: Node | None = None

    def adopt(self, made: Node, node: Node) -> None:
        """Marks a copy of a node of the old graph: its provenance is its new operands', unless it mixes rows."""
        made.meta = {k: v for k, v in node.meta.items() if k != META}
        known = annotation(node)
        if made.op != "call_function" or isinstance(known.batching, CrossRow):
            made.meta[PROVENANCE] = known.provenance
        else:
            made.meta[PROVENANCE] = _join(made)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new row-wise call, with its traced value. Raises NotRowWise where that holds for the traced batch only."""
        turned = _turned_back(target, args)
        if turned is not None:
            return turned
        key = (target, _frozen(args), _frozen(kwargs))
        if key not in self.known:
            self.known[key] = self.again(target, *args, **kwargs)
        return self.known[key]

    def again(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """As `call`, for what has an effect: never the node of an equal call."""
        value = traced(target, *torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"]))
        made = self.graph.call_function(target, args, kwargs)
        if self.origin is not None:
            made.meta = {k: v for k, v in self.origin.meta.items() if k in ("stack_trace", "nn_module_stack")}
        made.meta["val"] = value
        made.meta[PROVENANCE] = _join(made)
        return made

    # -- carrying forms out

    def whole(self, form: Form) -> Node:
        """The node that holds the form's value."""
        match form:
            case Whole(node):
                return node
            case Picked(base, dim, index):
                return self.pick(base.node, dim, index)
            case Blocks(dim, parts):
                return self._joined(dim, parts)
            case Sum():
                return self._added(form)
            case Expanded(inner, shape):
                return self.call(aten.expand.default, self.whole(inner), self.sizes(shape))
            case Deferred():
                return form.carry()
            case Filled(value, shape, like):
                return self.call(aten.new_full.default, like, self.sizes(shape), value)
        raise TypeError(f"no form: {form!r}")

    def pick(self, node: Node, dim: int, index: Sequence[int]) -> Node:
        """Entries of `node` along `dim`: slices where consecutive; of a scaled weight, those of both factors."""
        if list(index) == list(range(int(node.meta["val"].shape[dim]))):
            return node
        if node.target is aten.mul.Tensor and node.meta[PROVENANCE] is Provenance.CONSTANT and _alike(node):
            factors = [f if f.meta["val"].shape[dim] == 1 else self.pick(f, dim, index) for f in node.all_input_nodes]
            return self.call(aten.mul.Tensor, *factors)
        known = self._literal_entries(node, dim, index)
        if known is not None:
            return known
        runs = _runs(index)
        if len(runs) <= _FEW:
            return self.cat([self.call(aten.slice.Tensor, node, dim, *run) for run in runs], dim)
        return self.call(aten.index_select.default, node, dim, self.constant(index))

    def _literal_entries(self, node: Node, dim: int, index: Sequence[int]) -> Node | None:
        """Entries of a literal of whole numbers: a literal too, on the device it is moved to."""
        source, moved = node, None
        while source.target in _SHOWS:
            moved = source if source.target is aten.to.device and moved is None else moved
            source = source.args[0]  # type: ignore[assignment]
        whole = not node.meta["val"].is_floating_point() and str(source.target).startswith("_roo.")
        value = evaluate(self.captured, node) if whole and source.op == "get_attr" else None
        if value is None:
            return None
        key = ("entries", node, dim, tuple(index))
        if key not in self.known:
            made = self.literal(value.index_select(dim, torch.tensor(list(index))))
            self.known[key] = made if moved is None else self.call(aten.to.device, made, *moved.args[1:])
        return self.known[key]

    def constant(self, values: Sequence[int]) -> Node:
        """An int64 vector known at compile time."""
        key = ("constant", tuple(values))
        if key not in self.known:
            self.known[key] = self.literal(torch.tensor(list(values)))
        return self.known[key]

    def literal(self, value: torch.Tensor) -> Node:
        """A tensor known at compile time."""
        name = f"constant_{len(self.captured.constants)}"
        self.captured.constants[name] = value.contiguous()
        made = self.graph.get_attr(f"_roo.{name}")
        mode = next(n.meta["val"].fake_mode for n in self.graph.nodes if isinstance(n.meta.get("val"), FakeTensor))
        made.meta = {"val": mode.from_tensor(value, static_shapes=True), PROVENANCE: Provenance.CONSTANT}
        return made

    def sizes(self, shape: Sequence[Any]) -> list[Any]:
        """A traced shape as arguments: sizes that depend on the batch become nodes."""
        return [s if is_static(s) else self.size(s) for s in shape]

    def size(self, size: torch.SymInt) -> Node:
        """A node whose value is the traced size."""
        made = self._sized(size.node.expr)
        assert isinstance(made, Node)
        return made

    def _sized(self, expr: sympy.Expr) -> Node | int:
        """A size, found among the values or computed from such as are."""
        if expr.is_Integer:
            return int(expr)
        key = ("size", expr)
        if key not in self.known:
            found = self._found(expr)
            if found is None:
                fold = {sympy.Mul: operator.mul, sympy.Add: operator.add}.get(expr.func)
                if fold is None:
                    raise KeyError(f"no value has size {expr}")
                first, *rest = [self._sized(part) for part in expr.args]
                for part in rest:
                    first = self.call(fold, first, part)
                assert isinstance(first, Node)
                found = first
            self.known[key] = found
        return self.known[key]

    def _found(self, expr: sympy.Expr) -> Node | None:
        for node in self.graph.nodes:
            value = node.meta.get("val")
            for dim, s in enumerate(value.shape if isinstance(value, FakeTensor) else ()):
                if isinstance(s, torch.SymInt) and s.node.expr == expr:
                    return self.call(aten.sym_size.int, node, dim)
        return None

    def _joined(self, dim: int, parts: Sequence[Form]) -> Node:
        """Parts as one tensor; consecutive parts of one side are joined first, so that they cross as one."""
        if sum(isinstance(p, Picked) and p.dim == dim for p in parts) > _MANY:
            return self._permuted(dim, parts)
        runs: list[list[Node]] = []
        last: bool | None = None
        for part in parts:
            early = provenance(part) is not Provenance.IMPRESSION
            node = self.whole(part)
            if early == last:
                runs[-1].append(node)
            else:
                runs.append([node])
            last = early
        joined = [self.cat(run, dim) for run in runs]
        return self.cat(joined, dim)

    def _permuted(self, dim: int, parts: Sequence[Form]) -> Node:
        """Many picks of few tensors: the tensors side by side, then one pick."""
        starts: dict[Node, int] = {}
        total = 0
        index: list[int] = []
        for part in sorted(parts, key=lambda p: provenance(p) is Provenance.IMPRESSION):
            node = _base(self, part, dim)
            if node not in starts:
                starts[node] = total
                total += int(node.meta["val"].shape[dim])
        for part in parts:
            chosen = part.index if isinstance(part, Picked) and part.dim == dim else range(int(part.shape[dim]))
            index += [starts[_base(self, part, dim)] + i for i in chosen]
        runs: dict[bool, list[Node]] = {True: [], False: []}
        for node in starts:
            runs[node.meta[PROVENANCE] is not Provenance.IMPRESSION].append(node)
        return self.pick(self.cat([self.cat(run, dim) for run in runs.values() if run], dim), dim, index)

    def cat(self, nodes: Sequence[Node], dim: int) -> Node:
        """Nodes side by side along `dim`."""
        return nodes[0] if len(nodes) == 1 else self.call(aten.cat.default, list(nodes), dim)

    def _added(self, form: Sum) -> Node:
        """Request terms first, impression terms next, one add."""
        sides: dict[bool, list[tuple[float, Node]]] = {True: [], False: []}
        for coefficient, term in form.terms:
            inner = term.form if isinstance(term, Expanded) else term
            sides[provenance(term) is not Provenance.IMPRESSION].append((coefficient, self.whole(inner)))
        done = [self._weighted(terms) for terms in sides.values() if terms]
        total = done[0] if len(done) == 1 else self.call(aten.add.Tensor, *done)
        want = form.shape
        if len(total.meta["val"].shape) != len(want) or any(
            is_static(w) and int(w) != s for w, s in zip(want, total.meta["val"].shape) if is_static(s)
        ):
            return self.call(aten.expand.default, total, self.sizes(want))
        return total

    def _weighted(self, terms: list[tuple[float, Node]]) -> Node:
        # Positive terms first, so that a difference is one sub.
        terms = sorted(terms, key=lambda t: t[0] < 0)
        total: Node | None = None
        for coefficient, node in terms:
            if total is None:
                total = node if coefficient == 1 else self.call(aten.mul.Tensor, node, coefficient)
            elif coefficient == 1:
                total = self.call(aten.add.Tensor, total, node)
            elif coefficient == -1:
                total = self.call(aten.sub.Tensor, total, node)
            else:
                total = self.call(aten.add.Tensor, total, self.call(aten.mul.Tensor, node, coefficient))
        assert total is not None
        return total


def _base(builder: Builder, part: Form, dim: int) -> Node:
    return part.base.node if isinstance(part, Picked) and part.dim == dim else builder.whole(part)


def _join(node: Node) -> Provenance:
    sources = [n.meta[PROVENANCE] for n in node.all_input_nodes if not _is_size(n)]
    return max(sources, default=Provenance.CONSTANT)


def _turned_back(target: Any, args: Sequence[Any]) -> Node | None:
    """What a transpose was of, if `target` turns the same two dims back."""
    if target not in (aten.transpose.int, aten.t.default) or args[0].target is not target:
        return None
    node, *dims = args
    before, *turned = node.args
    ndim = node.meta["val"].ndim
    same = {d % ndim for d in dims} == {d % ndim for d in turned}
    return before if same and isinstance(before, Node) else None


def _is_size(node: Node) -> bool:
    return not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple))


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _frozen(v)) for k, v in value.items()))
    return (type(value), value) if isinstance(value, (int, float, bool)) else value


def _runs(index: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive entries, as half-open ranges; no entry is one empty range."""
    runs: list[tuple[int, int]] = []
    for i in index:
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs or [(0, 0)]


def _alike(node: Node) -> bool:
    """Whether a product has two tensors of as many dims as it."""
    dims = [n.meta["val"].ndim for n in node.all_input_nodes]
    return len(node.args) == 2 and dims == [node.meta["val"].ndim] * 2
