"""Outer products followed by a linear map: put the request's factor into the weight, once per request.

    linear(flatten(E u x c), W)[n]     =  sum_m (sum_h W[n, h, m] u[h]) c[m]        u: h entries, c: m entries
                                       =  jagged_bmm(W u, c)
    linear(flatten(E k x q), W)[t, n]  =  sum_m (sum_h W[n, h, m] k[t, h]) q[m]     k: a history, q: a target

The cross network of xDeepFM (CIN), outer-product layers, bilinear maps and activation units are of this kind.
"""

from __future__ import annotations

import math
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
    numel,
    provenance,
    same_size,
)
from passes.split import Application, Splitter
from passes.splits.blocks import has_early, pick_form
from passes.splits.views import VIEWS
from roo_rewrite.facts import Provenance

aten = torch.ops.aten
_LEAD, _REST = "bcdefg", "xyzvw"


def outer(s: Splitter, app: Application) -> Form | None:
    """x [.., h, 1, ..] * y [.., 1, m, ..] in cells, if a cell has the request's factor; carried out only if asked."""
    x, y = app["self"], app["other"]
    place = _outer_dim(s, x, y)
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


def _outer_dim(s: Splitter, x: Any, y: Any) -> int | None:
    """The dim p where one has entries and the other size 1, the other way round at p + 1.

    Of several, as in `q [B, 1, m, 1] * k [B, T, 1, h]`, the last, if what reads the product flattens it.
    """
    if not isinstance(x, Form) or not isinstance(y, Form) or x.ndim != y.ndim:
        return None
    other = [d for d in range(x.ndim) if not same_size(x.shape[d], y.shape[d])]
    found = [p for p in other if _crossed(x, y, p)]
    if len(other) > 2 and (isinstance(x, Blocks) or isinstance(y, Blocks) or not _flattened(s)):
        return None
    return found[-1] if found else None


def _crossed(x: Form, y: Form, place: int) -> bool:
    """Whether both are vectors, of `place` and of the dim after it; another dim may be repeated in one of them."""
    if place == 0 or place + 1 >= x.ndim or not all(is_static(n) for f in (x, y) for n in f.shape[place : place + 2]):
        return False
    ones = [tuple(same_size(n, 1) for n in f.shape[place : place + 2]) for f in (x, y)]
    rest = [(a, b) for d, (a, b) in enumerate(zip(x.shape, y.shape)) if d not in (place, place + 1)]
    broadcast = all(same_size(a, b) or same_size(a, 1) or same_size(b, 1) for a, b in rest)
    return sorted(ones) == [(False, True), (True, False)] and broadcast


def _flattened(s: Splitter) -> bool:
    users = [] if s.builder.origin is None else s.builder.origin.users
    return any(str(u.target) in VIEWS for u in users)


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
    """A flattened outer product: `first [.., h, 1, ..]` times `second [.., 1, m, ..]`, h at `dim`.

    One of them is the request's.
    """

    first: Node
    second: Node
    early_first: bool
    dim: int

    @property
    def sizes(self) -> tuple[int, int]:
        """h and m."""
        return int(self.first.meta["val"].shape[self.dim]), int(self.second.meta["val"].shape[self.dim + 1])

    def named(self, s: Splitter, letters: str) -> tuple[Named, Named]:
        """The request's factor and the impression's, by the letters of the product."""
        first = _named(s, self.first, letters, self.dim, self.dim + 1)
        second = _named(s, self.second, letters, self.dim + 1, self.dim)
        return (first, second) if self.early_first else (second, first)


@dataclass(frozen=True)
class Named:
    """A node and a letter for each of its dims."""

    node: Node
    letters: str

    def sizes(self) -> dict[str, Any]:
        """The size behind each letter."""
        return dict(zip(self.letters, self.node.meta["val"].shape))


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
    x, y = Whole(a), Whole(b)
    if x.ndim != y.ndim or not _crossed(x, y, dim):
        return None
    if not is_static(flat[dim]) or flat[dim] != shape[dim] * shape[dim + 1]:
        return None
    first, second = (a, b) if same_size(y.shape[dim], 1) else (b, a)
    early = [provenance(Whole(f)) is not Provenance.IMPRESSION for f in (first, second)]
    return Factors(first, second, early[0], dim) if early[0] != early[1] else None


def _named(s: Splitter, node: Node, letters: str, entries: int, one: int) -> Named:
    """A factor with dim `entries`, without its dim `one`, and without others along which it is only repeated."""
    gone = {one}
    while node.target is aten.expand.default:
        source, whole = node.args[0], node.meta["val"].shape
        assert isinstance(source, Node)
        if source.meta["val"].ndim != len(whole) or not same_size(source.meta["val"].shape[entries], whole[entries]):
            break
        node = source
    gone |= {d for d, n in enumerate(node.meta["val"].shape) if d > 0 and same_size(n, 1)}
    for dim in sorted(gone, reverse=True):
        node = _squeezed(s, node, dim)
    return Named(node, "".join(c for d, c in enumerate(letters) if d not in gone))


