"""Outer products followed by a linear map: put the request's factor into the weight, once per request.

    linear(flatten(E u x c), W)[n]  =  sum_m (sum_h W[n, h, m] u[h]) c[m]        u: h entries, c: m entries
                                    =  jagged_bmm(W u, c)

The cross network of xDeepFM (CIN), outer-product layers and bilinear maps are of this kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

import torch
from torch.fx import Node

from passes.forms import (
    Blocks,
    Form,
    Lazy,
    Whole,
    dtype_of,
    is_static,
    provenance,
    same_size,
)
from passes.split import Application, Splitter
from passes.splits.blocks import has_early, pick_form
from roo_rewrite.facts import Provenance

aten = torch.ops.aten


def outer(s: Splitter, app: Application) -> Form | None:
    """x [.., h, 1, ..] * y [.., 1, m, ..] in cells, if a cell has the request's factor; carried out only if asked."""
    x, y = app["self"], app["other"]
    place = _outer_dim(x, y)
    if place is None or not (has_early(x) or has_early(y)):
        return None
    if dtype_of(x) is not dtype_of(y) or not dtype_of(x).is_floating_point:
        return None
    if provenance(x) is not Provenance.IMPRESSION and provenance(y) is not Provenance.IMPRESSION:
        return None
    if _listed(x, place) and _listed(y, place):  # a list of pairs: each by itself is of one side or both
        return None
    first, second = (x, y) if same_size(y.shape[place], 1) else (y, x)
    rows = [
        Blocks(place + 1, tuple(_cell(s, a, b) for b in _parts(s, second, place + 1))) for a in _parts(s, first, place)
    ]
    rows = [r.parts[0] if len(r.parts) == 1 else r for r in rows]  # type: ignore[misc]
    inner = rows[0] if len(rows) == 1 else Blocks(place, tuple(rows))
    return Lazy(inner, lambda: s.builder.whole(s.plain(app)))


def _listed(form: Form, place: int) -> bool:
    """Whether a form is cut along a dim before those of the product, which goes through it entry by entry."""
    return isinstance(form, Blocks) and form.dim < place


def _outer_dim(x: Any, y: Any) -> int | None:
    """The dim p where one has entries and the other size 1, the other way round at p + 1."""
    if not isinstance(x, Form) or not isinstance(y, Form) or x.ndim != y.ndim:
        return None
    other = [d for d in range(x.ndim) if not same_size(x.shape[d], y.shape[d])]
    if len(other) != 2 or other[1] != other[0] + 1 or other[0] == 0:
        return None
    sizes = [(f.shape[other[0]], f.shape[other[1]]) for f in (x, y)]
    if not all(is_static(n) for pair in sizes for n in pair):
        return None
    one = sorted(sizes, key=lambda pair: int(pair[0]))
    return other[0] if one[0][0] == 1 and one[1][1] == 1 else None


def _parts(s: Splitter, form: Form, dim: int) -> list[Form]:
    """The blocks of a form along `dim`; those of one side that stand together are one."""
    if not isinstance(form, Blocks) or form.dim != dim:
        return [Whole(s.builder.whole(form))]
    out: list[list[Form]] = []
    for part in form.parts:
        if out and has_early(out[-1][-1]) == has_early(part):
            out[-1].append(part)
        else:
            out.append([part])
    return [Whole(s.builder.cat([s.builder.whole(f) for f in run], dim)) for run in out]


def _cell(s: Splitter, a: Form, b: Form) -> Form:
    return Whole(s.builder.call(aten.mul.Tensor, s.builder.whole(a), s.builder.whole(b)))


@dataclass(frozen=True)
class Factors:
    """A flattened outer product: `first [.., h, 1, ..]` times `second [.., 1, m, ..]`; one is the request's."""

    first: Node
    second: Node
    early_first: bool


def factors(node: Node, dim: int = 1) -> Factors | None:
    """The factors of an outer product over dims `dim` and `dim` + 1, flattened, where exactly one is request-level."""
    if node.target is not aten.reshape.default:
        return None
    product = node.args[0]
    if not isinstance(product, Node) or product.target is not aten.mul.Tensor:
        return None
    a, b = product.args[:2]
    shape, flat = tuple(product.meta["val"].shape), tuple(node.meta["val"].shape)
    if not isinstance(a, Node) or not isinstance(b, Node) or len(flat) != len(shape) - 1 or len(shape) < dim + 2:
        return None
    if _outer_dim(Whole(a), Whole(b)) != dim or not is_static(flat[dim]) or flat[dim] != shape[dim] * shape[dim + 1]:
        return None
    first, second = (a, b) if same_size(b.meta["val"].shape[dim], 1) else (b, a)
    early = [provenance(Whole(f)) is not Provenance.IMPRESSION for f in (first, second)]
    return Factors(first, second, early[0]) if early[0] != early[1] else None


