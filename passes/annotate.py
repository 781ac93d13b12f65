"""Provenance and batching on every node.

    graph                           annotation
    u = placeholder  (request)      REQUEST     Rows(0)
    x = placeholder  (impression)   IMPRESSION  Rows(0)
    w = get_attr                    CONSTANT    Replicated
    h = linear(u, w)                REQUEST     Rows(0)
    m = mean(h, [0])                IMPRESSION  CrossRow(reduces over the batch dim)
    n = sym_size(x, 0)              -           Size

Postcondition: `node.meta["roo"]` of every node but the output is an Annotation. REQUEST means proved:
every op from the request inputs to here has a rule that showed it row-wise, and the traced sizes agree.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Node

import roo_rewrite.rules  # noqa: F401 - registers the rules
from passes.first_draw import first_draw, of_no_row
from roo_rewrite.capture import Captured
from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import (
    EFFECT,
    META,
    Annotation,
    Batching,
    CrossRow,
    Lengths,
    Provenance,
    Ragged,
    Replicated,
    RowIndex,
    Rows,
    Several,
    Size,
    annotation,
    computed_lengths,
)
from roo_rewrite.guards import BATCH
from roo_rewrite.inputs import Atom, Inputs
from roo_rewrite.kjt import Lookup
from roo_rewrite.ops.kept import kept_rows, marked_entries, some_rows, sorted_rows, unsorted_rows
from roo_rewrite.probing import probe
from roo_rewrite.rules.registry import Extent, Operand, find, infer, make_call, op_name

aten = torch.ops.aten
WEIGHTED = "roo_weighted"
EXTREME = "roo_extreme"
EXTREMES = (aten.max.default, aten.min.default, aten.any.default, aten.all.default)
_ITEMS = (aten.item.default, aten._local_scalar_dense.default)
# Ops that take lengths: a number for each row, how many jagged values are its own.
_COUNTING = {
    "aten.cumsum.default",
    "aten.repeat_interleave.self_Tensor",
    "aten.segment_reduce.default",
    "fbgemm.asynchronous_complete_cumsum.default",
    "fbgemm.asynchronous_exclusive_cumsum.default",
    "fbgemm.asynchronous_inclusive_cumsum.default",
    "fbgemm.pack_segments.default",
}
# Stands for a size that only a run can tell, a total of lengths: a prime that is no other size.
_AT_RUN_TIME = 999_983


@dataclass(frozen=True)
class Policy:
    """What the caller allows: `dropout` per impression or per request; leaves declared row-wise by path."""

    dropout: str = "per_impression"
    row_wise_leaves: frozenset[str] = frozenset()


def annotate(captured: Captured, inputs: Inputs, model: nn.Module, policy: Policy) -> None:
    """Annotates every node of the captured graph, in order."""
    atoms = iter(inputs.atoms)
    captured.steady = {}
    drawn = first_draw(captured.graph)
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            node.meta[META] = _input(next(atoms))
        elif node.op == "get_attr":
            node.meta[META] = Annotation(Provenance.CONSTANT, Replicated())
        elif node.op == "call_function":
            node.meta[META] = _call(captured, node, model, policy)
        if drawn is not None and node is drawn and of_no_row(drawn):
            node.meta[META] = Annotation(Provenance.REQUEST, Replicated())
        if EFFECT in node.meta and node.op != "output":
            node.meta[META] = _cross_row(node.meta[EFFECT])


def _input(atom: Atom) -> Annotation:
    match atom.kind:
        case "shared":
            return Annotation(Provenance.CONSTANT, Replicated())
        case "values":
            return Annotation(atom.provenance, Ragged(atom.rows_in))
        case "lengths":
            return Annotation(atom.provenance, Lengths(lengths=atom.name))
        case "dense":
            return Annotation(atom.provenance, Rows(0))
        case _:
            return _cross_row(f"{atom.name!r} holds offsets, which count all rows before")


def _cross_row(reason: str) -> Annotation:
    return Annotation(Provenance.IMPRESSION, CrossRow(reason), reason)


def _call(captured: Captured, node: Node, model: nn.Module, policy: Policy) -> Annotation:
    value = node.meta.get("val")
    if node.target is getattr:
        return Annotation(Provenance.CONSTANT, Replicated())
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        return _part(annotation(node.args[0]), node.args[1])
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
        _note_steady(captured, node)
        return Annotation(Provenance.IMPRESSION, Size())
    operands = [n for n in _told_by(node) if _is_tensor(n)]
    sources = [annotation(n).provenance for n in operands]
    try:
        batching = _checked(captured, _batching(captured, node, model, policy), value)
    except NotRowWise as e:
        return _cross_row(str(e))
    return Annotation(max(sources, default=Provenance.CONSTANT), batching)


def _note_steady(captured: Captured, node: Node) -> None:
    """A size that is read off a value without a batch is one number, at whatever rate the value is made."""
    source, size = node.args[0] if node.args else None, node.meta["val"]
    if node.target not in _ITEMS or not isinstance(source, Node) or not isinstance(size, torch.SymInt):
        return
    known = annotation(source)
    if known.provenance is not Provenance.IMPRESSION and isinstance(known.batching, Replicated):
        expr = captured.expr(size)
        if isinstance(expr, sympy.Symbol) and expr != BATCH:
            captured.steady.setdefault(expr, node)


def _part(whole: Annotation, index: Any) -> Annotation:
    if not isinstance(whole.batching, Several):
        return whole
    return Annotation(whole.provenance, whole.batching.parts[index], whole.reason)


def _is_tensor(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (Tensor, list, tuple))


def _batching(captured: Captured, node: Node, model: nn.Module, policy: Policy) -> Batching:
    for source in _told_by(node):
        known = annotation(source).batching
        if isinstance(known, CrossRow):
            raise NotRowWise(known.reason)
    if node.target is torch.ops.roo.leaf.default:
        return _leaf(captured, node, model, policy)
    if node.target in (kept_rows, marked_entries, some_rows, sorted_rows, unsorted_rows):
        return _rowwise_by_agreement(node)
    if not isinstance(node.target, OpOverload):
        raise NotRowWise(f"no row rule for {op_name(node.target)}")
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    if random and find(str(node.target)) is None:
        raise NotRowWise("draws random numbers for every impression")
    outputs = [[int(_extent(captured, s)) for s in t.shape] for t in _tensors(node.meta["val"])]
    operand = functools.partial(_operand, captured, counting=str(node.target) in _COUNTING)
    call = make_call(node.target, node.args, node.kwargs, operand, captured.batch, outputs)
    special = _special(node, call.args, policy)
    return infer(call) if special is None else special


def _special(node: Node, args: dict[str, Any], policy: Policy) -> Batching | None:
    """Ops that are row-wise only by agreement: shared dropout, count-weighted batch norm, extremes over the batch."""
    node.meta.pop(EXTREME, None)
    if node.target in EXTREMES and _of_request(node):
        rows, dtype = args["self"].batching, args["self"].dtype
        if isinstance(rows, Rows) and rows.dim == 0 and not dtype.is_floating_point and not dtype.is_complex:
            node.meta[EXTREME] = rows
            return Replicated()
    if node.target is aten.dropout.default and policy.dropout == "per_request" and _of_inputs(node.args[0]):
        return args["input"].batching  # type: ignore[no-any-return]
    if node.target is aten.batch_norm.default and args["training"]:
        rows = args["input"].batching
        shared = any(EFFECT in n.meta for n in node.all_input_nodes)
        if type(rows) is Rows and rows.dim == 0 and _of_inputs(node.args[0]) and not shared:
            node.meta[WEIGHTED] = rows
            return rows
    return None


def _rowwise_by_agreement(node: Node) -> Batching:
    """Rows that a mask keeps, the others filled in by one of them: `kept_rows(E x, E m) = E kept_rows(x, m)`.

    So is an entry that a mask marks in each row. Sorted rows are taken for rows, and dropped or undone before anything
    else is done with them.
    """
    known = [annotation(n).batching for n in _told_by(node)]
    if not all(isinstance(b, Lengths) or b == Rows(0) for b in known):
        raise NotRowWise("a mask picks rows of more than the batch")
    return Rows(0)


def _told_by(node: Node) -> list[Node]:
    """What a value depends on: of sorted rows that are put back, not their order."""
    sources = node.all_input_nodes
    return sources[:1] if node.target in (sorted_rows, unsorted_rows) else sources


def _of_inputs(value: Any) -> bool:
    """Whether a value depends on an input: one that does not may be made on both sides, and must have no effect."""
    return isinstance(value, Node) and annotation(value).provenance is not Provenance.CONSTANT


def _of_request(node: Node) -> bool:
    """Whether all that an op reads are request-level rows."""
    known = [annotation(n).provenance for n in node.all_input_nodes]
    return known == [Provenance.REQUEST] and not any(EFFECT in n.meta for n in node.all_input_nodes)


def _leaf(captured: Captured, node: Node, model: nn.Module, policy: Policy) -> Batching:
    tensors, index = node.args
    site = captured.sites[index]  # type: ignore[index]
    batchings = [annotation(t).batching for t in tensors]  # type: ignore[union-attr,arg-type]
    if isinstance(site, Lookup):
        return site.batching(batchings)
    return probe(site, model, batchings, captured.batch, site.path in policy.row_wise_leaves)


def _operand(captured: Captured, value: Any, counting: bool = False) -> Any:
    if isinstance(value, Node):
        meaning = value.meta.get("val")
        if isinstance(meaning, Tensor):
            batching = annotation(value).batching
            counts = counting and meaning.ndim == 1 and not meaning.is_floating_point() and meaning.dtype != torch.bool
            if counts and batching == Rows(0):
                batching = Lengths(lengths=computed_lengths(value))
            return Operand(tuple(_extent(captured, s) for s in meaning.shape), batching, meaning.dtype)
        if isinstance(meaning, torch.SymInt):
            if not meaning.node.has_hint() and not _known(captured, captured.expr(meaning)):
                raise NotRowWise("a size is known only at run time")
            return _extent(captured, meaning)
        if isinstance(meaning, (torch.SymFloat, torch.SymBool)):
            raise NotRowWise("a number computed from the batch size is used")
        return meaning
    return value


def _extent(captured: Captured, size: int | torch.SymInt) -> int:
    expr = captured.expr(size)
    if expr.is_Integer:
        return int(expr)
    if isinstance(size, torch.SymInt) and size.node.has_hint():
        return Extent(size.node.hint)
    if not _known(captured, expr):
        return Extent(_AT_RUN_TIME)
    number = int(expr.subs({**_stand_ins(captured), BATCH: captured.batch}))
    return Extent(number) if BATCH in expr.free_symbols else number


def _known(captured: Captured, expr: sympy.Expr) -> bool:
    """Whether a size is one in terms of the batch and of steady sizes."""
    return bool(expr.free_symbols <= {BATCH, *captured.steady})


def _stand_ins(captured: Captured) -> dict[sympy.Symbol, int]:
    """A prime for each steady size, no two the same: rules take it for a width like any other."""
    found, last = {}, _AT_RUN_TIME
    for symbol in captured.steady:
        found[symbol] = last = int(sympy.prevprime(last))
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _tensors(v)


def _checked(captured: Captured, batching: Batching, value: Any) -> Batching:
    """The rule's verdict held against the traced sizes: the batch is where it says, and nowhere else.

    One of several outputs that does not agree is set aside alone.
    """
    if not isinstance(batching, Several):
        _agrees(captured, batching, next(_tensors(value), None))
        return batching
    parts = []
    for part, tensor in zip(batching.parts, _tensors(value), strict=True):
        try:
            _agrees(captured, part, tensor)
        except NotRowWise as e:
            part = CrossRow(str(e))
        parts.append(part)
    return Several(tuple(parts))


def _agrees(captured: Captured, part: Batching, tensor: Tensor | None) -> None:
    for dim, size in enumerate(captured.expr(s) for s in (tensor.shape if tensor is not None else ())):
        expected = _expected(part, dim)
        if expected is None and not size.free_symbols <= set(captured.steady):
            raise NotRowWise(f"dim {dim} of the result has size {size}, which the rule does not account for")
        if expected is not None and not isinstance(part, Ragged) and sympy.expand(size - expected) != 0:
            raise NotRowWise(f"dim {dim} of the result has size {size}, not {expected}")


def _expected(part: Batching, dim: int) -> sympy.Expr | None:
    """The size of dim `dim` in terms of BATCH; None where it must not depend on the batch."""
    if isinstance(part, Rows) and part.dim == dim:
        return BATCH * part.outer * part.inner
    if isinstance(part, RowIndex) and part.dim == dim:
        return BATCH
    if isinstance(part, Ragged) and dim == 0:
        return BATCH
    if type(part).__name__ == "Offsets" and dim == 0:
        return BATCH + int(part.total)  # type: ignore[attr-defined]
    return None
