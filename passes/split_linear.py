"""Linear maps of both sides.

    linear(cat[E a, c], W)       =  E linear(a, Wa) + linear(c, Wc)
    linear(E a - c, W)           =  E linear(a, W) - linear(c, W)
    linear(cat[q, k, q-k, q*k])  =  q(W1 + W3) + k(W2 - W3) + (q*k)W4

The input falls apart into atoms: coefficient times columns of one node, and the columns of the weight
they meet. Atoms of one node share a product (their weights are added); atoms of one side and shape are
put side by side, so that each side has one contiguous block. Weight slices are taken in the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._ops import OpOverload
from torch.fx import Node

from passes import split_outer
from passes.forms import (
    Blocks,
    Expanded,
    Filled,
    Form,
    Lazy,
    Picked,
    Sum,
    Whole,
    dtype_of,
    is_static,
    provenance,
    same_shape,
    same_size,
    with_size,
)
from passes.split import Application, Splitter, handles
from roo_rewrite.facts import Provenance

aten = torch.ops.aten


@dataclass(frozen=True)
class Atom:
    """`coefficient * pick(node, index)` meets columns `columns` of the weight. index None: all entries."""

    coefficient: float
    node: Node
    index: tuple[int, ...] | None
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Atoms that share one product: operands side by side, and for each the weights it meets."""

    side: Provenance
    lead: tuple[object, ...]
    atoms: tuple[Atom, ...]

    @property
    def inner(self) -> int:
        """Entries contracted."""
        return sum(len(columns[0]) for columns in self.operands().values())

    def operands(self) -> dict[tuple[Node, tuple[int, ...] | None], list[tuple[int, ...]]]:
        """Operand -> the weight columns it meets, one entry an atom."""
        out: dict[tuple[Node, tuple[int, ...] | None], list[tuple[int, ...]]] = {}
        for atom in self.atoms:
            out.setdefault((atom.node, atom.index), []).append(atom.columns)
        return out


def atoms_of(s: Splitter, form: Form, columns: tuple[int, ...], dim: int, coefficient: float = 1.0) -> list[Atom]:
    """A form contracted over `dim` against these weight columns, as atoms."""
    match form:
        case Blocks(at, parts) if at == dim:
            out, start = [], 0
            for part, size in zip(parts, form.sizes):
                out += atoms_of(s, part, columns[start : start + size], dim, coefficient)
                start += size
            return out
        case Sum(terms, shape) if all(t.ndim == len(shape) and same_size(t.shape[dim], shape[dim]) for _, t in terms):
            return [a for c, t in terms for a in atoms_of(s, t, columns, dim, coefficient * c)]
        case Expanded(inner, _) if same_size(inner.shape[dim], form.shape[dim]):
            return atoms_of(s, inner, columns, dim, coefficient)
        case Picked(base, at, index) if at == dim:
            return [Atom(coefficient, base.node, index, columns)]
        case Filled(value, _, _) if value == 0:
            return []
        case Lazy(inner, _) if isinstance(inner, (Blocks, Whole)):
            return atoms_of(s, inner, columns, dim, coefficient)
        case _:
            return [Atom(coefficient, s.builder.whole(form), None, columns)]


def joined(atoms: Sequence[Atom]) -> list[Atom]:
    """Picks of one node that meet the weight once each become one pick."""
    pairs = [(a.node, a.index) for a in atoms]
    out: dict[Node | int, Atom] = {}
    for i, atom in enumerate(atoms):
        lone = atom.index is not None and atom.coefficient == 1 and pairs.count((atom.node, atom.index)) == 1
        before = out.get(atom.node) if lone else None
        if before is not None and before.index is not None and atom.index is not None:
            out[atom.node] = Atom(1.0, atom.node, (*before.index, *atom.index), (*before.columns, *atom.columns))
        else:
            out[atom.node if lone else i] = atom
    return list(out.values())


def grouped(atoms: Sequence[Atom], dim: int) -> list[Group]:
    """Atoms by side and by shape but for the contracted dim, request side first."""
    groups: list[Group] = []
    for atom in atoms:
        shape = tuple(atom.node.meta["val"].shape)
        lead = (*shape[:dim], *shape[dim + 1 :])
        early = side(atom.node) is not Provenance.IMPRESSION
        for i, group in enumerate(groups):
            if (group.side is not Provenance.IMPRESSION) == early and same_shape(group.lead, lead):
                groups[i] = Group(max(group.side, side(atom.node)), lead, (*group.atoms, atom))
                break
        else:
            groups.append(Group(side(atom.node), lead, (atom,)))
    return sorted(groups, key=lambda g: g.side is Provenance.IMPRESSION)