@dataclass(frozen=True)
class Cell:
    """Outer products of one request's factor [B, h, ...] and one impression's [B, m, ...], either way round.

    terms: of each whether the request's comes first, and the weight columns it meets, in its order.
    """

    early: Node
    late: Node
    terms: tuple[tuple[bool, tuple[int, ...]], ...]


def cells(s: Splitter, products: Sequence[tuple[Factors, Sequence[int], Sequence[int] | None]]) -> list[Cell]:
    """(factors, weight columns, entries) of whole outer products; u x c and c x u are one cell."""
    found: dict[tuple[Node, Node], list[tuple[bool, tuple[int, ...]]]] = {}
    for factors, columns, index in products:
        order = columns if index is None else [c for _, c in sorted(zip(index, columns))]
        pair = (_squeezed(s, factors.first, 2), _squeezed(s, factors.second, 1))
        key = pair if factors.early_first else (pair[1], pair[0])
        found.setdefault(key, []).append((factors.early_first, tuple(order)))
    return [Cell(early, late, tuple(terms)) for (early, late), terms in found.items()]


def _squeezed(s: Splitter, node: Node, dim: int) -> Node:
    if node.target is aten.unsqueeze.default and node.args[1] == dim:
        assert isinstance(node.args[0], Node)
        return node.args[0]
    return s.builder.call(aten.squeeze.dim, node, dim)


def multiply(s: Splitter, cell: Cell, weight: Node) -> Node:
    """The products of a cell with these weight columns, added up: [B, N, ...]."""
    b, n = s.builder, int(weight.meta["val"].shape[0])
    h, m = (int(f.meta["val"].shape[1]) for f in (cell.early, cell.late))
    total: Node | None = None
    for early_first, columns in cell.terms:
        picked = b.pick(weight, 1, columns)
        if early_first:
            mine = b.call(aten.reshape.default, picked, [n, h, m])
        else:
            mine = b.call(aten.transpose.int, b.call(aten.reshape.default, picked, [n, m, h]), 1, 2)
        total = mine if total is None else b.call(aten.add.Tensor, total, mine)
    rest = "xyz"[: len(cell.early.meta["val"].shape) - 2]
    inside = b.call(aten.einsum.default, f"nhm,bh{rest}->bnm{rest}", [total, cell.early])
    return b.call(aten.einsum.default, f"bm{rest},bnm{rest}->bn{rest}", [cell.late, inside])


def covers(found: Factors, index: Sequence[int] | None) -> bool:
    """Whether the picked entries are all of the outer product, once each."""
    h, m = int(found.first.meta["val"].shape[1]), int(found.second.meta["val"].shape[2])
    return index is None or sorted(index) == list(range(h * m))


def contracted(
    s: Splitter, part: Form, other: Form, letters: tuple[str, str, str], cut: str, start: int
) -> Form | None:
    """The product over the letter `cut` of a flattened outer product of both sides and what does not depend on the
    impression, from its entry `start` on; None where `part` or `other` is not that.

    sum_hm q[h] k[m] W[h, m, n]  =  sum_h q[h] (sum_m k[m] W[h, m, n])        k: the request's
    """
    part = part.inner if isinstance(part, Lazy) else part
    mine, theirs, out = letters
    found = factors(part.node, mine.index(cut)) if isinstance(part, Whole) else None
    if found is None or cut not in theirs or provenance(other) is Provenance.IMPRESSION:
        return None
    build, dim, at = s.builder, mine.index(cut), theirs.index(cut)
    sizes = [int(found.first.meta["val"].shape[dim]), int(found.second.meta["val"].shape[dim + 1])]
    flat = build.whole(pick_form(s, other, at, range(start, start + sizes[0] * sizes[1])))
    shape = tuple(flat.meta["val"].shape)
    weight = build.call(aten.reshape.default, flat, [*build.sizes(shape[:at]), *sizes, *build.sizes(shape[at + 1 :])])
    h, m = [c for c in ascii_letters if c not in mine + theirs + out][:2]
    first = _squeezed(s, found.first, dim + 1), mine.replace(cut, h)
    second = _squeezed(s, found.second, dim), mine.replace(cut, m)
    early, late = (first, second) if found.early_first else (second, first)
    names = dict.fromkeys(early[1] + theirs.replace(cut, h + m))
    kept = "".join(c for c in names if c in late[1] or c in out)
    inside = build.call(aten.einsum.default, f"{early[1]},{theirs.replace(cut, h + m)}->{kept}", [early[0], weight])
    return Whole(build.call(aten.einsum.default, f"{late[1]},{kept}->{out}", [late[0], inside]))