def _squeezed(s: Splitter, node: Node, dim: int) -> Node:
    if node.target is aten.unsqueeze.default and node.args[1] in (dim, dim - node.meta["val"].ndim):
        assert isinstance(node.args[0], Node)
        return node.args[0]
    return s.builder.call(aten.squeeze.dim, node, dim)


@dataclass(frozen=True)
class Cell:
    """Outer products of one request's factor and one impression's, either way round, contracted over both dims.

    terms: of each whether the request's comes first, and the weight columns it meets, in its order; letters: of the
    result, n the weight's rows; h and m are contracted.
    """

    early: Named
    late: Named
    terms: tuple[tuple[bool, tuple[int, ...]], ...]
    letters: str

    @property
    def inside(self) -> str:
        """Letters of the weight with the request's factor in it."""
        return self.early.letters.replace("h", "nm")


def cells(s: Splitter, products: Sequence[tuple[Factors, Sequence[int], Sequence[int] | None]]) -> list[Cell]:
    """(factors, weight columns, entries) of whole outer products; u x c and c x u are one cell."""
    found: dict[tuple[Node, Node], Cell] = {}
    for factors, columns, index in products:
        order = columns if index is None else [c for _, c in sorted(zip(index, columns))]
        ndim, dim = factors.first.meta["val"].ndim, factors.dim
        lead, rest = _LEAD[:dim], _REST[: ndim - dim - 2]
        early, late = factors.named(s, f"{lead}{'hm' if factors.early_first else 'mh'}{rest}")
        term = (factors.early_first, tuple(order))
        before = found.get((early.node, late.node))
        terms = (term,) if before is None else (*before.terms, term)
        found[early.node, late.node] = Cell(early, late, terms, f"{lead}n{rest}")
    return list(found.values())


def multiply(s: Splitter, cell: Cell, weight: Node) -> Node:
    """The products of a cell with these weight columns [N, K], added up."""
    b, n = s.builder, int(weight.meta["val"].shape[0])
    h, m = int(cell.early.sizes()["h"]), int(cell.late.sizes()["m"])
    total: Node | None = None
    for early_first, columns in cell.terms:
        picked = b.pick(weight, 1, columns)
        if early_first:
            mine = b.call(aten.reshape.default, picked, [n, h, m])
        else:
            mine = b.call(aten.transpose.int, b.call(aten.reshape.default, picked, [n, m, h]), 1, 2)
        total = mine if total is None else b.call(aten.add.Tensor, total, mine)
    inside = b.call(aten.einsum.default, f"nhm,{cell.early.letters}->{cell.inside}", [total, cell.early.node])
    out = "".join(c for c in cell.letters if c in cell.late.letters + cell.inside)
    made = b.call(aten.einsum.default, f"{cell.late.letters},{cell.inside}->{out}", [cell.late.node, inside])
    for dim, c in enumerate(cell.letters):
        made = made if c in out else b.call(aten.unsqueeze.default, made, dim)
    return made


def price(s: Splitter, cell: Cell, n: int) -> float:
    """Time of the request's factor into the weight, then of what is left per impression."""
    size = {**cell.late.sizes(), **cell.early.sizes(), "n": n}
    h, m, mine = int(size["h"]), int(size["m"]), s.price
    inside = tuple(size[c] for c in cell.inside)
    both = tuple(size[c] for c in cell.letters if c in cell.late.letters and c in cell.early.letters)
    matrices = mine.rows(both, Provenance.REQUEST)
    rows = mine.fanout * numel([size[c] for c in cell.late.letters if c not in cell.early.letters + "m"])
    columns = n * numel([size[c] for c in cell.early.letters if c not in cell.late.letters + "h"])
    out = tuple(size[c] for c in cell.letters if c in size)
    total = mine.product(inside, h, Provenance.REQUEST, n * m) + mine.batched(matrices, rows, m, columns)
    # The weights of a request are laid out as matrices.
    return total + mine.move(inside, Provenance.REQUEST, 4.0) + 2 * mine.move(out) + mine.start(6)


def covers(found: Factors, index: Sequence[int] | None) -> bool:
    """Whether the picked entries are all of the outer product, once each."""
    return index is None or sorted(index) == list(range(math.prod(found.sizes)))


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
    build, at = s.builder, theirs.index(cut)
    flat = build.whole(pick_form(s, other, at, range(start, start + math.prod(found.sizes))))
    shape = tuple(flat.meta["val"].shape)
    sizes = [*build.sizes(shape[:at]), *found.sizes, *build.sizes(shape[at + 1 :])]
    weight = build.call(aten.reshape.default, flat, sizes)
    pair = "".join([c for c in ascii_letters if c not in mine + theirs + out][:2])
    early, late = found.named(s, mine.replace(cut, pair))
    if set(out) - set(early.letters + late.letters + theirs):
        return None
    names = dict.fromkeys(early.letters + theirs.replace(cut, pair))
    kept = "".join(c for c in names if c in late.letters or c in out)
    equation = f"{early.letters},{theirs.replace(cut, pair)}->{kept}"
    inside = build.call(aten.einsum.default, equation, [early.node, weight])
    return Whole(build.call(aten.einsum.default, f"{late.letters},{kept}->{out}", [late.node, inside]))
