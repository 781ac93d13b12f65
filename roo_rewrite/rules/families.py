"""Families of rules: what most ops are, in one line each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Replicated, Rows, Several
from roo_rewrite.rules.registry import Call, Operand


def wrap(dim: int, ndim: int) -> int:
    """A dim counted from the front; a 0-dim tensor has one."""
    return dim + max(ndim, 1) if dim < 0 else dim


def batched(rows: Rows | None) -> Batching:
    """Rows as a Batching; Replicated for None."""
    return Replicated() if rows is None else rows


def unary(call: Call) -> Batching:
    """f(x) with the shape of x, each entry (or each row) on its own: the batch stays."""
    return batched(call.operand(next(iter(call.args))).rows)


def broadcasting(call: Call) -> Batching:
    """Pointwise with broadcasting: operands are aligned at their last dims."""
    found = batched(aligned(call.operands()))
    return each(found, len(call.out)) if call.several else found


def aligned(operands: Sequence[Operand]) -> Rows | None:
    """The common batch of operands broadcast together. Declines where it lies in different dims.

    An operand without a batch must have size 1 there: else it holds one entry per row of the trace.
    """
    ndim = max((o.ndim for o in operands), default=0)
    found = {shifted(o.rows, ndim - o.ndim) for o in operands if o.rows is not None}
    if not found:
        return None
    if len(found) > 1:
        raise NotRowWise("the batch lies in different dims of the operands")
    rows = found.pop()
    for o in operands:
        at = rows.dim - (ndim - o.ndim)
        if o.rows is None and at >= 0 and o.shape[at] != 1:
            raise NotRowWise("an operand without a batch has an entry per row")
    return rows


def shifted(rows: Rows, by: int) -> Rows:
    """The same batch, `by` dims further back."""
    return Rows(rows.dim + by, rows.outer, rows.inner)


def along(call: Call, *dims: int, what: str = "works along the batch dim") -> Batching:
    """An op that mixes entries along `dims` of its first operand only, and keeps the shape."""
    x = call.operand(next(iter(call.args)))
    if x.rows is not None and x.rows.dim in {wrap(d, x.ndim) for d in dims}:
        raise NotRowWise(what)
    return batched(x.rows)


def broadcast_shape(operands: Sequence[Operand]) -> tuple[int, ...]:
    """The shape of operands broadcast together."""
    ndim = max((o.ndim for o in operands), default=0)
    padded = [(1,) * (ndim - o.ndim) + o.shape for o in operands]
    return tuple(next((s for s in sizes if s != 1), 1) for sizes in zip(*padded))


def listed(dims: int | Sequence[int] | None) -> list[int] | None:
    """A dim argument that may be one, several or none, as a list."""
    return [dims] if isinstance(dims, int) else None if dims is None else list(dims)


def reduced(x: Operand, dims: Sequence[int] | None, keepdim: bool) -> Batching:
    """The batch after a reduction over `dims` (None or empty: all) of x."""
    rows = x.rows
    gone = {wrap(d, x.ndim) for d in dims} if dims else set(range(x.ndim))
    if rows is None:
        return Replicated()
    if rows.dim in gone:
        raise NotRowWise("reduces over the batch dim")
    return rows if keepdim else shifted(rows, -sum(d < rows.dim for d in gone))


def einsum(equation: str, operands: Sequence[Operand]) -> Batching:
    """The batch of a product of tensors written as an einsum of single letters, `"bik,bkj->bij"`.

    The letter of the batch must stand in the result, and every operand that has the letter must be
    batched there, unless its size is 1 (it is broadcast).
    """
    left, right = equation.split("->")
    terms = left.split(",")
    letters = {(term[o.rows.dim], o.rows.outer, o.rows.inner) for term, o in zip(terms, operands) if o.rows}
    if not letters:
        return Replicated()
    if len(letters) > 1:
        raise NotRowWise("the batch lies in different dims of the operands")
    letter, outer, inner = letters.pop()
    if letter not in right:
        raise NotRowWise("contracts over the batch dim")
    for term, o in zip(terms, operands):
        if letter in term and o.rows is None and o.shape[term.index(letter)] != 1:
            raise NotRowWise("an operand without a batch has an entry per row")
    return Rows(right.index(letter), outer, inner)


def reshaped(x: Operand, out: Sequence[int], batch: int) -> Batching:
    """The batch after a row-major reshape of x to `out`.

    In row-major order the batch index has a stride: `inner` entries below one row, `outer` blocks above.
    It survives in the out dim whose own stride divides `inner` and whose size takes in all of the batch.
    """
    rows = x.rows
    if rows is None:
        return Replicated()
    inner = rows.inner * math.prod(x.shape[rows.dim + 1 :])
    outer = rows.outer * math.prod(x.shape[: rows.dim])
    stride = 1
    for dim in reversed(range(len(out))):
        if stride <= inner < stride * max(out[dim], 1) and inner % stride == 0:
            kept_inner, span = inner // stride, batch * (inner // stride)
            kept_outer = out[dim] // span if span else 0
            if kept_outer * span == out[dim] and kept_outer * math.prod(out[:dim]) == outer:
                return Rows(dim, kept_outer, kept_inner)
        stride *= out[dim]
    raise NotRowWise("the view mixes rows of the batch with other dims")


def each(batching: Batching, count: int) -> Batching:
    """The same batching for each of `count` outputs."""
    return Several((batching,) * count)