def side(node: Node) -> Provenance:
    """The side a node is computed on."""
    return provenance(Whole(node))


@handles("aten.linear.default")
def linear(s: Splitter, app: Application) -> Form | None:
    """x [..., K] with weight [N, K], x in blocks or terms over K."""
    x, weight, bias = app.form("input"), app.form("weight"), app["bias"]
    if not isinstance(weight, Whole) or weight.ndim != 2 or not (bias is None or isinstance(bias, Whole)):
        return None
    from passes.split_norms import Normalized, linear_of_normalized

    if isinstance(x, Normalized):
        return linear_of_normalized(s, x, weight, bias)
    if not (isinstance(x, (Sum, Lazy)) or (isinstance(x, Blocks) and x.dim == x.ndim - 1)):
        return None
    return product(s, x, x.ndim - 1, weight.node, None if bias is None else bias.node, aten.linear.default)


@handles("aten.conv1d.default", "aten.conv2d.default")
def pointwise_conv(s: Splitter, app: Application) -> Form | None:
    """A convolution of kernel 1 is a linear map over the channels."""
    x, weight, bias = app.form("input"), app.form("weight"), app["bias"]
    rank = 3 if str(app.target) == "aten.conv1d.default" else 4
    if not isinstance(weight, Whole) or not (bias is None or isinstance(bias, Whole)) or x.ndim != rank:
        return None
    if any(n != 1 for n in weight.shape[2:]) or app["groups"] != 1 or any(v != 1 for v in app["stride"]):
        return None
    over_channels = isinstance(x, (Sum, Lazy)) or (isinstance(x, Blocks) and x.dim == 1)
    if app["padding"] != [0] * (rank - 2) or not over_channels:
        return None
    return product(s, x, 1, weight.node, None if bias is None else bias.node, app.target)


def product(s: Splitter, x: Form, dim: int, weight: Node, bias: Node | None, target: OpOverload) -> Form | None:
    """The linear map of x over `dim` by groups, if that pays. weight: [N, K, ...]; `target(x, weight, bias)`."""
    if dtype_of(x) != weight.meta["val"].dtype:
        return None
    n, k = (int(v) for v in weight.meta["val"].shape[:2])
    atoms = joined(atoms_of(s, x, tuple(range(k)), dim))
    inside = [a for a in atoms if dim == 1 and a.coefficient == 1 and _factored(a) is not None]
    groups = grouped([a for a in atoms if a not in inside], dim)
    shape = with_size(x.shape, dim, n)
    if not _pays(s, x, groups, inside, shape, n, k):
        return None
    terms: list[tuple[float, Form]] = []
    for i, group in enumerate(groups):
        terms.append((1.0, Whole(_multiply(s, group, dim, weight, bias if i == 0 else None, target))))
    for atom in inside:
        factors = _factored(atom)
        assert factors is not None
        terms.append((1.0, Whole(split_outer.multiply(s, factors, atom.columns, atom.index, weight))))
    if bias is not None and not groups:
        terms.append((1.0, Whole(s.builder.call(aten.reshape.default, bias, [n] + [1] * (len(shape) - 2)))))
    return Sum(tuple(terms), shape) if terms else None


def _factored(atom: Atom) -> split_outer.Factors | None:
    """The factors of an atom that is a whole outer product of both sides."""
    found = split_outer.factors(atom.node)
    return found if found is not None and split_outer.covers(found, atom.index) else None


def _inside_price(s: Splitter, atom: Atom, n: int) -> float:
    """The request's factor into the weight, then what is left per impression."""
    found = _factored(atom)
    assert found is not None
    h, m = found.sizes if found.early_first else found.sizes[::-1]
    late = found.second if found.early_first else found.first
    shape = tuple(late.meta["val"].shape)
    batch, rest = shape[0], shape[3:]
    per_request = s.price.product((batch, n, m, *rest), h, Provenance.REQUEST)
    per_impression = s.price.product((batch, n, *rest), m, Provenance.IMPRESSION)
    return per_request + per_impression + 2 * s.price.move((batch, n, *rest)) + s.price.start(6)


