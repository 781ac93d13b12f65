"""Rows centred and scaled, kept back for the linear map that may follow.

x = cat[E a, c]; m and r have one entry a row; m_p and n_p are mean and size of side p

x r            =  r cat[x_p]
x - m          =  cat[(x_p - m_p) + (m_p - m)]
sum (x - m)^2  =  sum_p [ sum (x_p - m_p)^2 + n_p (m_p - m)^2 ]          (no cancellation)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from passes.forms import (
    Alike,
    Blocks,
    Expanded,
    Form,
    Scaled,
    Sum,
    Whole,
    dtype_of,
    is_mixed,
    provenance,
    same_shape,
    same_size,
)
from passes.split import Application, Splitter, handles
from passes.splits.blocks import broadcast, has_early, running
from roo_rewrite.facts import Provenance

aten = torch.ops.aten
EXACT = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Side:
    """Entries of one side less their mean, that mean less what is taken off, and their places in the cut dim."""

    centred: Node
    gap: Node
    places: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Centred(Alike):
    """`inner` less one value a row; `dim` is cut."""

    inner: Form
    sides: tuple[Side, ...]
    dim: int
    how: Callable[[], Node]


@dataclass(frozen=True, eq=False)
class Squared(Alike):
    """The squares of a centred value."""

    inner: Centred
    how: Callable[[], Node]


def later(s: Splitter, app: Application) -> Callable[[], Node]:
    """Carries the op out when asked, in the name of the node that it stands for."""
    origin = s.builder.origin

    def how() -> Node:
        now, s.builder.origin = s.builder.origin, origin
        made = s.builder.whole(s.plain(app))
        s.builder.origin = now
        return made

    return how


def sides_of(s: Splitter, x: Blocks) -> list[tuple[Node, tuple[int, ...]]]:
    """Each side's entries as one tensor, and their places along the cut dim; request side first."""
    found: dict[bool, tuple[list[Node], list[int]]] = {True: ([], []), False: ([], [])}
    start = 0
    for part, size in zip(x.parts, x.sizes):
        nodes, places = found[provenance(part) is not Provenance.IMPRESSION]
        nodes.append(s.builder.whole(part))
        places += range(start, start + size)
        start += size
    return [(s.builder.cat(nodes, x.dim), tuple(places)) for nodes, places in found.values() if nodes]


def runs_of(s: Splitter, x: Blocks) -> list[tuple[Node, tuple[int, ...]]]:
    """Neighbouring parts of one side as one, with their places along the cut dim."""
    runs: list[tuple[bool, list[Node], list[int]]] = []
    for part, size, end in zip(x.parts, x.sizes, running(x.sizes)):
        early = has_early(part)
        if not runs or runs[-1][0] != early:
            runs.append((early, [], []))
        runs[-1][1].append(s.builder.whole(part))
        runs[-1][2].extend(range(end - size, end))
    return [(s.builder.cat(nodes, x.dim), tuple(places)) for _, nodes, places in runs]


def splits(x: Form) -> bool:
    """Whether a value is cut in a way that these laws use."""
    return isinstance(x, (Blocks, Centred, Scaled)) and is_mixed(x) and dtype_of(x) in EXACT


def centre(s: Splitter, x: Blocks, mean: Node, how: Callable[[], Node]) -> Centred:
    """x - mean. mean: size 1 along the cut dim."""
    b, sides = s.builder, []
    for node, places in sides_of(s, x):
        own = b.call(aten.mean.dim, node, [x.dim], True)
        sides.append(Side(b.call(aten.sub.Tensor, node, own), b.call(aten.sub.Tensor, own, mean), places))
    return Centred(x, tuple(sides), x.dim, how)


def centred(s: Splitter, app: Application) -> Form | None:
    """Blocks less one value a row that depends on both sides."""
    x, y = app["self"], app["other"]
    if str(app.target) != "aten.sub.Tensor" or app["alpha"] != 1 or not isinstance(x, Blocks) or not splits(x):
        return None
    by = _one_a_row(s, x, y, x.dim)
    return None if by is None else centre(s, x, by.node, later(s, app))