def _pays(
    s: Splitter,
    x: Form,
    groups: Sequence[Group],
    inside: Sequence[Atom],
    shape: tuple[object, ...],
    n: int,
    k: int,
) -> bool:
    price, impression = s.price, Provenance.IMPRESSION
    before = price.product(shape, k, impression) + price.move(x.shape)
    after = sum(price.product((*g.lead, n), g.inner, g.side) for g in groups)
    after += sum(price.move((*g.lead, g.inner), g.side) for g in groups if len(g.operands()) > 1)
    after += sum(price.move((*g.lead, n), impression, 1.0) for g in groups if g.side is not impression)
    after += price.move(shape) * max(len(groups) - 1, 0) + price.start(2 * max(len(groups) - 1, 0))
    after += sum(_inside_price(s, a, n) for a in inside)
    where = s.builder.origin.name if s.builder.origin is not None else ""
    sides = ", ".join(f"{g.inner} of {k} columns per {_unit(g.side)}" for g in groups)
    sides += "".join(f", {len(a.columns)} with the request's factor in the weight" for a in inside)
    return price.take(f"linear: {sides}", before, after, where)


def _unit(side: Provenance) -> str:
    return "impression" if side is Provenance.IMPRESSION else "request"


def _multiply(s: Splitter, group: Group, dim: int, weight: Node, bias: Node | None, target: OpOverload) -> Node:
    """One product: operands side by side, their weights likewise."""
    by_operand: dict[tuple[Node, tuple[int, ...] | None], list[Atom]] = {}
    for atom in group.atoms:
        by_operand.setdefault((atom.node, atom.index), []).append(atom)
    merged = list(by_operand.items())
    operands = [node if index is None else s.builder.pick(node, dim, index) for (node, index), _ in merged]
    x = s.builder.cat(operands, dim)
    if all(len(atoms) == 1 and atoms[0].coefficient == 1 for _, atoms in merged):
        # Nothing is added: the columns of the weight, each once, in the order of the operands.
        w = s.builder.pick(weight, 1, [c for _, (atom,) in merged for c in atom.columns])
    else:
        w = s.builder.cat([_weight(s, weight, atoms) for _, atoms in merged], 1)
    return s.builder.call(target, x, w, *([] if bias is None else [bias]))


def _weight(s: Splitter, weight: Node, atoms: Sequence[Atom]) -> Node:
    """The sum of the weight columns the atoms of one operand meet."""
    terms = tuple((a.coefficient, Picked(Whole(weight), 1, a.columns)) for a in atoms)
    if len(terms) == 1 and terms[0][0] == 1:
        return s.builder.whole(terms[0][1])
    return s.builder.whole(Sum(terms, with_size(tuple(weight.meta["val"].shape), 1, len(atoms[0].columns))))


@handles("aten.addmm.default")
def addmm(s: Splitter, app: Application) -> Form | None:
    """bias + x @ weight, as a linear map."""
    x, y, bias = app.form("mat1"), app.form("mat2"), app.form("self")
    plain = app["beta"] == 1 and app["alpha"] == 1
    if not isinstance(x, (Blocks, Sum)) or not isinstance(y, Whole) or not isinstance(bias, Whole) or not plain:
        return None
    if bias.ndim != 1 or (isinstance(x, Blocks) and x.dim != 1):
        return None
    weight = s.builder.call(aten.t.default, y.node)
    return product(s, x, 1, weight, bias.node, aten.linear.default)


@handles("aten.mm.default", "aten.matmul.default")
def matmul(s: Splitter, app: Application) -> Form | None:
    """x @ matrix is a linear map; other products are in `split_products`."""
    from passes.split_products import bilinear

    x, y = app.form("self"), app.form("mat2" if str(app.target) == "aten.mm.default" else "other")
    over_last = isinstance(x, Sum) or (isinstance(x, Blocks) and x.dim == x.ndim - 1)
    if over_last and isinstance(y, Whole) and y.ndim == 2 and all(is_static(v) for v in y.shape) and x.ndim > 1:
        return product(s, x, x.ndim - 1, s.builder.call(aten.t.default, y.node), None, aten.linear.default)
    return bilinear(s, app, x, y)