def scaled(s: Splitter, app: Application) -> Form | None:
    """A mixed value times or over one value a row, or a centred one times a constant vector."""
    x, y = app["self"], app["other"]
    times = str(app.target) == "aten.mul.Tensor"
    if times and not (isinstance(x, Form) and splits(x)):
        x, y = y, x
    if app.named.get("rounding_mode") is not None or not isinstance(x, Form) or not splits(x):
        return None
    assert isinstance(x, (Blocks, Centred, Scaled))
    if isinstance(y, (int, float)) and not isinstance(y, bool):
        kept = not isinstance(x, Blocks) and y != 0
        return Sum(((float(y) if times else 1.0 / y, x),), x.shape) if kept else None
    if x is y:
        return Squared(x, later(s, app)) if isinstance(x, Centred) else None
    by = _one_a_row(s, x, y, x.dim) or (None if isinstance(x, Blocks) else _columns(s, x, y, x.dim))
    if by is None:
        return None
    by = by if times else Whole(s.builder.call(aten.reciprocal.default, by.node))
    return Scaled(x, by, x.dim, later(s, app))


@handles("aten.pow.Tensor_Scalar", "aten.square.default")
def square(s: Splitter, app: Application) -> Form | None:
    """The square of a centred value."""
    x = app["self"]
    two = str(app.target) == "aten.square.default" or app["exponent"] == 2
    return Squared(x, later(s, app)) if isinstance(x, Centred) and two else None


def _one_a_row(s: Splitter, x: Form, y: Any, dim: int) -> Whole | None:
    """y with as many dims as x, if it has size 1 along `dim` and x's shape elsewhere at most."""
    if not _fits(x, y):
        return None
    if isinstance(y, Expanded) and y.ndim == x.ndim and same_size(y.form.shape[dim], 1):
        y = y.form
    if isinstance(x, Blocks) and provenance(y) is not Provenance.IMPRESSION:
        return None
    back = dim - x.ndim
    return _aligned(s, x, y) if y.ndim + back < 0 or same_size(y.shape[back], 1) else None


def _columns(s: Splitter, x: Form, y: Any, dim: int) -> Whole | None:
    """y with as many dims as x, if it is constant and has entries along `dim` alone."""
    if not _fits(x, y) or provenance(y) is not Provenance.CONSTANT:
        return None
    others = [n for d, n in enumerate(y.shape, x.ndim - y.ndim) if d != dim]
    return _aligned(s, x, y) if all(same_size(n, 1) for n in others) else None


def _fits(x: Form, y: Any) -> bool:
    shapes = isinstance(y, Form) and same_shape(broadcast([x.shape, y.shape]), x.shape)
    return shapes and dtype_of(x) == dtype_of(y)


def _aligned(s: Splitter, x: Form, y: Form) -> Whole:
    node = s.builder.whole(y)
    missing = x.ndim - y.ndim
    if missing:
        node = s.builder.call(aten.reshape.default, node, [1] * missing + s.builder.sizes(y.shape))
    return Whole(node)


def sum_of_squares(s: Splitter, x: Centred, weight: float) -> Sum:
    """weight * sum (x - m)^2 over the cut dim, which is kept with size 1."""
    b, terms = s.builder, list[tuple[float, Form]]()
    for side in x.sides:
        square = b.call(aten.mul.Tensor, side.centred, side.centred)
        terms.append((weight, Whole(b.call(aten.sum.dim_IntList, square, [x.dim], True))))
        between = b.call(aten.mul.Tensor, side.gap, side.gap)
        terms.append((weight * len(side.places), Whole(between)))
    return Sum(tuple(terms), (*x.shape[: x.dim], 1, *x.shape[x.dim + 1 :]))


def norm_of(s: Splitter, x: Centred) -> Node:
    """The square root of the sum of squares, as the norm of norms: its gradient at 0 is 0."""
    b, norms = s.builder, []
    for side in x.sides:
        norms.append(b.call(aten.linalg_vector_norm.default, side.centred, 2, [x.dim], True))
        norms.append(b.call(aten.mul.Tensor, side.gap, len(side.places) ** 0.5))
    return b.call(aten.linalg_vector_norm.default, b.cat(norms, x.dim), 2, [x.dim], True)
